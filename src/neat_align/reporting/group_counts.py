"""The groups of a round in numbers: how many, and the mean rewards by origin."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from neat_align.rounds.completions import ORIGINS, CompletionGroup, Origin
from neat_align.rounds.group_file import GroupFile, without_tokens
from neat_align.rounds.metrics import inversions


@dataclass
class Mean:
    """A mean of what is added; None values are not."""

    total: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float | None:
        """None without a value."""
        return self.total / self.count if self.count else None

    def add(self, value: float | None) -> None:
        """Take a value in."""
        if value is not None:
            self.total += value
            self.count += 1


@dataclass
class Counts:
    """A round in numbers: sums over its groups. Pairs are (positive, negative)."""

    groups: int = 0
    answers: Counter[Origin] = field(default_factory=Counter)
    rewards: defaultdict[Origin, Mean] = field(default_factory=lambda: defaultdict(Mean))
    inverted: float = 0.0
    pairs: int = 0
    # Of several: by origin and by the reward's place.
    reward_names: Sequence[str] = ()
    single: defaultdict[tuple[Origin, int], Mean] = field(default_factory=lambda: defaultdict(Mean))


def counts_of(groups: Sequence[CompletionGroup]) -> Counts:
    """The numbers of a round, from one pass over its groups."""
    names = reward_names(groups)
    counts = Counts(reward_names=names if len(names) > 1 else ())
    for group in without_tokens(groups):
        counts.groups += 1
        of: dict[Origin, list[float]] = {origin: [] for origin in ORIGINS}
        for c in group.completions:
            counts.answers[c.origin] += 1
            for i, value in enumerate(c.reward_components if counts.reward_names else ()):
                counts.single[c.origin, i].add(value)
            counts.rewards[c.origin].add(c.reward)
            if c.reward is not None:
                of[c.origin].append(c.reward)
        good, bad = of["positive"], of["negative"]
        counts.inverted += inversions(good, bad)
        counts.pairs += len(good) * len(bad)
    return counts


def reward_names(groups: Sequence[CompletionGroup]) -> list[str]:
    """Names of the rewards behind `reward_components`; none where the groups come from no file."""
    return groups.reward_names if isinstance(groups, GroupFile) else []
