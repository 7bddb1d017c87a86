"""Several rewards as one number: their weighted sum, or the sum of what each is within its group.

    sum                 r_i = Σ_k w_k s_ik
    normalize_then_sum  r_i = Σ_k w_k (s_ik − mean_k) / (std_k + 10⁻⁴)

over the functions k that did not abstain on completion i, with mean and standard deviation (of a
sample: n − 1) over the group's completions on which k did not abstain: TRL's
`multi_objective_aggregation`, after GDPO (arXiv:2601.05242). A function on a scale a hundred times
wider decides a sum alone; normalised, each has the say of its weight. TRL normalises the sum again,
over the batch: that keeps the order within a group, which is all that is ranked here, and is left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal, TypeAlias

Aggregation: TypeAlias = Literal["sum", "normalize_then_sum"]
_EPSILON = 1e-4


def normalized_sums(
    components: Sequence[Sequence[float | None]], weights: Sequence[float]
) -> list[float | None]:
    """The normalised rewards of one group; an entry of `components` is a completion's scores.

    A function that abstains on a completion adds nothing, which is the group's mean. One that gives
    all the same, or speaks of one alone, adds nothing to any. None where every function with a
    weight abstained.
    """
    columns = [_normalized([row[k] for row in components]) for k in range(len(weights))]
    sums: list[float | None] = []
    for i in range(len(components)):
        terms = [
            weight * value
            for weight, column in zip(weights, columns, strict=True)
            if weight != 0 and (value := column[i]) is not None
        ]
        sums.append(sum(terms) if terms else None)
    return sums


def _normalized(scores: Sequence[float | None]) -> list[float | None]:
    known = [score for score in scores if score is not None]
    if len(known) < 2:
        return [None if score is None else 0.0 for score in scores]
    mean, deviation = fmean(known), stdev(known)
    return [None if score is None else (score - mean) / (deviation + _EPSILON) for score in scores]
