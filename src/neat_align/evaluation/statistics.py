"""The statistics of every table: means, paired and crossed bootstrap intervals, effect size.

Plain numbers in and out, without torch. The resampling, its intervals and the least squares are
scipy's, in batches, so that memory does not grow with prompts x resamples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

# Float64 numbers, or indices of such, that one batch of resamples gathers: 2 MiB an array, which
# stays in the processor's cache.
_BATCH_NUMBERS = 2**18

Floats: TypeAlias = NDArray[np.float64]


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None when all are."""
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
    """Percentile bootstrap over prompts of the paired mean difference.

    None when no prompt has both numbers; ValueError for lists of different length.
    """
    pairs = zip(before, after, strict=True)
    differences = [a - b for b, a in pairs if a is not None and b is not None]
    if not differences:
        return None
    low, high = mean_interval(differences, seed=seed, resamples=resamples)
    return PairedDifference(float(np.mean(differences)), low, high)


def win_rate(
    before: Sequence[float | None], after: Sequence[float | None]
) -> dict[str, float] | None:
    """Shares of prompts on which `after` wins, ties and loses.

    None when no prompt has both numbers; ValueError for lists of different length.
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


def cohens_d(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Difference of the means over the pooled standard deviation.

    None with fewer than two numbers a side, or no spread. scipy has no effect size, and the t
    statistic that d is a multiple of warns where one side is constant; `variance` is exact there.
    """
    n, m = len(positive), len(negative)
    if n < 2 or m < 2:
        return None
    pooled = ((n - 1) * variance(positive) + (m - 1) * variance(negative)) / (n + m - 2)
    return (fmean(positive) - fmean(negative)) / pooled**0.5 if pooled > 0 else None


# ---- intervals -----------------------------------------------------------------------------------


def mean_interval(
    values: Sequence[float], *, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of one or more numbers."""
    sample = np.asarray(values, dtype=np.float64)
    return _interval([sample], np.mean, len(sample), seed=seed, resamples=resamples)


def crossed_bootstrap(
    table: Floats, lengths: Floats | None = None, *, seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float] | tuple[None, None, None]:
    """(value, low, high) of a [seeds, prompts] table: 95 %, seeds and prompts both resampled.

    A resample draws seeds and, independently, prompts, with replacement, and takes the table at
    every pair of them. The value is the mean; with `lengths` (the differences of length, of the
    same shape) it is the difference at equal length, by least squares on them. NaN entries are
    left out; all three are None where there is nothing else.
    """
    if np.isnan(table).all():
        return None, None, None

    def statistic(seeds: NDArray[np.int64], prompts: NDArray[np.int64], axis: int) -> Floats:
        # One row a resample; `axis` is the last of both, as scipy is told below.
        cells = seeds[:, :, None], prompts[:, None, :]
        y = table[cells].reshape(len(seeds), -1)
        return _means(y) if lengths is None else _intercepts(y, lengths[cells].reshape(y.shape))

    seeds, prompts = (np.arange(n) for n in table.shape)
    value = statistic(seeds[None], prompts[None], axis=-1)[0]
    low, high = _interval([seeds, prompts], statistic, table.size, seed=seed, resamples=resamples)
    return float(value), low, high


def _interval(
    samples: Sequence[NDArray],
    statistic: Callable[..., Floats],
    cells: int,
    *,
    seed: int,
    resamples: int,
) -> tuple[float, float]:
    """The 95 % percentile interval of `statistic`, each sample resampled independently.

    `cells` is how many numbers the statistic gathers for one resample.
    """
    # Half a second to import: only who asks for an interval pays it.
    from scipy.stats import DegenerateDataWarning, bootstrap

    # scipy wants two observations or more; drawing from two copies is drawing the one.
    drawable = [np.repeat(s, 2) if len(s) == 1 else s for s in samples]
    with warnings.catch_warnings():
        # Of resamples in which every entry is missing; they are left out below.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        resampled = bootstrap(
            drawable,
            statistic,
            n_resamples=resamples,
            batch=max(1, _BATCH_NUMBERS // cells),
            vectorized=True,
            axis=-1,
            method="percentile",
            rng=seed % 2**63,  # a seed below 0 is one, too
        )
    low, high = np.nanquantile(resampled.bootstrap_distribution, (0.025, 0.975))
    return float(low), float(high)


def _means(y: Floats) -> Floats:
    """Mean of each row of [rows, n] over what is there; NaN for a row without anything."""
    means: Floats = np.ma.masked_invalid(y).mean(axis=-1).filled(math.nan)
    return means


def _intercepts(y: Floats, x: Floats) -> Floats:
    """The a of least squares y = a + b x for each row of [rows, n], over what is there of y.

    Equal x have no slope: the mean of y. A row without anything is NaN.
    """
    from scipy.stats import linregress

    x = np.where(np.isnan(y), math.nan, x)
    intercepts = _means(y)
    sloped = np.fmax.reduce(x, axis=-1) > np.fmin.reduce(x, axis=-1)
    fit = linregress(x[sloped], y[sloped], axis=-1, nan_policy="omit")
    intercepts[sloped] = fit.intercept
    return intercepts
