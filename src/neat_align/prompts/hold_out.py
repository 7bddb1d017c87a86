"""Training rows that are kept back for evaluation: how many, and which."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import chain

from neat_align.errors import ConfigError
from neat_align.prompts.rows import PromptRow, hashable

# Held out where nobody asked for a number: this many, and no more than one prompt in so many.
USUAL = 64
ONE_IN = 4


def held_out_count(prompts: int, asked: int | None) -> int:
    """How many of so many different prompts to keep back; at least one of two or more.

    A number that was asked for is kept to where a prompt is left to train on, and is a quarter
    otherwise. None is 64, and a quarter where that is less.
    """
    quarter = max(1, prompts // ONE_IN)
    if asked is None:
        return min(USUAL, quarter)
    return asked if asked < prompts else quarter


def hold_out(
    rows: Sequence[PromptRow], asked: int | None, source: str
) -> tuple[list[PromptRow], str | None]:
    """Rows to keep back, and a notice where they are other than was asked for or than usual.

    Raises ConfigError where there is only one prompt and `asked` is not 0. `source` is what
    messages call the data.
    """
    if asked == 0:
        return [], None
    prompts = len({hashable(row.prompt) for row in rows})
    if prompts < 2:
        raise ConfigError(
            f"{source} has one prompt ({len(rows)} row{'s' * (len(rows) > 1)}), and none can be "
            "held out of it to measure the result: set holdout to 0 to train without measuring, "
            "give eval_dataset_name, or add prompts"
        )
    count = held_out_count(prompts, asked)
    return spread(rows, count), _notice(source, prompts, count, USUAL if asked is None else asked)


def _notice(source: str, prompts: int, count: int, wanted: int) -> str | None:
    if count == wanted:
        return None
    few = " So few measure a change only roughly." if count < 16 else ""
    return (
        f"{source} has {prompts} different prompts: {count} {'is' if count == 1 else 'are'} held "
        f"out to measure the result, not {wanted}; holdout sets another number.{few}"
    )


def spread(rows: Sequence[PromptRow], n: int) -> list[PromptRow]:
    """`n` of the rows, evenly spaced and in their order: data in any order is held out evenly."""
    picked = {round(i * len(rows) / n) for i in range(n)}
    return [row for i, row in enumerate(rows) if i in picked]


def without(rows: list[PromptRow], others: Sequence[PromptRow]) -> list[PromptRow]:
    """The rows whose prompts are none of the others'."""
    prompts = {hashable(row.prompt) for row in others}
    return [row for row in rows if hashable(row.prompt) not in prompts] if prompts else rows


def refilled(
    rows: list[PromptRow], held_out: list[PromptRow], fits: Callable[[PromptRow], bool]
) -> tuple[list[PromptRow], list[PromptRow]]:
    """Training and held-out rows with a training row in the place of each held-out one that fails.

    The others stay held out whatever fits, so that two models or limits are compared on the same
    rows as far as that goes. What fails goes to the training rows, and is left out there.
    """
    judged = [(row, fits(row)) for row in held_out]
    failing = [row for row, is_fit in judged if not is_fit]
    taken: dict[int, PromptRow] = {}
    usable = functools.cache(lambda k: fits(rows[k]))
    for i in range(len(failing)):
        start = i * len(rows) // len(failing)  # evenly spaced, like those that were chosen first
        order = chain(range(start, len(rows)), range(start))
        found = next((k for k in order if k not in taken and usable(k)), None)
        if found is None:
            break
        taken[found] = rows[found]
    left = [row for k, row in enumerate(rows) if k not in taken]
    kept = [row for row, is_fit in judged if is_fit] + list(taken.values())
    return [*without(left, list(taken.values())), *failing], kept
