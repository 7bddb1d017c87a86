"""A row's prompt as token ids: plain, or under an instruction, with all that its row says of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from neat_align.prompts.instruction_banks import InstructionPair
from neat_align.prompts.placement import instructed
from neat_align.prompts.rendering import prompt_ids
from neat_align.prompts.rows import NO_INPUTS, Prompt, PromptRow, TemplateInputs

# A prompt under the positive and under the negative instruction of each of its pairs, as token ids.
InstructedPairs: TypeAlias = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def row_prompt_ids(tokenizer: Any, row: PromptRow) -> list[int]:
    """The token ids of the row's prompt, generation prompt included. Raises PromptError."""
    return prompt_ids(tokenizer, row.prompt, inputs=row.template_inputs)


def instructed_ids(tokenizer: Any, row: PromptRow, instruction: str, placement: str) -> list[int]:
    """The same with an instruction on it, placed as `instructed` says."""
    return instructed_prompt_ids(tokenizer, row.prompt, instruction, placement, row.template_inputs)


def instructed_prompt_ids(
    tokenizer: Any,
    prompt: Prompt,
    instruction: str,
    placement: str,
    inputs: TemplateInputs = NO_INPUTS,
) -> list[int]:
    """The same of a prompt without its row."""
    placed, prefix = instructed(prompt, instruction, placement)
    return prompt_ids(tokenizer, placed, prefix, inputs)


def instructed_pairs(
    tokenizer: Any,
    prompt: Prompt,
    pairs: Sequence[InstructionPair],
    placement: str,
    inputs: TemplateInputs = NO_INPUTS,
) -> InstructedPairs:
    """The prompt's token ids under both instructions of each pair. Raises PromptError."""

    def under(instruction: str) -> tuple[int, ...]:
        return tuple(instructed_prompt_ids(tokenizer, prompt, instruction, placement, inputs))

    return tuple((under(pair.positive), under(pair.negative)) for pair in pairs)
