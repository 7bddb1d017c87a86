"""A row's prompt as token ids: plain, or under an instruction, with all that its row says of it."""

from __future__ import annotations

from typing import Any

from neat_align.prompts.placement import instructed
from neat_align.prompts.rendering import prompt_ids
from neat_align.prompts.rows import NO_INPUTS, Prompt, PromptRow, TemplateInputs


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
