"""What a reward function returned, checked: one finite number, None or Unscorable a row."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence, ValuesView
from itertools import islice
from typing import Any

from neat_align.errors import RewardError
from neat_align.rewards.protocol import CompletionInput, Score, Unscorable, completion_text

_EXCERPT_CHARS = 80


def checked_scores(
    name: str, output: Any, completions: Sequence[CompletionInput], labels: Sequence[str]
) -> list[Score]:
    """`output` as one entry a row; `labels` are the rows' names in messages.

    It may be any sequence, a generator, a one-dimensional array or tensor. Raises RewardError.
    """
    values = _as_list(output, len(completions))
    if values is None:
        raise RewardError(
            f"reward function {name!r} returned {_described(output)}; it must return a list with "
            "one number or None a completion"
        )
    if len(values) != len(completions):
        raise RewardError(
            f"reward function {name!r} returned {len(values)} scores for {len(completions)} "
            "completions; it must return one a completion, None where it abstains"
        )
    return [_score(name, *row) for row in zip(labels, values, completions, strict=True)]


def consumed(output: Any, rows: int) -> Any:
    """What a generator gives, as far as one entry more than there are rows; all else as it is."""
    return list(islice(output, rows + 1)) if isinstance(output, Iterator) else output


def _as_list(output: Any, rows: int) -> list[Any] | None:
    if getattr(output, "ndim", None) == 1 and hasattr(output, "tolist"):
        return list(output.tolist())  # a numpy array or torch tensor
    if isinstance(output, str | bytes | bytearray | memoryview):
        return None
    plain = consumed(output, rows)
    return list(plain) if isinstance(plain, Sequence | ValuesView) else None


def _score(name: str, label: str, value: Any, completion: CompletionInput) -> Score:
    if value is None or isinstance(value, Unscorable):
        return value
    plain = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        hint = " (for a yes or no, return 1.0 or 0.0)" if isinstance(plain, bool) else ""
        what = f"{_described(value)}, which is not a number{hint}"
    else:
        try:
            number = float(plain)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
        what = f"{number}"
    raise RewardError(
        f"reward function {name!r} returned {what}, for {label}, whose completion begins "
        f"{excerpt(completion)}; it must return a finite number, or None to abstain"
    )


def _described(value: Any) -> str:
    return f"{type(value).__name__} {_shortened(repr(value))}"


def excerpt(completion: CompletionInput) -> str:
    """The beginning of a completion, quoted, for a message."""
    return repr(_shortened(completion_text(completion)))


def _shortened(text: str) -> str:
    return text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + "…"
