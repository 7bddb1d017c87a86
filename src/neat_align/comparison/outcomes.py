"""What one run of a comparison came to: a policy's evaluation after each round, and its collapse.

Plain data, no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from neat_align.evaluation.statistics import mean_of

# One value a held-out prompt; NaN where there is none.
Values: TypeAlias = NDArray[np.float64]

# A run that ends beyond one of these, as shares of the start policy's value, has collapsed: its
# reward does not count.
LEAST_DISTINCT2 = 0.8
MOST_PERPLEXITY = 1.3
LENGTHS = (0.5, 2.0)
MOST_REPETITION = 0.2  # over the start policy's, as a share of an answer's word trigrams


@dataclass(frozen=True)
class Point:
    """A policy after so many rounds.

    `evaluation` is an `Evaluation` as plain data; `training` are means of the round's training
    metrics.
    """

    round: int
    evaluation: Mapping[str, Any]
    training: Mapping[str, float] = field(default_factory=dict)

    @property
    def kl(self) -> float:
        """Exact KL to the start policy on plain samples, nats per token; 0 for the start policy."""
        return float(self.evaluation.get("kl") or 0.0)

    def values(self, metric: str) -> Values:
        """Per-prompt values of `reward` or `judges/NAME`."""
        if metric == "reward":
            by_prompt = self.evaluation["rewards"]
        else:
            by_prompt = self.evaluation["judges"][metric.removeprefix("judges/")]
        return np.array([math.nan if v is None else v for v in by_prompt], dtype=np.float64)

    def number(self, name: str) -> float | None:
        """A single number of the evaluation, by the name that the table has for it."""
        if name == "mean_length":
            return fmean(self.evaluation["lengths"])
        if name == "pair_accuracy":
            return mean_of(self.evaluation[name])
        if name in ("clipped", "repetition", "refusals"):
            return fmean(self.evaluation[name])
        value: float | None = self.evaluation[name]
        return value


@dataclass(frozen=True)
class Run:
    """One method at one strength with one seed.

    `start` is the start policy with the same seed; `points` are in order. `broke` says why training
    broke down before its last round (a loss that is not finite, nothing left to rank); None where
    it did not.
    """

    method: str
    strength: str
    seed: int
    start: Point
    points: tuple[Point, ...]
    seconds: float = 0.0
    trained_tokens: int = 0
    prompts_per_round: int | None = None
    planned_rounds: int | None = None
    broke: str | None = None

    @property
    def collapsed(self) -> str | None:
        """Why the run counts as collapsed, or None.

        Its training broke down, or its last policy is far from the start's.
        """
        if self.broke is not None or not self.points:
            return self.broke
        return collapse_reason(self.points[-1], self.start)


def collapse_reason(point: Point, start: Point) -> str | None:
    """Why a policy counts as collapsed, in words, or None.

    It does where variety, perplexity, length or repetition are far from the start's.
    """

    def ratio(name: str) -> float | None:
        now, then = point.number(name), start.number(name)
        return now / then if now is not None and then else None

    distinct, perplexity, length = ratio("distinct2"), ratio("perplexity"), ratio("mean_length")
    if point.number("distinct2") is None or (distinct is not None and distinct < LEAST_DISTINCT2):
        return f"distinct-2 is {distinct or 0:.0%} of the start's"
    if perplexity is not None and perplexity > MOST_PERPLEXITY:
        return f"perplexity of the reference answers is {perplexity:.0%} of the start's"
    if length is not None and not LENGTHS[0] <= length <= LENGTHS[1]:
        return f"answers are {length:.0%} as long as the start's"
    repeated = (point.number("repetition") or 0.0) - (start.number("repetition") or 0.0)
    if repeated > MOST_REPETITION:
        return f"{repeated:.0%} more of an answer repeats itself"
    return None
