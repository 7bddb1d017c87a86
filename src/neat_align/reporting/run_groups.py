"""What a run's groups say: rewards by origin, and which instructions make a contrast."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from neat_align.evaluation.statistics import mean_interval
from neat_align.reporting.charts import BoxChart, box_of
from neat_align.reporting.run_files import RoundGroups, RunContents
from neat_align.rounds.completions import ORIGINS, CompletionGroup, Origin
from neat_align.rounds.metrics import inversion_rate, reward_gap

# Fewer prompts than this have no interval: resampling a handful says nothing.
FEW_PROMPTS = 5
# Rounds side by side; of a longer run these many, evenly spaced, with the first and the last.
SHOWN_ROUNDS = 8
_RESAMPLES = 4000


def spread_of_mean(values: Sequence[float], errors: float = 1.0) -> tuple[float, float] | None:
    """The mean minus and plus so many standard errors; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, half = fmean(values), errors * stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def prompt_means(groups: Iterable[CompletionGroup], origin: Origin) -> list[float]:
    """Each prompt's mean reward of an origin.

    The completions of one prompt are not independent draws, so they count as one.
    """
    rewards = (_rewards([g], origin) for g in groups)
    return [fmean(values) for values in rewards if values]


def _rewards(groups: Iterable[CompletionGroup], origin: Origin) -> list[float]:
    return [
        c.reward
        for g in groups
        for c in g.completions
        if c.origin == origin and c.reward is not None
    ]


# ---- distributions -------------------------------------------------------------------------------


def distributions(run: RunContents) -> list[BoxChart]:
    """One chart an origin: the rewards of each round's completions, all on one scale."""
    rounds = _spaced(run.rounds)
    names = tuple(round_label(r) for r in rounds)
    rewards = {o: [_rewards(r.groups, o) for r in rounds] for o in ORIGINS}
    everything = [v for by_round in rewards.values() for values in by_round for v in values]
    if not everything:
        return []
    span = (min(everything), max(everything))
    charts = []
    for o, by_round in rewards.items():
        boxes = tuple(
            box_of(name, values) for name, values in zip(names, by_round, strict=True) if values
        )
        if boxes:
            charts.append(BoxChart(o, "reward of each completion", o, names, boxes, span))
    return charts


def round_label(r: RoundGroups) -> str:
    """A round's number as a reader writes it."""
    return r.name.lstrip("0") or "0"


def _spaced(rounds: Sequence[RoundGroups]) -> list[RoundGroups]:
    if len(rounds) <= SHOWN_ROUNDS:
        return list(rounds)
    return [rounds[round(i * (len(rounds) - 1) / (SHOWN_ROUNDS - 1))] for i in range(SHOWN_ROUNDS)]


# ---- instructions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class InstructionRow:
    """What a pair of instructions did to the reward, over all prompts that it was drawn for.

    `gap` is the mean over prompts of (mean reward under the positive − mean reward under the
    negative), `low` and `high` its 95 % interval, None for few prompts; `inversion` the share of
    (positive, negative) answers in which the negative is ahead; `last_gap` the gap in the last
    round, None where that round did not draw the pair.
    """

    positive: str
    negative: str
    prompts: int
    under_positive: float
    under_negative: float
    gap: float
    low: float | None
    high: float | None
    inversion: float
    last_gap: float | None

    @property
    def verdict(self) -> str:
        """`ahead` where the contrast is shown, `behind` where it is shown to be inverted, else
        `even`.
        """
        if self.low is not None and self.low > 0:
            return "ahead"
        return "behind" if self.high is not None and self.high < 0 else "even"


def instruction_rows(run: RunContents) -> list[InstructionRow]:
    """Every pair of instructions with rewards on both sides, the largest gap first."""
    groups_of: dict[tuple[str, str], list[tuple[int, CompletionGroup]]] = {}
    for i, r in enumerate(run.rounds):
        for group in r.groups:
            for pair in _pairs_of(group):
                groups_of.setdefault(pair, []).append((i, _only(group, pair)))
    last = len(run.rounds) - 1
    rows = [_instruction_row(pair, groups, last) for pair, groups in groups_of.items()]
    return sorted(rows, key=lambda row: -row.gap)


def _pairs_of(group: CompletionGroup) -> list[tuple[str, str]]:
    scored = [c for c in group.completions if c.reward is not None and c.instruction is not None]
    sides = [
        dict.fromkeys(c.instruction or "" for c in scored if c.origin == origin)
        for origin in ("positive", "negative")
    ]
    return [(positive, negative) for positive in sides[0] for negative in sides[1]]


def _only(group: CompletionGroup, pair: tuple[str, str]) -> CompletionGroup:
    sides = (("positive", pair[0]), ("negative", pair[1]))
    kept = [c for c in group.completions if (c.origin, c.instruction) in sides]
    return replace(group, completions=tuple(kept))


def _instruction_row(
    pair: tuple[str, str], groups_by_round: list[tuple[int, CompletionGroup]], last: int
) -> InstructionRow:
    groups = [group for _, group in groups_by_round]
    good, bad = prompt_means(groups, "positive"), prompt_means(groups, "negative")
    gaps = [g - b for g, b in zip(good, bad, strict=True)]
    ends = mean_interval(gaps, resamples=_RESAMPLES) if len(gaps) >= FEW_PROMPTS else None
    recent = [group for i, group in groups_by_round if i == last]
    return InstructionRow(
        positive=pair[0],
        negative=pair[1],
        prompts=len(groups),
        under_positive=fmean(good),
        under_negative=fmean(bad),
        gap=reward_gap(groups),
        low=ends[0] if ends else None,
        high=ends[1] if ends else None,
        inversion=inversion_rate(groups),
        last_gap=reward_gap(recent) if recent else None,
    )
