"""The forms that a row of data can have, read into one: TRL's, HH-RLHF's transcripts, and text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, TypeAlias

from neat_align.errors import DataError, short
from neat_align.prompts.rows import Message, Prompt, PromptRow, has_more_fields
from neat_align.prompts.template_inputs import without_nulls

ROLES = ("system", "user", "assistant", "tool")
# One text for every message, instead of one a message.
_ROLE = {role: role for role in ROLES}
# What a message may have beside role and content, by role; the chat template reads it.
_MORE_FIELDS = {
    "assistant": ("tool_calls", "reasoning_content", "thinking"),
    "tool": ("tool_call_id", "name"),
}
HUMAN_MARK, ASSISTANT_MARK = "\n\nHuman:", "\n\nAssistant:"
# What goes before the first mark is the system's.
ROLE_OF = {"": "system", "Human": "user", "Assistant": "assistant"}
# The other way; a system's text stands without one.
_MARK_OF = {"system": "", "user": HUMAN_MARK, "assistant": ASSISTANT_MARK}
SAME_ANSWERS = "chosen and rejected are the same, so there is nothing to prefer: drop the row"
_Pair: TypeAlias = tuple[Prompt, str | None, str | None]


def to_conversation(row: PromptRow) -> PromptRow:
    """The row with its prompt as messages.

    Those are the turns of a Human/Assistant transcript, or else one user message. Text before the
    first turn becomes the system message; blank turns are dropped, and neighbours of one role
    joined.
    """
    if not isinstance(row.prompt, str):
        return row
    return replace(row, prompt=as_messages(row.prompt))


def to_text(row: PromptRow) -> PromptRow:
    """The row with its prompt as a transcript, for a model without a chat template.

    As HH-RLHF has them: "\\n\\nHuman: …\\n\\nAssistant:", after the system's text if any.
    Raises DataError for what a transcript has no form for: tools, calls of them, and thoughts.
    """
    if isinstance(row.prompt, str):
        return row
    has_tools = row.template_inputs.tools or any(m["role"] == "tool" for m in row.prompt)
    if has_tools or has_more_fields(row.prompt):
        raise DataError(
            f"{row.where}: the prompt has tools or thoughts, which need a chat template and no "
            "text can hold: name a model with a chat template, or drop the row"
        )
    turns = [f"{_MARK_OF[m['role']]} {m['content']}".strip(" ") for m in row.prompt]
    return replace(row, prompt="".join([*turns, ASSISTANT_MARK]))


def as_messages(prompt: Prompt) -> list[Message]:
    """The prompt as messages: those it has, a transcript's turns, or else one user turn."""
    if not isinstance(prompt, str):
        return list(prompt)
    return transcript_messages(prompt) or [{"role": "user", "content": prompt}]


