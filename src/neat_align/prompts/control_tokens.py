"""Control tokens that a text spells out: where they stand, which of them stay text, and how.

Every added token would otherwise be taken for itself: a user who asks "what does <|im_end|> mean?"
would end their own turn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from neat_align.errors import PromptError
from neat_align.prompts.token_finder import TokenFinder
from neat_align.prompts.turn_tokens import Written, twin, written_tokens

# Noncharacters of Unicode, which no text holds and every template hands through: they stand around
# what must stay text until the rendered prompt is encoded.
_START, _END = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_START}([^{_START}{_END}]*){_END}|[{_START}{_END}]")
# Ends by their name, such as Llama 3's <|eom_id|> and the </s> of a tokenizer with another eos.
_ENDS = re.compile(r"\W*(eo[mst](_id)?|s)\W*", re.IGNORECASE)


@dataclass(frozen=True)
class ControlTokens:
    """What a tokenizer and its chat template give a meaning of their own.

    `finder` finds control tokens: special ones, and added ones that the template writes (Qwen's
    `<think>`). `own` are those of them that an answer may hold as the tokens that they are, because
    the model itself writes them inside its turn (`<think>`, `<tool_call>`); the others would end
    the turn, or begin another. `special` are those that decoding leaves out of an answer's text.
    """

    finder: TokenFinder
    own: frozenset[str]
    special: frozenset[str]


_State: TypeAlias = tuple[Any, ...]
# By tokenizer, held weakly; an entry counts only while the tokenizer's state is what it was.
_KNOWN: WeakKeyDictionary[Any, tuple[_State, int | None, ControlTokens]] = WeakKeyDictionary()


def control_tokens(tokenizer: Any, *, fresh: bool = False) -> ControlTokens:
    """The tokenizer's control tokens; read anew after tokens were added or the template changed.

    Reading them takes a time that grows with the added tokens (15 ms for Gemma 3's 6,242), looking
    for changes does not. One change is not noticed: that a token which the vocabulary holds already
    is declared an added or a special one. `fresh` reads them anew whatever has changed; the checks
    before a run do.
    """
    known = _KNOWN.get(tokenizer)
    if not fresh and known is not None:
        state, next_id, tokens = known
        if state == _state(tokenizer) and _is_free(tokenizer, next_id):
            return tokens
    tokens = _read(tokenizer)
    _KNOWN[tokenizer] = _state(tokenizer), _next_id(tokenizer), tokens
    return tokens


def _state(tokenizer: Any) -> _State:
    """What decides the control tokens, as far as it is at hand without listing the vocabulary."""
    template = getattr(tokenizer, "chat_template", None)
    return (
        tuple(template.items()) if isinstance(template, dict) else template,
        tuple(getattr(tokenizer, "chat_control_tokens", None) or ()),
        tuple(tokenizer.all_special_tokens),
        None if tokenizer.is_fast else len(tokenizer),
    )


def _next_id(tokenizer: Any) -> int | None:
    """The id that the next new token of a fast tokenizer gets."""
    if not tokenizer.is_fast:
        return None
    size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    return int(max([size, *(i + 1 for i in tokenizer.added_tokens_decoder)]))


def _is_free(tokenizer: Any, next_id: int | None) -> bool:
    return next_id is None or tokenizer.backend_tokenizer.id_to_token(next_id) is None


def _read(tokenizer: Any) -> ControlTokens:
    template = getattr(tokenizer, "chat_template", None) or ""
    source = "\0".join(template.values()) if isinstance(template, dict) else str(template)
    # White space stands in every template as ordinary text (Gemma has a token for "\n").
    added = {
        token.content: token
        for token in tokenizer.added_tokens_decoder.values()
        if not token.content.isspace()
    }
    named = frozenset(tokenizer.special_tokens_map.values())
    special = frozenset(name for name, token in added.items() if token.special)
    in_template = {name for name in added if name in source}
    listed = set(getattr(tokenizer, "chat_control_tokens", None) or ()) & set(added)
    written = written_tokens(tokenizer, TokenFinder(added)) if template else Written()
    control = special | named | in_template | listed | (written.turns if written else frozenset())

    def is_own(token: str) -> bool:
        if token in named or _ENDS.fullmatch(token):
            return False
        if written is None:  # nothing is known of the template: what looks like a block alone
            return token not in special and twin(token) in added
        if token in written.turns or token in written.given:
            return False
        return token in written.calls or token not in special or twin(token) in added

    own = frozenset(filter(is_own, control))
    return ControlTokens(TokenFinder(control), own, special)


# ---- staying text --------------------------------------------------------------------------------


def marked(value: Any, finder: TokenFinder, keep: Collection[str] = ()) -> Any:
    """A copy of plain data in which every token that is found, and not in `keep`, will stay text.

    `encode_marked` reads the marks. Keys of objects are not marked.
    """
    if isinstance(value, str):
        text = value.replace(_START, "").replace(_END, "")  # nobody's marks but ours
        pieces, end = [], 0
        for start, token in finder.find(text):
            pieces.append(text[end:start])
            pieces.append(token if token in keep else f"{_START}{token}{_END}")
            end = start + len(token)
        return "".join([*pieces, text[end:]])
    if isinstance(value, Mapping):
        return {key: marked(item, finder, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [marked(item, finder, keep) for item in value]
    return value


def encode_marked(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text: what is marked as plain text, all else with the tokens that it holds.

    Marks that a template has torn apart are dropped. Raises PromptError where the tokenizer makes a
    control token even of plain text.
    """
    pieces = _MARKED.split(text)  # text, marked, text, …, text; None for a mark that is alone
    newline = encode(tokenizer, "\n")
    ids = encode(tokenizer, pieces[0]) if pieces[0] else []
    for i, piece in enumerate(pieces[1:], start=1):
        if not piece:
            continue
        as_text = i % 2 == 1
        ids_of = _encode_as_text if as_text else encode
        # Behind a newline, which is taken off again: SentencePiece puts a space in front of a
        # text's beginning, and this is none.
        piece_ids = ids_of(tokenizer, "\n" + piece)
        if piece_ids[: len(newline)] == newline:
            piece_ids = piece_ids[len(newline) :]
        else:
            piece_ids = ids_of(tokenizer, piece)
        if as_text and tokenizer.convert_tokens_to_ids(piece) in piece_ids:
            raise PromptError(
                f"{piece!r} is a control token and stands in a text, and this tokenizer cannot "
                "write it as plain text: take it out"
            )
        ids += piece_ids
    return ids


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """A text's token ids, whatever control tokens it spells."""
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return [int(i) for i in ids]


def _encode_as_text(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text without any added token, special or not."""
    if not tokenizer.is_fast:
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [int(i) for i in ids]
    # Of a fast tokenizer, split_special_tokens takes special tokens apart, and no other added ones:
    # the parts of its pipeline one by one.
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    splits = [text]
    if backend.pre_tokenizer is not None:
        splits = [split for split, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [int(token.id) for split in splits for token in backend.model.tokenize(split)]
