"""Answers that branch: a plain answer is kept up to a token, and continued under an instruction.

    plain      y_0 … y_{t*-1} | y_t* …
    positive   y_0 … y_{t*-1} | a continuation under the positive instruction
    negative   y_0 … y_{t*-1} | a continuation under the negative instruction

t* is the token of the plain answer with the highest contrast, |e_t|:

    e_t = log p(y_t | x, +, y_<t) − log p(y_t | x, −, y_<t)

where the two instructions disagree most about what the policy said by itself. Up to there every
branch is on-policy for the plain prompt, and what a pair of branches differs in comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neat_align.prompts.instruction_banks import Contrasted


@dataclass(frozen=True, slots=True)
class Branch:
    """Where a plain answer branches.

    `answer` holds the plain answer's tokens, of which the first `kept` are kept. `positive` and
    `negative` are the kept tokens' log-probabilities under each instruction: sums, in nats, 0
    where nothing is kept.
    """

    answer: tuple[int, ...]
    kept: int
    positive: float
    negative: float

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that are kept."""
        return self.answer[: self.kept]

    def logprob(self, polarity: Contrasted) -> float:
        """The kept tokens' log-probability under the instruction of this polarity, in nats."""
        return self.positive if polarity == "positive" else self.negative


def branch(answer: Sequence[int], positive: Sequence[float], negative: Sequence[float]) -> Branch:
    """Where an answer branches, from its tokens' log-probabilities under both instructions.

    Before the token with the largest |e_t|, the first of equal ones. So it never keeps its end of
    turn, and at least one token can follow. Numbers are in nats, one a token; none may be NaN.
    """
    contrast = [abs(p - n) for p, n in zip(positive, negative, strict=True)]
    kept = max(range(len(answer)), key=contrast.__getitem__, default=0)
    return Branch(tuple(answer), kept, math.fsum(positive[:kept]), math.fsum(negative[:kept]))


def answer_to_branch(index: int, num_plain: int) -> int:
    """Which plain answer the completion of this index branches from.

    The same for a positive and a negative of one index: the two are a pair that shares its prefix.
    """
    return index % num_plain
