"""A prompt, with the data's own answers beside it: the record that every later stage is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from neat_align.errors import PromptError

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[Message]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt with the data's own answers, if any.

    `id` is the row's `id` or `prompt_id` where it has one, else a hash of its content. The prompt's
    last turn is the user's. Answers are text, as written; those cut out of whole transcripts are
    without the blanks around them. `columns` is everything else in the row, for reward functions;
    `where` is the row's place in the data, for messages.
    """

    id: str
    prompt: Prompt
    chosen: str | None
    rejected: str | None
    columns: Mapping[str, Any]
    where: str


def is_conversational(rows: Sequence[PromptRow]) -> bool:
    """Whether the prompts are messages: all of them are, or none (rows are read so)."""
    return bool(rows) and not isinstance(rows[0].prompt, str)


def hashable(prompt: Prompt) -> object:
    """What equal prompts have in common and different ones have not, without a copy of the text."""
    if isinstance(prompt, str):
        return prompt
    return tuple((message["role"], message["content"]) for message in prompt)


def check_messages(messages: list[Message]) -> list[Message]:
    """The messages, if a conversation with them can be answered. Raises PromptError."""
    if not messages:
        raise PromptError("the conversation is empty: a prompt needs at least one user turn")
    for i, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise PromptError(
                f"turn {i} of the conversation is {message!r}; a turn needs a role and a content, "
                "both text"
            )
    if messages[-1]["role"] == "assistant":
        raise PromptError(
            "the conversation ends in an assistant turn: a prompt must end where the assistant is "
            "to answer; remove that turn"
        )
    return messages
