"""What of the data can be checked against tokenizer and settings, before anything is sampled."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError, DataError, PromptError
from neat_align.prompts.dropped_turns import Shortened, without_old_turns
from neat_align.prompts.instructed_limit import InstructedLimit
from neat_align.prompts.loading import rows_from_dataset
from neat_align.prompts.rendering import text_to_encode
from neat_align.prompts.row_prompts import row_prompt_ids
from neat_align.prompts.rows import PromptRow, hashable
from neat_align.prompts.skipped_rows import ADVICE, BadRows, SkippedRows
from neat_align.prompts.template_reading import (
    check_answers,
    check_turns_are_read,
    warn_of_open_blocks,
    warn_of_unread_kwargs,
)

logger = logging.getLogger(__name__)

# Prompts that are tokenised at once.
_BATCH = 256


@dataclass(frozen=True)
class UsablePrompts:
    """Rows whose prompts can be sampled from, and each one's number of tokens.

    `shortened` are the ids of those that lost their oldest turns.
    """

    rows: list[PromptRow]
    lengths: array[int]
    shortened: Set[str] = field(default_factory=frozenset)


def as_rows(
    dataset: Any, name: str, on_bad_row: str = "error", skipped: SkippedRows | None = None
) -> list[PromptRow]:
    """The rows of a `datasets.Dataset` or any iterable of rows; `name` is for messages.

    `on_bad_row` and `skipped` are those of `load_rows`.
    """
    if isinstance(dataset, list) and dataset and isinstance(dataset[0], PromptRow):
        return cast("list[PromptRow]", dataset)
    return rows_from_dataset(dataset, name=name, on_bad_row=on_bad_row, skipped=skipped)


def check_prompts(
    rows: Sequence[PromptRow],
    tokenizer: Any,
    max_prompt_length: int,
    *,
    conversational: bool,
    name: str = "training data",
    on_bad_row: str = "error",
    skipped: SkippedRows | None = None,
    most: int | None = None,
    instructed: InstructedLimit | None = None,
    drop_old_turns: bool = False,
) -> UsablePrompts:
    """The rows whose prompts can be sampled from; messages name the row, and `name` the data.

    Others are refused, or with `on_bad_row="skip"` left out and listed in `skipped`. With `most`,
    only the first this many good rows are looked for. With `drop_old_turns`, too long conversations
    lose their oldest turns. DataError: longer than `max_prompt_length` tokens, over the context
    with an instruction on it (`instructed`), of another form than the others, or no row is left.
    PromptError: the chat template refuses or shortens it, or does not read the row's tools; an
    answer holds nothing but its end. Variables that the template does not read are warned of.
    """
    bad = BadRows(name, on_bad_row, SkippedRows() if skipped is None else skipped)
    looked_at = rows if most is None or bad.skips else rows[:most]
    kept, lengths = list[PromptRow](), array("I")
    too_long, shortened = _TooLong(max_prompt_length), Shortened()
    for given, length in _lengths(looked_at, tokenizer, conversational=conversational):
        if len(kept) == most:
            break
        row, found = _used(given, tokenizer, length, max_prompt_length, instructed, drop_old_turns)
        if row is not given:
            shortened.add(given, row)
        if isinstance(found, int) and found <= max_prompt_length:
            kept.append(row)
            lengths.append(found)
        elif bad.skips:
            reason = too_long.reason(found) if isinstance(found, int) else str(found)
            bad.add(row.where, row.id, reason)
        elif isinstance(found, int):
            too_long.add(row, found)
        else:
            said = f"{row.where}: {found} (change this row, or drop it; {ADVICE})"
            raise type(found)(said) from found
    too_long.settle()
    bad.settle(len(kept))
    shortened.tell(name, max_prompt_length)
    warn_of_unread_kwargs(kept, tokenizer)
    warn_of_open_blocks(kept, tokenizer)
    return UsablePrompts(kept, lengths, shortened.ids)


def apart(train: UsablePrompts, held_out: UsablePrompts) -> UsablePrompts:
    """The training rows without those whose prompt became a held-out one when turns were dropped.

    Prompts that are alike in both as they came are the caller's.
    """
    if not train.shortened and not held_out.shortened:
        return train
    of_held_out = {hashable(row.prompt): row.id in held_out.shortened for row in held_out.rows}

    def became_equal(row: PromptRow) -> bool:
        other = of_held_out.get(hashable(row.prompt))
        return other is not None and (other or row.id in train.shortened)

    kept = [i for i, row in enumerate(train.rows) if not became_equal(row)]
    if len(kept) == len(train.rows):
        return train
    if not kept:
        raise DataError(
            "without their oldest turns, all training prompts are held-out prompts, too: raise "
            "max_prompt_length, or hold out other rows"
        )
    logger.warning(
        "%d training prompts are left out: without the oldest turns they are held-out prompts",
        len(train.rows) - len(kept),
    )
    rows = [train.rows[i] for i in kept]
    ids = frozenset(row.id for row in rows)
    return UsablePrompts(rows, array("I", (train.lengths[i] for i in kept)), train.shortened & ids)


def is_usable(
    row: PromptRow,
    tokenizer: Any,
    max_prompt_length: int,
    *,
    conversational: bool,
    instructed: InstructedLimit | None = None,
    drop_old_turns: bool = False,
) -> bool:
    """Whether `check_prompts` keeps this row; what is odd is said there, of all rows at once."""
    ((_, length),) = _lengths([row], tokenizer, conversational=conversational)
    _, found = _used(row, tokenizer, length, max_prompt_length, instructed, drop_old_turns)
    return isinstance(found, int) and found <= max_prompt_length


def _used(
    row: PromptRow,
    tokenizer: Any,
    length: int | DataError | PromptError,
    max_prompt_length: int,
    instructed: InstructedLimit | None,
    drop_old_turns: bool,
) -> tuple[PromptRow, int | DataError | PromptError]:
    """The row as it is used, whole or shortened, and its tokens or what is wrong with it."""
    found = _instructed(row, tokenizer, length, max_prompt_length, instructed)
    if drop_old_turns and isinstance(length, int) and _is_too_long(found, max_prompt_length):
        return _shortened(row, tokenizer, max_prompt_length, instructed) or (row, found)
    return row, found


def _is_too_long(found: int | DataError | PromptError, limit: int) -> bool:
    """Whether a prompt's length is what is wrong with it: plainly, or (DataError) instructed."""
    return found > limit if isinstance(found, int) else isinstance(found, DataError)