def read_pair(row: Mapping[str, Any]) -> _Pair:
    """Prompt, chosen and rejected answer of a row, whatever its form; an answer may be None.

    Raises DataError that says what in the row is wrong and what to change.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "prompt" in row:
        # Some data sets repeat the prompt as text beside whole conversations; like TRL, read the
        # conversations.
        if not (isinstance(row["prompt"], str) and isinstance(chosen, list | tuple)):
            return (
                _read_prompt(row["prompt"]),
                _read_answer(chosen, "chosen"),
                _read_answer(rejected, "rejected"),
            )
    elif "chosen" not in row or "rejected" not in row:
        raise DataError(
            f"prompt is missing (the row has {', '.join(row) or 'no fields'}): give prompt, or "
            "both chosen and rejected"
        )
    for field in ("chosen", "rejected"):
        if not isinstance(row.get(field), str if isinstance(chosen, str) else list | tuple):
            both = (
                "chosen and rejected must be both text or both messages, and begin with the prompt"
            )
            raise DataError(
                f"{field} is {short_repr(row.get(field))}; without a prompt, {both}: "
                "correct it, or drop the row"
            )
    if chosen == rejected:
        raise DataError(SAME_ANSWERS)
    if isinstance(chosen, str):
        return _split_text(chosen, str(rejected))
    good, bad = _read_messages(chosen, "chosen"), _read_messages(rejected, "rejected")
    same = _common(good, bad)
    if not same:
        raise DataError(
            "chosen and rejected share no first message to be the prompt: give prompt as "
            "messages, or answers as text"
        )
    return (
        _read_prompt(good[:same]),
        _read_answer(good[same:], "chosen"),
        _read_answer(bad[same:], "rejected"),
    )


def _split_text(chosen: str, rejected: str) -> _Pair:
    """The shared beginning is the prompt.

    Of transcripts, up to the last `Assistant:` in common; of other text, as TRL has it.
    """
    same = _common(chosen, rejected)
    if chosen.lstrip().startswith("Human:") and rejected.lstrip().startswith("Human:"):
        end = chosen.rfind(ASSISTANT_MARK, 0, same) + len(ASSISTANT_MARK)
        if end < len(ASSISTANT_MARK):
            raise DataError(
                "chosen and rejected are transcripts that differ before their first Assistant "
                "turn: drop the row"
            )
        return _read_prompt(chosen[:end]), chosen[end:].strip(), rejected[end:].strip()
    if same == min(len(chosen), len(rejected)):
        raise DataError(
            "chosen and rejected: one is the beginning of the other, so the prompt's end cannot "
            "be told: add a prompt field"
        )
    if same and chosen[same - 1] == " ":
        same -= 1
    if not chosen[:same].strip():
        raise DataError(
            "prompt is missing, and chosen and rejected share no beginning: add a prompt field"
        )
    return _read_prompt(chosen[:same]), chosen[same:], rejected[same:]


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the beginning that both share."""
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def _read_prompt(value: object) -> Prompt:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"prompt is blank ({short_repr(value)}): write one, or drop the row")
        if re.match(r"""\s*\[\{['"](role|content)['"]""", value):
            raise DataError(
                "prompt is a list of messages written as text: store it as a list (.jsonl and "
                ".parquet can, .csv cannot)"
            )
        transcript_messages(value)
        return value
    if not isinstance(value, list | tuple):
        raise DataError(f"prompt is {short_repr(value)}; it must be text or a list of messages")
    messages = _read_messages(value, "prompt")
    last = messages[-1]
    if last["role"] == "assistant":
        raise DataError("prompt ends with an assistant message: split it off into chosen")
    if last["role"] == "tool":
        return messages
    if last["role"] != "user" or not last["content"].strip():
        raise DataError(
            f"prompt must end with a user message that says something, not {short_repr(last)}: add "
            "one, or drop the row"
        )
    return messages


