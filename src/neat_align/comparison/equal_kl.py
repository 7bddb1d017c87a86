"""Where the runs of a comparison stand at equal KL to the start policy.

A run is a curve of reward over KL that begins at the start policy with KL 0. It is read where it
passes the target, linearly between two rounds in the square root of the KL (in which reward grows
about linearly: 2210.10760), and never beyond what the run reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from neat_align.comparison.outcomes import Point, Run, Values, collapse_reason


def values_at_kl(run: Run, metric: str, target: float) -> Values | None:
    """Per-prompt values where a run's curve first passes `target`, between two neighbouring points.

    None where it never does. Points after the first collapsed one are not looked at.
    """
    before = run.start
    for point in _sound_points(run):
        if point.kl >= target:
            low, high = math.sqrt(before.kl), math.sqrt(point.kl)
            weight = (math.sqrt(target) - low) / (high - low) if high > low else 1.0
            between: Values = (1 - weight) * before.values(metric) + weight * point.values(metric)
            return between
        before = point
    return None


def common_kl(runs: Sequence[Run]) -> float | None:
    """The largest KL that every run passed before it collapsed; None when none left the start.

    A run that collapsed in its first round, or that never left the start, is not asked: it has no
    answer to compare at any KL, and would leave the other methods without one.
    """
    reached = (max((point.kl for point in _sound_points(run)), default=0.0) for run in runs)
    return min((kl for kl in reached if kl > 0), default=None)


def crossings(
    runs: Sequence[Run], method: str, metric: str, target: float | None
) -> dict[int, Values]:
    """A method's per-prompt values at the target by seed, averaged over the strengths that pass."""
    if target is None:
        return {}
    by_seed: dict[int, list[Values]] = {}
    for run in runs:
        values = values_at_kl(run, metric, target) if run.method == method else None
        if values is not None:
            by_seed.setdefault(run.seed, []).append(values)
    return {seed: np.mean(values, axis=0) for seed, values in by_seed.items()}


def _sound_points(run: Run) -> Iterator[Point]:
    """The points before the first collapsed one."""
    for point in run.points:
        if collapse_reason(point, run.start) is not None:
            return
        yield point
