"""Intervals and rates over prompts: the statistics of every table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean over what is there; None when nothing is."""
    present = [v for v in values if v is not None]
    return fmean(present) if present else None


# ---- comparing two policies ----------------------------------------------------------------------


@dataclass(frozen=True)
class PairedDifference:
    """Mean of after − before over prompts, and its 95 % bootstrap interval."""

    delta: float
    low: float
    high: float


def paired_bootstrap(
    before: Sequence[float | None],
    after: Sequence[float | None],
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> PairedDifference | None:
    """Percentile bootstrap over prompts of the paired mean difference; None when no prompt has both
    numbers.
    """
    differences = torch.tensor(
        [a - b for b, a in zip(before, after, strict=True) if a is not None and b is not None],
        dtype=torch.float64,
    )
    n = len(differences)
    if n == 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(n, (resamples, n), generator=generator)
    means = differences[picks].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return PairedDifference(float(differences.mean()), low, high)


def win_rate(
    before: Sequence[float | None], after: Sequence[float | None]
) -> dict[str, float] | None:
    """Shares of prompts on which `after` wins, ties and loses; None when no prompt has both
    numbers.
    """
    both = [(b, a) for b, a in zip(before, after, strict=True) if a is not None and b is not None]
    if not both:
        return None
    n = len(both)
    return {
        "win": sum(a > b for b, a in both) / n,
        "tie": sum(a == b for b, a in both) / n,
        "lose": sum(a < b for b, a in both) / n,
    }
