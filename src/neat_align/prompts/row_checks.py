"""What of the data can be checked against tokenizer and settings, before anything is sampled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError, DataError, PromptError
from neat_align.prompts.loading import rows_from_dataset
from neat_align.prompts.row_prompts import row_prompt_ids
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.template_reading import (
    check_answers,
    check_turns_are_read,
    warn_of_unread_kwargs,
)

logger = logging.getLogger(__name__)


def as_rows(dataset: Any, name: str) -> list[PromptRow]:
    """The rows of a `datasets.Dataset` or any iterable of rows; `name` is for messages."""
    if isinstance(dataset, list) and dataset and isinstance(dataset[0], PromptRow):
        return cast("list[PromptRow]", dataset)
    return rows_from_dataset(dataset, name=name)


def check_prompts(
    rows: Sequence[PromptRow], tokenizer: Any, max_prompt_length: int, *, conversational: bool
) -> None:
    """Refuse prompts that cannot be sampled from; messages name the row.

    DataError: longer than `max_prompt_length` tokens, or of another form than the others.
    PromptError: the chat template refuses or shortens it, or does not read the row's tools; an
    answer holds nothing but its end. Text prompts that bypass a chat template, and variables that
    the template does not read, are warned of.
    """
    lengths = check_reading(rows, tokenizer, conversational=conversational)
    too_long = [(row, n) for row, n in zip(rows, lengths, strict=True) if n > max_prompt_length]
    if too_long:
        named = ", ".join(f"{row.where} ({n})" for row, n in too_long[:5])
        raise DataError(
            f"{len(too_long)} prompts are longer than max_prompt_length={max_prompt_length} "
            f"tokens: {named}. Raise it (the model's context allowing), or drop the rows; prompts "
            "are never cut"
        )
    if not conversational and tokenizer.chat_template:
        logger.warning(
            "the prompts are text and the tokenizer has a chat template: they are used as they "
            "are, without it. For a chat model give messages, or pass --as_conversations true"
        )


def check_reading(rows: Sequence[PromptRow], tokenizer: Any, *, conversational: bool) -> list[int]:
    """The prompts' lengths in tokens, once it is known that the model reads all of each row.

    Raises DataError and PromptError as `check_prompts` does, but for lengths.
    """
    lengths = [_length(row, tokenizer, conversational=conversational) for row in rows]
    warn_of_unread_kwargs(rows, tokenizer)
    return lengths


def _length(row: PromptRow, tokenizer: Any, *, conversational: bool) -> int:
    """Tokens of a row's prompt, after a look at its form and at what the template makes of it."""
    if isinstance(row.prompt, str) == conversational:
        came, others = ("text", "messages") if conversational else ("messages", "text")
        raise DataError(
            f"{row.where}: prompt is {came}, but {others} in the training data: use one form in "
            "both (--as_conversations true turns text into messages)"
        )
    try:
        ids = row_prompt_ids(tokenizer, row)
        check_turns_are_read(row, tokenizer)
    except PromptError as error:
        raise PromptError(f"{row.where}: prompt: {error} (change this row, or drop it)") from error
    check_answers(row, tokenizer, conversational=conversational)
    return len(ids)


def check_group_size(rows: Sequence[PromptRow], args: NEATConfig) -> None:
    """Refuse settings with which no prompt of this data can have two completions."""
    human = max(_human_answers(row) for row in rows) if args.use_human_completions else 0
    if args.num_generations + human < 2:
        raise ConfigError(
            f"num_positive, num_negative and num_plain add up to {args.num_generations} and no "
            "row has an answer of its own that is used: every prompt would have one completion, "
            "and nothing to rank: ask for two or more"
        )


def _human_answers(row: PromptRow) -> int:
    return sum(answer is not None for answer in (row.chosen, row.rejected))
