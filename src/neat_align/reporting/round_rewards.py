"""What a page needs of a round's rewards, from one pass over its groups: none of them is kept."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, quantiles, stdev
from typing import TypeAlias

from neat_align.rounds.completions import CompletionGroup, Origin
from neat_align.rounds.group_file import without_tokens
from neat_align.rounds.metrics import inversions

# The texts of a positive and of a negative instruction.
InstructionPair: TypeAlias = tuple[str, str]
# Points of a strip beside its box: more say nothing more, and weigh on the page.
_STRIP_POINTS = 80


@dataclass(frozen=True)
class Box:
    """A round's rewards: percentiles 5, 25, 50, 75 and 95, and a share of the values."""

    name: str
    count: int
    percentiles: tuple[float, float, float, float, float]
    strip: tuple[float, ...]


@dataclass(frozen=True)
class OriginRewards:
    """The rewards of a round's completions of one origin.

    `lowest` and `highest` are of all; `spread` is the mean over prompts minus and plus one standard
    error, None for fewer than two prompts.
    """

    box: Box
    lowest: float
    highest: float
    spread: tuple[float, float] | None


@dataclass
class PairRewards:
    """What a pair of instructions did: each prompt's mean reward under the positive and under the
    negative one, and how many of its (positive, negative) answers are inverted.
    """

    good: array[float] = field(default_factory=lambda: array("d"))
    bad: array[float] = field(default_factory=lambda: array("d"))
    inverted: float = 0.0
    answers: int = 0

    def add_prompt(self, good: Sequence[float], bad: Sequence[float]) -> None:
        """Take in the rewards of a prompt's answers under each of the two."""
        self.good.append(fmean(good))
        self.bad.append(fmean(bad))
        self.inverted += inversions(good, bad)
        self.answers += len(good) * len(bad)

    def add(self, other: PairRewards) -> None:
        """Take in the prompts of another round."""
        self.good.extend(other.good)
        self.bad.extend(other.bad)
        self.inverted += other.inverted
        self.answers += other.answers

    @property
    def gaps(self) -> list[float]:
        """Each prompt's positive − negative."""
        return [g - b for g, b in zip(self.good, self.bad, strict=True)]


@dataclass(frozen=True)
class RoundRewards:
    """A round's rewards by origin, and by pair of instructions in the order they were met."""

    by_origin: Mapping[Origin, OriginRewards]
    by_pair: Mapping[InstructionPair, PairRewards]


def rewards_of(groups: Iterable[CompletionGroup]) -> RoundRewards:
    """The rewards of a round, 8 bytes a reward while it is read."""
    values: defaultdict[Origin, array[float]] = defaultdict(lambda: array("d"))
    means: defaultdict[Origin, array[float]] = defaultdict(lambda: array("d"))
    pairs: dict[InstructionPair, PairRewards] = {}
    for group in without_tokens(groups):
        of_group: defaultdict[Origin, list[float]] = defaultdict(list)
        sides: defaultdict[tuple[Origin, str], list[float]] = defaultdict(list)
        for c in group.completions:
            if c.reward is None:
                continue
            of_group[c.origin].append(c.reward)
            if c.instruction is not None:
                sides[c.origin, c.instruction].append(c.reward)
        for origin, rewards in of_group.items():
            values[origin].extend(rewards)
            # The completions of one prompt are not independent draws, so they count as one.
            means[origin].append(fmean(rewards))
        for (origin, positive), good in sides.items():
            for (other, negative), bad in sides.items():
                if (origin, other) == ("positive", "negative"):
                    pairs.setdefault((positive, negative), PairRewards()).add_prompt(good, bad)
    by_origin = {
        origin: OriginRewards(
            box_of("", rewards), min(rewards), max(rewards), spread_of_mean(means[origin])
        )
        for origin, rewards in values.items()
    }
    return RoundRewards(by_origin, pairs)


def box_of(name: str, values: Sequence[float]) -> Box:
    """The box of some values, one at least."""
    cuts = quantiles(values, n=20, method="inclusive") if len(values) > 1 else [values[0]] * 19
    strip = sorted(values)[:: math.ceil(len(values) / _STRIP_POINTS)]
    return Box(name, len(values), (cuts[0], cuts[4], cuts[9], cuts[14], cuts[18]), tuple(strip))


def spread_of_mean(values: Sequence[float], errors: float = 1.0) -> tuple[float, float] | None:
    """The mean minus and plus so many standard errors; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, half = fmean(values), errors * stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half