def _read_messages(value: Any, field: str) -> list[Message]:
    if not value:
        raise DataError(f"{field} is an empty list of messages: add a message, or drop the row")
    for index, message in enumerate(value):
        at = f"{field}[{index}]"
        if not isinstance(message, Mapping):
            raise DataError(
                f"{at} is {short_repr(message)}; a message must be an object with role and content"
            )
        if message.get("role") not in ROLES:
            raise DataError(
                f"{at}.role is {short_repr(message.get('role'))}; it must be one of "
                f"{', '.join(ROLES)}: rename the role, or drop the message"
            )
    return [_read_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _read_message(message: Mapping[str, Any], at: str) -> Message:
    allowed = _MORE_FIELDS.get(message["role"], ())
    # Arrow gives every message the fields of all, empty where it has none.
    more = {
        str(k): without_nulls(v)
        for k, v in message.items()
        if k not in ("role", "content") and v is not None and v != []
    }
    extra = [name for name in more if name not in allowed]
    if extra:
        others = f" (or {', '.join(allowed)})" if allowed else ""
        raise DataError(
            f"{at} also has {', '.join(extra)}, which would be lost: remove everything but role "
            f"and content{others}"
        )
    content = _read_content(message.get("content"), at, may_be_none="tool_calls" in more)
    if "tool_calls" in more:
        _check_calls(more["tool_calls"], f"{at}.tool_calls")
    return {"role": _ROLE[message["role"]], "content": content, **more}


def _read_content(content: object, at: str, *, may_be_none: bool) -> str:
    if content is None and may_be_none:
        return ""
    if isinstance(content, list | tuple) and content:
        parts = [part for part in content if isinstance(part, Mapping)]
        texts = [part.get("text") for part in parts if part.get("type", "text") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
        kinds = {str(part.get("type")) for part in parts if part.get("type", "text") != "text"}
        if kinds:
            raise DataError(
                f"{at}.content has parts of type {', '.join(sorted(kinds))}; neat-align trains on "
                "text: leave them out, or drop the row"
            )
    if not isinstance(content, str):
        raise DataError(
            f"{at}.content is {short_repr(content)}; it must be text, or a list of text parts: "
            "join its parts, or drop the row"
        )
    return content


def _check_calls(calls: object, at: str) -> None:
    for i, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(calls, list) or not isinstance(name, str) or not name:
            raise DataError(
                f"{at}{f'[{i}]' if isinstance(calls, list) else ''} is {short_repr(call)}; a call "
                'of a tool is {"type": "function", "function": {"name": …, "arguments": …}}: '
                "correct it, or drop the row"
            )


def _read_answer(value: object, field: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{field} is {short_repr(value)}; it must be text or a list with one assistant message"
        )
    roles = [m["role"] for m in (_read_messages(value, field) if value else [])]
    if roles != ["assistant"]:
        came = ", ".join(roles) or "nothing"
        raise DataError(
            f"{field} must be one assistant message, not {came}: move earlier turns into prompt, "
            "and cut later ones"
        )
    (message,) = _read_messages(value, field)
    more = [name for name in message if name not in ("role", "content")]
    if more:
        raise DataError(
            f"{field} has {', '.join(more)}, which would be lost: write into its content what the "
            "model itself writes there (<think>…</think>, <tool_call>…</tool_call>), or drop it"
        )
    return str(message["content"])


def answer_warnings(
    row: Mapping[str, Any], prompt: Prompt, chosen: str | None, rejected: str | None
) -> tuple[list[str], bool]:
    """What to warn of, and whether the human answers can be learnt from.

    Real data sets hold pairs that cannot. Raises DataError where both answers are the same.
    """
    answers = [a for a in (chosen, rejected) if a is not None]
    left_out = "the prompt is kept, the human answers are left out"
    if any(not a.strip() for a in answers):
        return [f"have a blank chosen or rejected answer; {left_out}"], False
    if len(answers) == 2 and chosen == rejected:
        raise DataError(SAME_ANSWERS)
    if isinstance(prompt, str):
        more_turns = any(HUMAN_MARK in a or ASSISTANT_MARK in a for a in answers)
        if more_turns and transcript_messages(prompt):
            warning = (
                "have a chosen or rejected answer that goes on with more Human/Assistant turns; "
                f"{left_out}"
            )
            return [warning], False
        if "prompt" not in row and prompt[-1].isalnum() and any(a[0].isalnum() for a in answers):
            warning = (
                "have no prompt field, and what chosen and rejected share ends inside a word: add "
                "a prompt field"
            )
            return [warning], True
    return [], True


def transcript_messages(text: str) -> list[Message]:
    """Messages of a Human/Assistant transcript that is a prompt; none for any other text.

    Raises DataError for a transcript that does not end with a Human turn.
    """
    before, *parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text.lstrip())
    marks, open_end = parts[::2], text.rstrip().endswith(ASSISTANT_MARK)
    # Text that goes before the first mark may be anything: the end must say that it is a
    # transcript.
    is_transcript = open_end if before else text.startswith(HUMAN_MARK) or "Assistant" in marks
    if "Human" not in marks or not is_transcript:
        return []
    turns = zip(["", *marks], [before, *parts[1::2]], strict=True)
    spoken = [(ROLE_OF[mark], turn.strip()) for mark, turn in turns if turn.strip()]
    messages = [
        {"role": role, "content": "\n\n".join(text for _, text in neighbours)}
        for role, neighbours in groupby(spoken, lambda turn: turn[0])
    ]
    if not messages or messages[-1]["role"] != "user":
        raise DataError(
            "prompt is a transcript that does not end with a Human turn: split the last Assistant "
            "turn off into chosen"
        )
    return messages


def short_repr(value: object) -> str:
    """A value for a message: short, and with its type where the value does not tell it."""
    if value is None:
        return "null"
    text = short(value)
    if isinstance(value, str | list | tuple | Mapping):
        return text
    return f"{text} ({type(value).__name__})"
