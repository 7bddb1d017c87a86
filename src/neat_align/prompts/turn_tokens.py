"""Which tokens a chat template writes around turns, in calls of tools, and around what tools give.

Found by having it write conversations whose words are known.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from neat_align.prompts.token_finder import TokenFinder

_SYSTEM, _FIRST, _ANSWER, _LAST = "neat-system", "neat-first", "neat-answer", "neat-last"
_CALLED, _ARGUMENT, _RESULT = "neat_called", "neat-argument", "neat-result"
_TOOL = {
    "type": "function",
    "function": {
        "name": _CALLED,
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "A word."}},
            "required": ["word"],
        },
    },
}


@dataclass(frozen=True)
class Written:
    """Tokens by what the template writes them for; no token is in two of them.

    `turns` begin and end turns, `calls` are around the calls of tools that an assistant makes,
    `given` are around tools and their results.
    """

    turns: frozenset[str] = frozenset()
    calls: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()


def twin(token: str) -> str:
    """The closing token of an opening one, and the other way round: `<think>` and `</think>`."""
    return token.replace("/", "", 1) if token[1:2] == "/" else f"{token[:1]}/{token[1:]}"


def written_tokens(tokenizer: Any, finder: TokenFinder) -> Written | None:
    """What the tokenizer's chat template writes, of the tokens that `finder` finds.

    None where it refuses the plainest of conversations, as one that needs arguments does.
    """
    turns = _turns(tokenizer, finder)
    if turns is None:
        return None
    calls, given = _tools(tokenizer, finder)
    return Written(turns, frozenset(calls - turns), frozenset(given - calls - turns))


def _turns(tokenizer: Any, finder: TokenFinder) -> frozenset[str] | None:
    """The tokens that begin or end a turn.

    A pair that opens and closes a block (`<think>`, `</think>`) right before an answer belongs to
    the answer: the model writes it, or the template does in its stead.
    """
    question = {"role": "user", "content": _FIRST}
    talk = [question, {"role": "assistant", "content": _ANSWER}]
    plain = _render(tokenizer, talk)
    if plain is None:
        return None
    texts = [
        plain,
        _render(tokenizer, [{"role": "system", "content": _SYSTEM}, *talk]),
        _render(tokenizer, [*talk, {"role": "user", "content": _LAST}], open_end=True),
    ]
    around: set[str] = set()
    before_answers: set[str] = set()
    for text in filter(None, texts):
        first, last = text.find(_FIRST), text.rfind(_LAST)
        answer = text.find(_ANSWER, max(first, 0))
        if first < 0 or answer < 0:  # it drops earlier turns
            before_answers |= finder.tokens_in(text)
            continue
        end = last if last >= 0 else len(text)
        around |= finder.tokens_in(text[:first]) | finder.tokens_in(text[answer:end])
        before_answers |= finder.tokens_in(text[first:answer]) | finder.tokens_in(text[end:])
    return frozenset(around | (before_answers - _blocks(before_answers, finder.tokens, around)))


def _blocks(tokens: set[str], known: Collection[str], others: set[str]) -> set[str]:
    """Those that open or close a block of which neither end is among the others."""
    return {t for t in tokens if twin(t) in known and not {t, twin(t)} & others}


def _tools(tokenizer: Any, finder: TokenFinder) -> tuple[set[str], set[str]]:
    """(around calls of tools, around tools and results); turns' own tokens are in both."""
    for arguments in ({"word": _ARGUMENT}, json.dumps({"word": _ARGUMENT})):
        function = {"name": _CALLED, "arguments": arguments}
        # Mistral's templates take ids of nine characters.
        call = {"id": "neat00000", "type": "function", "function": function}
        talk: list[dict[str, Any]] = [
            {"role": "user", "content": _FIRST},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        result = {"role": "tool", "name": _CALLED, "tool_call_id": call["id"], "content": _RESULT}
        alone = _render(tokenizer, talk, tools=[_TOOL])
        answered = _render(tokenizer, [*talk, result], tools=[_TOOL], open_end=True)
        start = -1 if alone is None else alone.rfind(_FIRST)
        if alone is None or start < 0 or _ARGUMENT not in alone[start:]:
            continue
        called, _, after = alone[start:].rpartition(_ARGUMENT)
        closing = [token for _, token in finder.find(after)]
        # The last one ends the turn, unless it closes what stands before the call.
        if closing and twin(closing[-1]) not in finder.tokens:
            closing.pop()
        calls = finder.tokens_in(called) | set(closing)
        given = finder.tokens_in(alone[:start]) | finder.tokens_in(after)
        return calls, given | finder.tokens_in(answered or "")
    return set(), set()


def _render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    open_end: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> str | None:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=open_end, tokenize=False
            )
        )
    except Exception:  # noqa: BLE001 - a template is somebody's program and can raise anything
        return None
