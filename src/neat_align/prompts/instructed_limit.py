"""Whether prompts under their instructions still fit the model's context, beside an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neat_align.errors import DataError, PromptError
from neat_align.prompts.rendering import prompt_ids
from neat_align.prompts.row_prompts import instructed_ids, instructed_prompt_ids
from neat_align.prompts.rows import Message, Prompt, PromptRow, TemplateInputs

_TURN: Message = {"role": "user", "content": "What now?"}
_TEXTS: tuple[Prompt, ...] = ("What now?", "User: What now?\n\nAssistant:")
# Templates write a system turn of their own where a conversation has none.
_CONVERSATIONS: tuple[Prompt, ...] = ([_TURN], [{"role": "system", "content": "Be."}, _TURN])


@dataclass(frozen=True)
class InstructedLimit:
    """The instructions of which a row's prompt may get any, and how long it may then be.

    Attributes:
        context: the model's, in tokens.
        max_completion_length: tokens of it that an answer may take.
        most_added: more tokens than an instruction adds to a prompt. Prompts that fit with so many
            more are not rendered with each instruction, which would take long for all of the data.
    """

    context: int
    max_completion_length: int
    instructions: tuple[str, ...]
    placement: str
    most_added: int

    def check(self, row: PromptRow, tokenizer: Any, length: int) -> None:
        """Raise DataError where the prompt, plainly of `length` tokens, is too long with one.

        And the PromptError of a template that refuses it. They do not say where the row is.
        """
        room = self.context - self.max_completion_length
        if length + self.most_added <= room:
            return
        lengths = {
            text: len(instructed_ids(tokenizer, row, text, self.placement))
            for text in self.instructions
        }
        longest = max(lengths, key=lengths.__getitem__)
        if lengths[longest] > room:
            raise DataError(
                f"the prompt is {lengths[longest]} tokens with the instruction {longest!r} on it, "
                f"and the model's context of {self.context} leaves {room} for it beside "
                f"max_completion_length={self.max_completion_length}: lower that, or "
                "take a bank of shorter instructions; prompts are never cut"
            )


@dataclass(frozen=True)
class InstructedLimits:
    """How long prompts may be under the instructions that a run reads; None: reads none."""

    training: InstructedLimit | None
    held_out: InstructedLimit | None


def instructed_limit(
    tokenizer: Any,
    instructions: Sequence[str],
    placement: str,
    *,
    context: int | None,
    max_completion_length: int,
    conversational: bool,
    inputs: TemplateInputs,
) -> InstructedLimit | None:
    """The limit of prompts that may get any of these; None where there is none."""
    if context is None or not instructions:
        return None
    added = [0]
    for probe in _CONVERSATIONS if conversational else _TEXTS:
        with contextlib.suppress(PromptError):  # a template may take no system turn
            plain = len(prompt_ids(tokenizer, probe, inputs=inputs))
            added += [
                len(instructed_prompt_ids(tokenizer, probe, text, placement, inputs)) - plain
                for text in instructions
            ]
    # Twice as many and some more: what stands before an instruction decides on its first tokens.
    return InstructedLimit(
        context, max_completion_length, tuple(instructions), placement, 2 * max(added) + 16
    )
