"""The numbers of a probe: what an instruction bank's pairs did to the rewards of the answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal, TypeAlias

from neat_align.evaluation.statistics import (
    PairedDifference,
    cohens_d,
    mean_of,
    paired_bootstrap,
)
from neat_align.prompts.instruction_banks import InstructionPair, Polarity
from neat_align.prompts.placement import Placement
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.filters import leaks_instruction
from neat_align.rounds.metrics import inversion_rate
from neat_align.rounds.text_metrics import distinct_n

Verdict: TypeAlias = Literal["strong", "works", "no contrast", "reversed", "too few"]
# With fewer prompts a bootstrap interval is too narrow to mean anything: of three differences, one
# set in four has one sign.
MIN_PROMPTS = 8
# A large effect in Cohen's own words: about five positives in seven then beat a negative of their
# prompt.
STRONG_D = 0.8


@dataclass(frozen=True)
class Side:
    """The answers under one instruction (None: the plain prompt).

    Rates are shares of the answers, leaks and blanks included. `reward` is the mean over answers
    with one, None when there is none; `mean_length` is in tokens, end of turn included; `clipped`
    is the share cut at the longest length. `logprob` is how likely the answers are under the
    **plain** prompt: the mean over answers of each one's mean log-probability a token, in nats.
    """

    instruction: str | None
    reward: float | None
    leaks: float
    blanks: float
    mean_length: float
    clipped: float
    logprob: float


@dataclass(frozen=True)
class PairProbe:
    """One pair at one placement. `number` is its place in the bank, from 1.

    `gaps` is, for each prompt, the mean reward of its positives minus that of its negatives (None
    where one has no reward); `gap` is their mean and its 95 % bootstrap interval over prompts.
    `cohens_d` is the difference of the means in units of the pooled standard deviation over
    answers, None where that is 0 or unknown. `inversion_rate` is the share of (positive, negative)
    pairs of one prompt whose negative has the higher reward; ties count half.
    """

    number: int
    placement: Placement
    verdict: Verdict
    positive: Side
    plain: Side
    negative: Side
    gaps: tuple[float | None, ...]
    gap: PairedDifference | None
    cohens_d: float | None
    inversion_rate: float | None

    @property
    def length_difference(self) -> float:
        """How many tokens longer the negatives are than the positives."""
        return self.negative.mean_length - self.positive.mean_length

    @property
    def likelihood_difference(self) -> float:
        """How much likelier the negatives are than the positives, nats per token.

        Under the plain prompt; below 0: less likely.
        """
        return self.negative.logprob - self.positive.logprob

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a file."""
        return asdict(self) | {
            "length_difference": self.length_difference,
            "likelihood_difference": self.likelihood_difference,
        }


@dataclass(frozen=True)
class PlacementProbe:
    """A whole bank at one placement.

    A run draws one pair a prompt, so this is the contrast that it would see. `gap` is the mean over
    prompts of the mean gap over pairs, with its 95 % interval; None without any reward.
    """

    placement: Placement
    gaps: tuple[float | None, ...]
    gap: PairedDifference | None


@dataclass(frozen=True)
class DecodingProbe:
    """The prompts answered from q ∝ p0 · [p0(+) / p0(−)]^alpha, with the pairs at one placement.

    `effects` is, for each prompt, the mean reward of these answers minus that of its plain ones
    (None where one has no reward); `effect` is their mean and its 95 % bootstrap interval over
    prompts. `kl` is KL(q ‖ p0) in nats per token, exact at every token that was drawn and averaged
    over them, of the untempered distributions. `distinct2` is the share of distinct word pairs over
    all of the answers, None where they have none; `plain_distinct2` that of the plain ones. Leaks
    are of the positive instructions that a prompt was given.
    """

    placement: Placement
    alpha: float
    answers: Side
    plain: Side
    effects: tuple[float | None, ...]
    effect: PairedDifference | None
    kl: float
    distinct2: float | None
    plain_distinct2: float | None


