"""What a round's groups say about themselves: rewards, lengths, contrast, and what was left out.

Names follow TRL where TRL has them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from statistics import fmean

from neat_align.rounds.completions import ORIGINS, Completion, CompletionGroup, Origin
from neat_align.rounds.ranking import BAD_ORIGINS
from neat_align.rounds.text_metrics import distinct_n

HUMAN_ORIGINS = frozenset({"chosen", "rejected"})
# The KL estimate of a token grows as e^gap: past this gap, in nats, it is held.
MAX_GAP = 20.0
# distinct-2 is over the round's first texts, so many at most: it falls with the number of texts,
# and the word pairs of all texts of a large round would not fit into memory.
DISTINCT_TEXTS = 2048


class RoundMeasures:
    """The metrics of a round, from one group after the other; nothing of a group is kept.

    Sums are exact, so the numbers do not depend on how a round is divided.
    """

    def __init__(self, reward_names: Sequence[str]) -> None:
        self.reward_names = tuple(reward_names)
        self.prompts = 0
        self._measured = 0
        self._sums: defaultdict[str, _ExactSum] = defaultdict(_ExactSum)
        self._squares = _ExactSum()
        self._abstained = _ExactSum()
        self._inverted, self._pairs = 0.0, 0
        self._texts: list[str] = []

    def add(self, group: CompletionGroup) -> None:
        """Take in a sampled, filtered and scored group, with or without a pair."""
        self.prompts += 1
        self._measured += any(c.policy_logprobs for c in group.completions)
        for completion in group.completions:
            self._add_completion(completion)
        gap = _reward_gap(group)
        if gap is not None:
            self._sums["contrast/reward_gap"].add(gap)
        inverted, pairs = _inversions(group)
        self._inverted += inverted
        self._pairs += pairs

    def _add_completion(self, c: Completion) -> None:
        sums, origin = self._sums, c.origin
        self._abstained.add(c.reward is None)
        if c.reward is not None:
            sums["reward"].add(c.reward)
            sums[f"reward/{origin}"].add(c.reward)
            self._squares.add(c.reward, power=2)
        for i in range(len(self.reward_names)):  # two rewards may have one name
            value = c.reward_components[i]
            if value is not None:
                sums[f"component {i}"].add(value)
        sums[f"completions/mean_length/{origin}"].add(len(c.token_ids))
        if origin not in HUMAN_ORIGINS:
            sums["completions/mean_length"].add(len(c.token_ids))
            sums["completions/clipped_ratio"].add(c.finish_reason == "length")
            if origin not in BAD_ORIGINS and len(self._texts) < DISTINCT_TEXTS:
                self._texts.append(c.text)
        if c.branch_at is not None:
            sums["sampling/branch_position"].add(c.branch_at)
            sums["branch tokens"].add(len(c.token_ids))
        if c.contrasts:
            sums[f"sampling/token_contrast/{origin}"].add(fmean(c.contrasts))
        if c.policy_logprobs:
            self._add_logprobs(c)

    def _add_logprobs(self, c: Completion) -> None:
        """Log-probabilities and KL per token of the plain prompt, in nats, by origin.

        `sampling/instruction_gap` is how much likelier the sampled tokens are under their own
        instruction than on the plain prompt, in nats per token.
        """
        sums, origin = self._sums, c.origin
        for value in c.policy_logprobs:
            sums[f"logps/{origin}"].add(value)
        if c.sampling_logprob:
            gap = (c.sampling_logprob - sum(c.policy_logprobs)) / len(c.policy_logprobs)
            sums[f"sampling/instruction_gap/{origin}"].add(gap)
        for kl in map(_k3, c.policy_logprobs, c.ref_logprobs):
            sums[f"kl/{origin}"].add(kl)

    def metrics(self, kept: int, removed: Counter[str]) -> dict[str, float]:
        """The round's metrics; numbers that do not exist are left out.

        `kept` groups of those taken in have a pair; `removed` counts filtered completions by
        reason. Rewards and lengths are over all groups; `logps`, `kl` and
        `sampling/instruction_gap` are over the first `round/measured_prompts`.
        """
        metrics: dict[str, float] = {
            "round/groups": kept,
            "round/prompts": self.prompts,
            "round/pair_fraction": kept / max(self.prompts, 1),
            "reward": self._mean("reward"),
            "reward_std": _std(self._sums["reward"], self._squares),
            "completions/mean_length": self._mean("completions/mean_length"),
            "completions/clipped_ratio": self._mean("completions/clipped_ratio"),
            "contrast/reward_gap": self._mean("contrast/reward_gap"),
            "contrast/inversion_rate": self._inverted / self._pairs if self._pairs else math.nan,
            "contrast/distinct2": distinct_n(self._texts),
        }
        if self._measured:
            metrics["round/measured_prompts"] = self._measured
        metrics["sampling/branch_position"] = self._mean("sampling/branch_position")
        metrics["sampling/branch_shared"] = metrics["sampling/branch_position"] / self._mean(
            "branch tokens"
        )
        if self.reward_names:
            metrics["rewards/abstained"] = self._abstained.mean() if self._abstained.count else 0.0
        for i, name in enumerate(self.reward_names):
            metrics[f"rewards/{name}/mean"] = self._mean(f"component {i}")
        for reason in ("empty", "duplicate", "leak"):
            metrics[f"removed/{reason}"] = removed[reason]
        by_origin = (
            "reward",
            "completions/mean_length",
            "logps",
            "sampling/instruction_gap",
            "sampling/token_contrast",
            "kl",
        )
        for origin in ORIGINS:
            for name in by_origin:
                metrics[f"{name}/{origin}"] = self._mean(f"{name}/{origin}")
        return {name: float(value) for name, value in metrics.items() if not math.isnan(value)}

    def _mean(self, name: str) -> float:
        return self._sums[name].mean()


class _ExactSum:
    """A sum without rounding, in a few integers: the mean is that of `statistics.fmean`."""

    def __init__(self) -> None:
        self.count = 0
        self._numerators: defaultdict[int, int] = defaultdict(int)  # by denominator

    def add(self, value: float, power: int = 1) -> None:
        numerator, denominator = value.as_integer_ratio()
        self.count += 1
        self._numerators[denominator**power] += numerator**power

    def total(self) -> Fraction:
        return sum((Fraction(n, d) for d, n in self._numerators.items()), Fraction())

    def mean(self) -> float:
        return float(self.total()) / self.count if self.count else math.nan


def _std(values: _ExactSum, squares: _ExactSum) -> float:
    """The population's standard deviation, of two values or more.

    Σx² − (Σx)²/n loses everything to rounding in floating point; these sums are exact.
    """
    n = values.count
    if n < 2:
        return math.nan
    return math.sqrt((squares.total() - values.total() ** 2 / n) / n)


def inversion_rate(groups: Iterable[CompletionGroup]) -> float:
    """Share of (positive, negative) pairs of one prompt in which the negative is rewarded more.

    Ties count half; NaN without pairs.
    """
    inverted, pairs = 0.0, 0
    for group in groups:
        more = _inversions(group)
        inverted, pairs = inverted + more[0], pairs + more[1]
    return inverted / pairs if pairs else math.nan


def _inversions(group: CompletionGroup) -> tuple[float, int]:
    """How many of the group's (positive, negative) pairs are inverted, and how many there are."""
    good, bad = _rewards_of(group, "positive"), _rewards_of(group, "negative")
    return inversions(good, bad), len(good) * len(bad)


def inversions(good: Sequence[float], bad: Sequence[float]) -> float:
    """In how many (good, bad) pairs of rewards the bad one is higher; ties count half."""
    return sum((b > a) + 0.5 * (b == a) for a in good for b in bad)


def _reward_gap(group: CompletionGroup) -> float | None:
    """Mean reward of the positives − mean reward of the negatives; None without one of the two."""
    good, bad = _rewards_of(group, "positive"), _rewards_of(group, "negative")
    return fmean(good) - fmean(bad) if good and bad else None


def _rewards_of(group: CompletionGroup, origin: Origin) -> list[float]:
    own = [c.reward for c in group.completions if c.origin == origin]
    return [reward for reward in own if reward is not None]


def _k3(policy: float, ref: float) -> float:
    """Schulman's estimate of KL(policy ‖ start) from one token: r − 1 − ln r, r = p_start / p."""
    gap = min(ref - policy, MAX_GAP)
    return math.exp(gap) - gap - 1
