"""What a run's groups say: rewards by origin, and which instructions make a contrast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from neat_align.evaluation.statistics import mean_interval
from neat_align.reporting.charts import BoxChart
from neat_align.reporting.round_rewards import InstructionPair, PairRewards
from neat_align.reporting.run_files import RoundGroups, RunContents
from neat_align.rounds.completions import ORIGINS

# Fewer prompts than this have no interval: resampling a handful says nothing.
FEW_PROMPTS = 5
# Rounds side by side; of a longer run these many, evenly spaced, with the first and the last.
SHOWN_ROUNDS = 8
_RESAMPLES = 4000


# ---- distributions -------------------------------------------------------------------------------


def distributions(run: RunContents) -> list[BoxChart]:
    """One chart an origin: the rewards of each round's completions, all on one scale."""
    rounds = _spaced(run.rounds)
    names = tuple(round_label(r) for r in rounds)
    found = [r for shown in rounds for r in shown.rewards.by_origin.values()]
    if not found:
        return []
    span = (min(r.lowest for r in found), max(r.highest for r in found))
    charts = []
    for o in ORIGINS:
        boxes = tuple(
            replace(r.rewards.by_origin[o].box, name=name)
            for name, r in zip(names, rounds, strict=True)
            if o in r.rewards.by_origin
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
    pairs: dict[InstructionPair, PairRewards] = {}
    for r in run.rounds:
        for pair, rewards in r.rewards.by_pair.items():
            pairs.setdefault(pair, PairRewards()).add(rewards)
    last = run.rounds[-1].rewards.by_pair if run.rounds else {}
    rows = [_instruction_row(pair, found, last.get(pair)) for pair, found in pairs.items()]
    return sorted(rows, key=lambda row: -row.gap)


def _instruction_row(
    pair: InstructionPair, found: PairRewards, last: PairRewards | None
) -> InstructionRow:
    gaps = found.gaps
    ends = mean_interval(gaps, resamples=_RESAMPLES) if len(gaps) >= FEW_PROMPTS else None
    return InstructionRow(
        positive=pair[0],
        negative=pair[1],
        prompts=len(gaps),
        under_positive=fmean(found.good),
        under_negative=fmean(found.bad),
        gap=fmean(gaps),
        low=ends[0] if ends else None,
        high=ends[1] if ends else None,
        inversion=found.inverted / found.answers,
        last_gap=fmean(last.gaps) if last else None,
    )