@dataclass(frozen=True)
class Probe:
    """A bank's pairs and placements, each with the largest gap first.

    `decodings` are in the order of the placements and alphas that were asked for.
    """

    prompt_ids: tuple[str, ...]
    pairs: tuple[PairProbe, ...]
    placements: tuple[PlacementProbe, ...]
    decodings: tuple[DecodingProbe, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a file."""
        return {
            "prompt_ids": list(self.prompt_ids),
            "placements": [asdict(placement) for placement in self.placements],
            "pairs": [pair.to_json() for pair in self.pairs],
            "decodings": [asdict(decoding) for decoding in self.decodings],
        }


def verdict_of(
    difference: PairedDifference | None, prompts: int, cohens_d: float | None
) -> Verdict:
    """The pair in a word, from its gap over that many prompts.

    - `too few`: under 8 prompts have a reward on both sides; no interval over so few means
      anything.
    - `reversed`: the whole 95 % interval is below 0, the negatives are the better answers.
    - `no contrast`: the interval includes 0.
    - `works`: the whole interval is above 0.
    - `strong`: it is, and Cohen's d is 0.8 or more (or there is no spread at all).

    Each interval stands alone: of 20 pairs without any contrast one is expected to seem to have
    one, either way round.
    """
    if difference is None or prompts < MIN_PROMPTS:
        return "too few"
    if difference.high < 0:
        return "reversed"
    if difference.low <= 0:
        return "no contrast"
    return "strong" if cohens_d is None or cohens_d >= STRONG_D else "works"


def summarise_pair(
    groups: Sequence[CompletionGroup],
    number: int,
    placement: Placement,
    pair: InstructionPair,
    *,
    seed: int,
) -> PairProbe:
    """The numbers of one pair from its answers.

    One group a prompt, with positive, negative and plain completions.
    """
    good, plain, bad = _of(groups, "positive"), _of(groups, "plain"), _of(groups, "negative")
    positive, negative = means_of(good), means_of(bad)
    gaps = [
        None if a is None or b is None else a - b for a, b in zip(positive, negative, strict=True)
    ]
    difference = paired_bootstrap(negative, positive, seed=seed)
    d = cohens_d(_rewards(good), _rewards(bad))
    return PairProbe(
        number=number,
        placement=placement,
        verdict=verdict_of(difference, sum(gap is not None for gap in gaps), d),
        positive=side_of(good, pair.positive),
        plain=side_of(plain, None),
        negative=side_of(bad, pair.negative),
        gaps=tuple(gaps),
        gap=difference,
        cohens_d=d,
        inversion_rate=inversion_rate(groups) if difference is not None else None,
    )


def _of(groups: Sequence[CompletionGroup], origin: Polarity) -> list[list[Completion]]:
    return [[c for c in g.completions if c.origin == origin] for g in groups]


def means_of(by_prompt: Sequence[Sequence[Completion]]) -> list[float | None]:
    """Each prompt's mean reward over its answers that have one."""
    return [mean_of([c.reward for c in mine]) for mine in by_prompt]


def _rewards(by_prompt: Sequence[Sequence[Completion]]) -> list[float]:
    return [c.reward for mine in by_prompt for c in mine if c.reward is not None]


def side_of(by_prompt: Sequence[Sequence[Completion]], instruction: str | None) -> Side:
    """The answers to all prompts in numbers."""
    completions = [c for mine in by_prompt for c in mine]
    return Side(
        instruction=instruction,
        reward=mean_of([c.reward for c in completions]),
        leaks=fmean(leaks_instruction(c.text, instruction) for c in completions),
        blanks=fmean(not c.text.strip() for c in completions),
        mean_length=fmean(len(c.token_ids) for c in completions),
        clipped=fmean(c.finish_reason == "length" for c in completions),
        logprob=fmean(fmean(c.policy_logprobs) for c in completions),
    )


def summarise_placement(
    pairs: Sequence[PairProbe], placement: Placement, *, seed: int
) -> PlacementProbe:
    """The numbers of a bank at one placement from those of its pairs there."""
    gaps = tuple(mean_of(of_prompt) for of_prompt in zip(*(p.gaps for p in pairs), strict=True))
    return PlacementProbe(placement, gaps, paired_bootstrap([0.0] * len(gaps), gaps, seed=seed))


def summarise_decoding(
    plain: Sequence[Sequence[Completion]],
    answers: Sequence[Sequence[Completion]],
    divergences: Sequence[float],
    instructions: Sequence[Sequence[str]],
    placement: Placement,
    alpha: float,
    *,
    seed: int,
) -> DecodingProbe:
    """The numbers of answers decoded from the contrast, beside the plain ones.

    `plain` and `answers` have a list a prompt, `instructions` the positive ones that it was given;
    `divergences` has each answer's KL summed over its tokens, in order.
    """
    before, after = means_of(plain), means_of(answers)
    leaks = [
        any(leaks_instruction(c.text, instruction) for instruction in given)
        for mine, given in zip(answers, instructions, strict=True)
        for c in mine
    ]
    return DecodingProbe(
        placement=placement,
        alpha=alpha,
        answers=replace(side_of(answers, None), leaks=fmean(leaks)),
        plain=side_of(plain, None),
        effects=tuple(
            None if b is None or a is None else a - b for b, a in zip(before, after, strict=True)
        ),
        effect=paired_bootstrap(before, after, seed=seed),
        kl=sum(divergences) / sum(len(c.token_ids) for mine in answers for c in mine),
        distinct2=_distinct2(answers),
        plain_distinct2=_distinct2(plain),
    )


def _distinct2(by_prompt: Sequence[Sequence[Completion]]) -> float | None:
    share = distinct_n(c.text for mine in by_prompt for c in mine)
    return None if math.isnan(share) else share