def _shortened(
    row: PromptRow, tokenizer: Any, max_prompt_length: int, instructed: InstructedLimit | None
) -> tuple[PromptRow, int] | None:
    """The conversation without its oldest turns, and its tokens; None where none of it fits."""
    measured: dict[int, int] = {}

    def fits(shorter: PromptRow) -> bool:
        ((_, length),) = _lengths([shorter], tokenizer, conversational=True)
        found = _instructed(shorter, tokenizer, length, max_prompt_length, instructed)
        if isinstance(found, int):
            measured[len(shorter.prompt)] = found
        return isinstance(found, int) and found <= max_prompt_length

    shorter = without_old_turns(row, fits)
    return None if shorter is None else (shorter, measured[len(shorter.prompt)])


def _instructed(
    row: PromptRow,
    tokenizer: Any,
    found: int | DataError | PromptError,
    max_prompt_length: int,
    limit: InstructedLimit | None,
) -> int | DataError | PromptError:
    """What was found of a row's plain prompt, or what is wrong with it under its instructions."""
    if limit is None or not isinstance(found, int) or found > max_prompt_length:
        return found
    try:
        limit.check(row, tokenizer, found)
    except (DataError, PromptError) as error:
        return error
    return found


class _TooLong:
    """Prompts over the limit: all of them are counted before any is an error."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.named: list[str] = []

    def reason(self, length: int) -> str:
        return f"prompt is {length} tokens, over max_prompt_length={self.limit}"

    def add(self, row: PromptRow, length: int) -> None:
        self.count += 1
        if len(self.named) < 5:
            self.named.append(f"{row.where} ({length})")

    def settle(self) -> None:
        if self.count:
            raise DataError(
                f"{self.count} prompts are longer than max_prompt_length={self.limit} tokens: "
                f"{', '.join(self.named)}. Raise it (the model's context allowing), or drop the "
                f"rows ({ADVICE}); prompts are never cut (drop_old_turns: true takes whole turns "
                "off the beginning of conversations)"
            )


def warn_of_unused_template(tokenizer: Any, *, conversational: bool) -> None:
    """Warn where prompts that are text bypass a chat template."""
    if not conversational and tokenizer.chat_template:
        logger.warning(
            "the prompts are text and the tokenizer has a chat template: they are used as they "
            "are, without it. For a chat model give messages, or pass --as_conversations true"
        )


def _lengths(
    rows: Sequence[PromptRow], tokenizer: Any, *, conversational: bool
) -> Iterator[tuple[PromptRow, int | DataError | PromptError]]:
    """Every row with the tokens of its prompt, or with what is wrong with it.

    Tokenised batch by batch, which fast tokenizers do faster and, where they are allowed to, on
    all cores.
    """
    left = iter(rows)
    while batch := list(islice(left, _BATCH)):
        found: list[int | DataError | PromptError] = []
        # By whether special tokens are added: the rows' places in the batch, and their texts.
        waiting: dict[bool, tuple[list[int], list[str]]] = {False: ([], []), True: ([], [])}
        for place, row in enumerate(batch):
            try:
                text = checked_text(row, tokenizer, conversational=conversational)
                if text is None:
                    found.append(len(row_prompt_ids(tokenizer, row)))
                    continue
            except (DataError, PromptError) as error:
                found.append(error)
                continue
            places, texts = waiting[text[1]]
            places.append(place)
            texts.append(text[0])
            found.append(0)  # until all of them are encoded
        for add_special_tokens, (places, texts) in waiting.items():
            if not texts:
                continue
            ids = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)
            for place, row_ids in zip(places, ids["input_ids"], strict=True):
                found[place] = len(row_ids)
        yield from zip(batch, found, strict=True)


def checked_text(
    row: PromptRow, tokenizer: Any, *, conversational: bool
) -> tuple[str, bool] | None:
    """`text_to_encode` of a row, after a look at its form and at what the template makes of it.

    Raises DataError and PromptError, which do not say where the row is.
    """
    if isinstance(row.prompt, str) == conversational:
        came, others = ("text", "messages") if conversational else ("messages", "text")
        raise DataError(
            f"prompt is {came}, but {others} in the training data: use one form in both "
            "(--as_conversations true turns text into messages)"
        )
    try:
        text = text_to_encode(tokenizer, row.prompt, inputs=row.template_inputs)
        check_turns_are_read(row, tokenizer, text[0] if text else None)
    except PromptError as error:
        raise PromptError(f"prompt: {error}") from error
    check_answers(row, tokenizer, conversational=conversational)
    return text


def check_group_size(rows: Sequence[PromptRow], args: NEATConfig) -> None:
    """Refuse settings with which no prompt of this data can have two completions."""
    human = max(_human_answers(row) for row in rows) if args.use_human_completions else 0
    if args.needs_pairs and args.num_generations + human < 2:
        raise ConfigError(
            f"num_positive, num_negative and num_plain add up to {args.num_generations} and no "
            "row has an answer of its own that is used: every prompt would have one completion, "
            "and nothing to rank: ask for two or more"
        )


def _human_answers(row: PromptRow) -> int:
    return sum(answer is not None for answer in (row.chosen, row.rejected))
