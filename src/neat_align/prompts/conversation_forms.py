"""Forms that rows have for other trainers, turned into prompt, chosen and rejected.

    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}   ShareGPT
    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}
    {"instruction": …, "input": …, "output": …}                                       Alpaca

A conversation that ends with an assistant's turn gives that turn as `chosen`. Beside one that ends
with the user's, `chosen` and `rejected` are answers: text, or one message. `system` is the text of
a system turn. Each form comes with a note of what was made of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from neat_align.errors import DataError, short

_CONVERSATIONS = ("messages", "conversations")
# As axolotl and LLaMA-Factory have them.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_LAST_TURN = "the last turn, an assistant's, is taken as chosen"


def names_a_form(columns: Iterable[str]) -> bool:
    """Whether columns of these names hold a prompt in some form."""
    names = set(columns)
    return bool(names & {"prompt", "instruction", *_CONVERSATIONS}) or (
        {"chosen", "rejected"} <= names
    )


def as_pair_row(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The row with prompt, chosen and rejected, and a note of what was made of it, else "".

    A row that has a prompt, or whole conversations as chosen and rejected, stays as it is. Raises
    DataError that says what in the row is wrong and what to change.
    """
    if "prompt" in row:
        return row, ""
    field = next((name for name in _CONVERSATIONS if row.get(name) is not None), None)
    chosen = row.get("chosen")
    if field is None:
        return (row, "") if row.get("instruction") is None else _from_alpaca(row)
    if isinstance(chosen, list | tuple) and len(chosen) > 1:
        return row, ""
    return _from_conversation(row, field)


def _from_conversation(row: Mapping[str, Any], field: str) -> tuple[Mapping[str, Any], str]:
    turns = _turns(row[field], field)
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not _begins_with_system(turns):
        turns.insert(0, {"role": "system", "content": system})
    others = {k: v for k, v in row.items() if k not in (field, "system")}
    answers = {
        name: _answer(row[name], name)
        for name in ("chosen", "rejected")
        if row.get(name) is not None
    }
    note = f"are conversations ({field})"
    if turns and turns[-1].get("role") == "assistant":
        if "chosen" in answers:
            raise DataError(
                f"{field} ends with an assistant's turn and there is chosen, too: end the "
                "conversation with the user's turn that chosen answers"
            )
        last = turns.pop()
        if not turns:
            raise DataError(f"{field} holds nothing but an assistant's turn: drop the row")
        answers["chosen"] = [last]
        note += f": {_LAST_TURN}"
    return {**others, "prompt": turns, **answers}, note


def _begins_with_system(turns: Sequence[Mapping[str, Any]]) -> bool:
    return bool(turns) and turns[0].get("role") == "system"


def _turns(value: object, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list | tuple) or not value:
        raise DataError(
            f"{field} is {_short(value)}; it must be a list of turns, such as "
            '[{"from": "human", "value": …}] or [{"role": "user", "content": …}]'
        )
    return [_turn(turn, f"{field}[{i}]") for i, turn in enumerate(value)]


def _turn(turn: object, at: str) -> dict[str, Any]:
    """A turn with role and content; of ShareGPT's `from` and `value` the ecosystem's names."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{at} is {_short(turn)}; a turn must be an object")
    if turn.get("from") is None:
        return dict(turn)
    said = turn["from"]
    role = _ROLES.get(str(said).lower())
    if role is None:
        raise DataError(
            f"{at}.from is {said!r}; it must be one of {', '.join(_ROLES)}: rename it, or drop the "
            "turn"
        )
    # Axolotl's `weight` says which turns are learnt from, which only answers are here.
    more = {k: v for k, v in turn.items() if k not in ("from", "value", "weight") and v is not None}
    if said == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(turn.get("value"), at), **more}
    return {"role": role, "content": turn.get("value"), **more}


def _calls(value: object, at: str) -> list[dict[str, Any]]:
    """LLaMA-Factory's calls of tools: one object, or a list of them, as JSON text."""
    calls = value
    if isinstance(value, str):
        try:
            calls = json.loads(value)
        except (ValueError, RecursionError):
            calls = None
    listed: list[Any] = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and call.get("name") for call in listed):
        raise DataError(
            f"{at}.value is {_short(value)}; a function_call's must be JSON with name and "
            "arguments: correct it"
        )
    return [{"type": "function", "function": dict(call)} for call in listed]


def _answer(value: object, field: str) -> Any:
    """An answer beside a conversation: a text, one message, or a list with one."""
    if isinstance(value, Mapping):
        return [_turn(value, field)]
    if isinstance(value, list | tuple):
        return [_turn(turn, f"{field}[{i}]") for i, turn in enumerate(value)]
    return value


def _from_alpaca(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Instruction and input, a line between them, are the prompt; output is chosen."""
    texts = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"{name} is {_short(text)}; it must be text: correct it")
    for name in ("history", "system"):
        if row.get(name):
            raise DataError(
                f"{name} is given beside instruction, and would be lost: write the row as messages"
            )
    read = (*texts, "history", "system")
    others = {k: v for k, v in row.items() if k not in read and v is not None}
    prompt = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    pair: dict[str, Any] = {"prompt": prompt}
    if texts["output"] and "chosen" not in others:
        pair["chosen"] = texts["output"]
    elif texts["output"]:
        raise DataError("output and chosen are both given: leave out the one that is not meant")
    note = "are Alpaca's: instruction and input are the prompt"
    return {**others, **pair}, note + (", output is chosen" if "chosen" in pair else "")


def _short(value: object) -> str:
    return "null" if value is None else short(value)
