"""What a trainer is given, checked before anything is sampled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

from neat_align.data import PromptRow, rows_from_dataset
from neat_align.errors import DataError
from neat_align.prompts import prompt_ids

logger = logging.getLogger(__name__)


def as_rows(dataset: Any, name: str) -> list[PromptRow]:
    """The rows of a `datasets.Dataset` or any iterable of rows; `name` is what a message calls them."""
    if isinstance(dataset, list) and dataset and isinstance(dataset[0], PromptRow):
        return cast("list[PromptRow]", dataset)
    return rows_from_dataset(dataset, name=name)


def check_prompts(rows: Sequence[PromptRow], tokenizer: Any, max_prompt_length: int, *, conversational: bool) -> None:
    """Refuse over-long prompts before anything is sampled, and say when text prompts bypass a chat template."""
    lengths = [(row, len(prompt_ids(tokenizer, row.prompt))) for row in rows]
    long = [(row, n) for row, n in lengths if n > max_prompt_length]
    if long:
        named = ", ".join(f"{row.where} ({n})" for row, n in long[:5])
        raise DataError(
            f"{len(long)} prompts are longer than max_prompt_length={max_prompt_length} tokens: {named}. Raise it (the "
            "model's context allowing), or drop the rows; prompts are never cut"
        )
    if not conversational and tokenizer.chat_template:
        logger.warning(
            "the prompts are text and the tokenizer has a chat template: they are used as they are, without it. For a chat "
            "model give messages, or pass --as_conversations true"
        )
