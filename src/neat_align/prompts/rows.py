"""A prompt, with the data's own answers beside it: the record that every later stage is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from neat_align.errors import PromptError

# `role` and `content`, both text; beside them what templates read of calls of tools
# (`tool_calls`, `tool_call_id`, `name`) and of thoughts (`reasoning_content`, `thinking`).
Message: TypeAlias = dict[str, Any]
Prompt: TypeAlias = str | list[Message]


@dataclass(frozen=True, slots=True)
class TemplateInputs:
    """What a chat template is given beside the messages.

    `tools` are JSON schemas of what the model may call; `kwargs` are variables that the template
    reads, such as `enable_thinking`.
    """

    tools: list[dict[str, Any]] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tools or self.kwargs)


NO_INPUTS = TemplateInputs()


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt with the data's own answers, if any.

    `id` is the row's `id` or `prompt_id` where it has one, else a hash of its content. The prompt's
    last turn is the user's. Answers are text, as written; those cut out of whole transcripts are
    without the blanks around them. `columns` is everything else in the row, for reward functions;
    `where` is the row's place in the data, for messages; `template_inputs` is what the row's
    `tools` and `chat_template_kwargs` give the chat template (they are columns, too).
    """

    id: str
    prompt: Prompt
    chosen: str | None
    rejected: str | None
    columns: Mapping[str, Any]
    where: str
    template_inputs: TemplateInputs = NO_INPUTS


def is_conversational(rows: Sequence[PromptRow]) -> bool:
    """Whether the prompts are messages: all of them are, or none (rows are read so)."""
    return bool(rows) and not isinstance(rows[0].prompt, str)


def hashable(prompt: Prompt) -> object:
    """What equal prompts have in common and different ones have not, without a copy of the text."""
    if isinstance(prompt, str):
        return prompt
    return tuple(
        (m["role"], m["content"])
        if len(m) == len(("role", "content"))
        else json.dumps(m, sort_keys=True, default=str)
        for m in prompt
    )


def has_more_fields(prompt: Prompt) -> bool:
    """Whether messages have more than role and content."""
    return not isinstance(prompt, str) and any(m.keys() - {"role", "content"} for m in prompt)


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
