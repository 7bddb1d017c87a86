"""Control tokens that a text spells out: where they stand, which of them stay text, and how.

Every added token would otherwise be taken for itself: a user who asks "what does <|im_end|> mean?"
would end their own turn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from neat_align.errors import PromptError

# Noncharacters of Unicode, which no text holds and every template hands through: they stand around
# what must stay text until the rendered prompt is encoded.
_START, _END = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_START}([^{_START}{_END}]*){_END}|[{_START}{_END}]")
# A turn, and an answer in it, as a template is asked to write them: what it writes around them is
# its own.
_SYSTEM, _FIRST, _ANSWER, _LAST = "neat-system", "neat-first", "neat-answer", "neat-last"
# Ends that no plain conversation shows: Llama 3's <|eom_id|> after a call of a tool, another </s>.
_ENDS_A_MESSAGE = re.compile(r"\W*(eo[mst](_id)?|s)\W*", re.IGNORECASE)


class TokenFinder:
    """Finds any of some tokens in a text: left to right, the longest first, as tokenizers do.

    The time depends on the text, not on how many tokens there are.
    """

    def __init__(self, tokens: Collection[str]) -> None:
        self.tokens = frozenset(tokens) - {""}
        # Lengths by first character, the longest first: "<" may begin thousands of tokens.
        self._lengths: dict[str, list[int]] = {}
        for first, length in sorted({(t[0], len(t)) for t in self.tokens}, reverse=True):
            self._lengths.setdefault(first, []).append(length)
        firsts = "".join(map(re.escape, self._lengths))
        self._starts = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def at(self, text: str, start: int) -> str | None:
        """The token that begins at `start`, or None."""
        for length in self._lengths.get(text[start : start + 1], ()):
            if text[start : start + length] in self.tokens:
                return text[start : start + length]
        return None

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """(start, token) of every one in the text; they do not overlap."""
        end = 0
        for match in self._starts.finditer(text):
            if match.start() >= end and (token := self.at(text, match.start())) is not None:
                yield match.start(), token
                end = match.start() + len(token)

    def tokens_in(self, value: object) -> set[str]:
        """Those in any text of plain data, keys of objects included."""
        if isinstance(value, str):
            return {token for _, token in self.find(value)}
        if isinstance(value, Mapping):
            parts: Sequence[object] = [*value, *value.values()]
        elif isinstance(value, list | tuple):
            parts = value
        else:
            return set()
        return set().union(*map(self.tokens_in, parts))


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
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    listed = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    special = {name for name, token in added.items() if token.special}
    # White space stands in every template as ordinary text (Gemma has a token for "\n").
    in_template = {name for name in added if name in source and not name.isspace()}
    everything = TokenFinder({name for name in added if not name.isspace()})
    around = _written_around_turns(tokenizer, everything) if template else (set(), set())
    turns = _turn_tokens(around, added) if around is not None else None
    named = set(tokenizer.special_tokens_map.values())
    control = special | named | in_template | (listed & set(added)) | (turns or set())

    def is_own(token: str) -> bool:
        if token in named or (turns is not None and token in turns):
            return False
        if _ENDS_A_MESSAGE.fullmatch(token):
            return False
        if _twin(token) in added:
            return True
        return turns is not None and token in in_template

    own = frozenset(filter(is_own, control))
    return ControlTokens(TokenFinder(control), own, frozenset(special))


def _twin(token: str) -> str:
    """The closing token of an opening one, and the other way round: `<think>` and `</think>`."""
    return token.replace("/", "", 1) if token[1:2] == "/" else f"{token[:1]}/{token[1:]}"


def _turn_tokens(around: tuple[set[str], set[str]], added: Collection[str]) -> set[str]:
    """Those that begin or end a turn, of what the template writes around turns and answers.

    A pair that opens and closes a block (`<think>`, `</think>`) right before an answer belongs to
    the answer: the model writes it, or the template does in its stead.
    """
    outer, before_answers = around
    blocks = {t for t in before_answers if _twin(t) in added and not {t, _twin(t)} & outer}
    return outer | (before_answers - blocks)


def _written_around_turns(
    tokenizer: Any, finder: TokenFinder
) -> tuple[set[str], set[str]] | None:
    """The tokens that the template writes before users' turns and after answers, and before answers.

    None where it refuses the plainest of conversations, as one that needs arguments does.
    """
    question = {"role": "user", "content": _FIRST}
    talk = [question, {"role": "assistant", "content": _ANSWER}]
    asked = [*talk, {"role": "user", "content": _LAST}]
    system = {"role": "system", "content": _SYSTEM}
    texts = [_render(tokenizer, [system, *talk], open_end=False)]
    texts += [
        _render(tokenizer, talk, open_end=False),
        _render(tokenizer, asked, open_end=True),
    ]
    outer: set[str] = set()
    before_answers: set[str] = set()
    if texts[1] is None:
        return None
    for text in filter(None, texts):
        first, last = text.find(_FIRST), text.rfind(_LAST)
        answer = text.find(_ANSWER, first)
        if first < 0 or answer < 0:  # it drops earlier turns
            before_answers |= finder.tokens_in(text)
            continue
        outer |= finder.tokens_in(text[:first])
        before_answers |= finder.tokens_in(text[first:answer])
        outer |= finder.tokens_in(text[answer:last] if last >= 0 else text[answer:])
        before_answers |= finder.tokens_in(text[last:]) if last >= 0 else set()
    return outer, before_answers


def _render(tokenizer: Any, messages: list[dict[str, str]], *, open_end: bool) -> str | None:
    try:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=open_end, tokenize=False)
        )
    except Exception:  # noqa: BLE001 - a template is somebody's program and can raise anything
        return None


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
    newline = _encode(tokenizer, "\n")
    ids = _encode(tokenizer, pieces[0]) if pieces[0] else []
    for i, piece in enumerate(pieces[1:], start=1):
        if not piece:
            continue
        as_text = i % 2 == 1
        encode = _encode_as_text if as_text else _encode
        # Behind a newline, which is taken off again: SentencePiece puts a space in front of a
        # text's beginning, and this is none.
        piece_ids = encode(tokenizer, "\n" + piece)
        if piece_ids[: len(newline)] == newline:
            piece_ids = piece_ids[len(newline) :]
        else:
            piece_ids = encode(tokenizer, piece)
        if as_text and tokenizer.convert_tokens_to_ids(piece) in piece_ids:
            raise PromptError(
                f"{piece!r} is a control token and stands in a text, and this tokenizer cannot "
                "write it as plain text: take it out"
            )
        ids += piece_ids
    return ids


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
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
