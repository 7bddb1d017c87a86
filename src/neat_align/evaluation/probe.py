"""How strongly each pair of an instruction bank moves the reward of one model's answers, before
anything is trained.

The same prompts are answered under every positive and negative instruction and plainly, with the
same random numbers, so that what differs is the instruction alone. Nothing is filtered: leaks and
blanks, which training drops, are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal, TypeAlias

from neat_align.errors import ConfigError, DataError
from neat_align.evaluation.statistics import (
    PairedDifference,
    cohens_d,
    mean_of,
    paired_bootstrap,
)
from neat_align.prompts.instruction_banks import InstructionBank, InstructionPair, Polarity
from neat_align.prompts.placement import Placement, instructed
from neat_align.prompts.rendering import prompt_ids
from neat_align.prompts.rows import Prompt, PromptRow
from neat_align.prompts.seeds import completion_seed
from neat_align.rewards.contrast import ContrastReward
from neat_align.rewards.protocol import NamedReward
from neat_align.rewards.scoring import score_answers
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.filters import leaks_instruction
from neat_align.rounds.metrics import inversion_rate
from neat_align.rounds.params import LogprobFunction, Progress, progress_counter
from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, SamplingParams

Verdict: TypeAlias = Literal["strong", "works", "no contrast", "reversed", "too few"]
# Rounds count from 0 and evaluation is -1: a probe's seeds are apart from both.
PROBE_ROUND = -2
# With fewer prompts a bootstrap interval is too narrow to mean anything: of three differences, one
# set in four has one sign.
MIN_PROMPTS = 8
# A large effect in Cohen's own words: about five positives in seven then beat a negative of their
# prompt.
STRONG_D = 0.8
# Prompts whose log-probabilities are computed at once; between two such shares the progress is
# reported.
LIKELIHOOD_PROMPTS = 4


@dataclass(frozen=True)
class ProbeParams:
    """What is sampled: `samples` answers to every prompt under each instruction, with the
    instruction at each placement.
    """

    placements: tuple[Placement, ...]
    sampling: SamplingParams
    samples: int = 2
    seed: int = 0


@dataclass(frozen=True)
class ProbeTools:
    """Who does the work. `rewards` None scores with the contrast of the very pair that is probed
    (`ContrastReward`).

    `max_prompt_length` is the longest prompt in tokens, instruction included, that leaves room for
    an answer; None: no limit.
    """

    tokenizer: Any
    sampler: Sampler
    logprobs: LogprobFunction
    rewards: tuple[NamedReward, ...] | None
    max_prompt_length: int | None = None


@dataclass(frozen=True)
class Side:
    """The answers under one instruction (None: the plain prompt). Rates are shares of the answers,
    leaks and blanks included.

    `reward` is the mean over answers with one, None when there is none; `mean_length` is in tokens,
    end of turn included; `clipped` is the share cut at the longest length. `logprob` is how likely
    the answers are under the **plain** prompt: the mean over answers of each one's mean
    log-probability a token, in nats.
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
        """How much likelier the negatives are under the plain prompt than the positives, nats per
        token; below 0: less likely.
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
    """A whole bank at one placement: a run draws one pair a prompt, so this is the contrast that it
    would see.

    `gap` is the mean over prompts of the mean gap over pairs, with its 95 % interval; None without
    any reward.
    """

    placement: Placement
    gaps: tuple[float | None, ...]
    gap: PairedDifference | None


@dataclass(frozen=True)
class Probe:
    """Everything that was found. Pairs and placements come with the largest gap first."""

    prompt_ids: tuple[str, ...]
    pairs: tuple[PairProbe, ...]
    placements: tuple[PlacementProbe, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a file."""
        return {
            "prompt_ids": list(self.prompt_ids),
            "placements": [asdict(placement) for placement in self.placements],
            "pairs": [pair.to_json() for pair in self.pairs],
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


def probe_bank(
    rows: Sequence[PromptRow],
    bank: InstructionBank,
    params: ProbeParams,
    tools: ProbeTools,
    progress: Progress | None = None,
) -> Probe:
    """Answer the prompts under every instruction of the bank at every placement, score the answers,
    and compare the sides.

    `progress` is called with (stage, finished, of how many); the stages are sample, likelihood and
    score. Raises ConfigError for fewer than 8 different prompts, DataError for a prompt that leaves
    no room for an answer; what the sampler, the instructions and the rewards raise comes through.
    """
    rows = list(
        {row.id: row for row in rows}.values()
    )  # a row that came twice would get equal answers, and count twice
    if len(rows) < MIN_PROMPTS:
        raise ConfigError(
            f"a probe needs {MIN_PROMPTS} different prompts or more and got {len(rows)}: an "
            "interval over fewer means nothing; give it more"
        )
    plan = _planned(rows, bank, params, tools)
    answers = _answered(plan, params, tools, progress)
    if progress is not None:
        progress("score", 0, 1)
    if tools.rewards is not None:
        answers = _scored(rows, [plan.of_row(r) for r in range(len(rows))], answers, tools.rewards)
    pairs: list[PairProbe] = []
    for (placement, number), asked in plan.instructed.items():
        pair = bank.pairs[number - 1]
        if tools.rewards is None:  # a reward of its own for every pair, of the plain answers too
            wanted = [
                [*plan.plain[r], *asked[r]["positive"], *asked[r]["negative"]]
                for r in range(len(rows))
            ]
            answers = _scored(rows, wanted, answers, (_own_contrast(pair, placement, tools),))
        sides = [_completions(answers, plan.plain[r], "plain", None) for r in range(len(rows))]
        for polarity, instruction in _instructions(pair):
            for r in range(len(rows)):
                sides[r] += _completions(answers, asked[r][polarity], polarity, instruction)
        groups = [
            CompletionGroup(row.id, row.prompt, plan.plain_ids[r], tuple(sides[r]))
            for r, row in enumerate(rows)
        ]
        pairs.append(summarise(groups, number, placement, pair, seed=params.seed))
    if progress is not None:
        progress("score", 1, 1)
    placements = [
        _placement([p for p in pairs if p.placement == placement], placement, params.seed)
        for placement in params.placements
    ]
    return Probe(
        prompt_ids=tuple(row.id for row in rows),
        pairs=tuple(sorted(pairs, key=_gap_first)),
        placements=tuple(sorted(placements, key=_gap_first)),
    )


def _gap_first(found: PairProbe | PlacementProbe) -> tuple[bool, float]:
    return found.gap is None, 0.0 if found.gap is None else -found.gap.delta


# ---- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What is to be drawn; every list has one entry a row.

    `instructed` goes by placement, pair number and polarity.
    """

    plain_ids: list[tuple[int, ...]]
    plain: list[list[SampleRequest]]
    instructed: dict[tuple[Placement, int], list[dict[Polarity, list[SampleRequest]]]]

    def of_row(self, r: int) -> list[SampleRequest]:
        """Every request of a row, each once: what two pairs have in common is drawn once."""
        sides = [side for asked in self.instructed.values() for side in asked[r].values()]
        return list(dict.fromkeys([*self.plain[r], *(q for side in sides for q in side)]))


def _instructions(pair: InstructionPair) -> tuple[tuple[Polarity, str], ...]:
    return ("positive", pair.positive), ("negative", pair.negative)


def _planned(
    rows: Sequence[PromptRow], bank: InstructionBank, params: ProbeParams, tools: ProbeTools
) -> _Plan:
    def requests(row: PromptRow, ids: list[int], what: str = "") -> list[SampleRequest]:
        if tools.max_prompt_length is not None and len(ids) > tools.max_prompt_length:
            raise DataError(
                f"{row.where}: the prompt{what} is {len(ids)} tokens, and the model's context "
                f"leaves {tools.max_prompt_length} for it "
                "beside the answer: lower max_completion_length, or drop the row; prompts are "
                "never cut"
            )
        # The origin is left out of the seed: whatever the instruction, a prompt's n-th answer is
        # drawn with the same numbers.
        return [
            SampleRequest(tuple(ids), completion_seed(params.seed, PROBE_ROUND, row.id, "probe", i))
            for i in range(params.samples)
        ]

    def under(
        row: PromptRow, pair: InstructionPair, placement: Placement
    ) -> dict[Polarity, list[SampleRequest]]:
        sides: dict[Polarity, list[SampleRequest]] = {}
        for polarity, instruction in _instructions(pair):
            ids = prompt_ids(tools.tokenizer, *instructed(row.prompt, instruction, placement))
            sides[polarity] = requests(row, ids, f" with {instruction!r} on it ({placement})")
        return sides

    plain_ids = [prompt_ids(tools.tokenizer, row.prompt) for row in rows]
    return _Plan(
        plain_ids=[tuple(ids) for ids in plain_ids],
        plain=[requests(row, ids) for row, ids in zip(rows, plain_ids, strict=True)],
        instructed={
            (placement, number): [under(row, pair, placement) for row in rows]
            for placement in params.placements
            for number, pair in enumerate(bank.pairs, start=1)
        },
    )


def _answered(
    plan: _Plan, params: ProbeParams, tools: ProbeTools, progress: Progress | None
) -> dict[SampleRequest, Completion]:
    """The plan's answers, with their log-probabilities under the plain prompt, by request;
    `_completions` says of which side they are.
    """
    by_row = [plan.of_row(r) for r in range(len(plan.plain))]
    requests = [q for mine in by_row for q in mine]
    # One call for all of it, so that the batches are full.
    samples = dict(
        zip(
            requests,
            tools.sampler.sample(
                requests,
                params.sampling,
                progress=progress_counter(progress, "sample", len(requests)),
            ),
            strict=True,
        )
    )
    logprobs = _likelihoods(plan, by_row, samples, tools, progress)
    return {
        q: Completion(
            origin="plain",
            index=0,
            text=tools.tokenizer.decode(sample.token_ids, skip_special_tokens=True).strip(),
            token_ids=sample.token_ids,
            finish_reason=sample.finish_reason,
            seed=q.seed,
            sampling_logprob=sample.logprob,
            policy_logprobs=logprobs[q],
        )
        for q, sample in samples.items()
    }


def _likelihoods(
    plan: _Plan,
    by_row: Sequence[Sequence[SampleRequest]],
    samples: dict[SampleRequest, Sample],
    tools: ProbeTools,
    progress: Progress | None,
) -> dict[SampleRequest, tuple[float, ...]]:
    """Per-token log-probabilities of every answer under its plain prompt, nats."""
    found: dict[SampleRequest, tuple[float, ...]] = {}
    for start in range(0, len(by_row), LIKELIHOOD_PROMPTS):
        if progress is not None:
            progress("likelihood", start, len(by_row))
        share = [
            (r, q)
            for r in range(start, min(start + LIKELIHOOD_PROMPTS, len(by_row)))
            for q in by_row[r]
        ]
        values = tools.logprobs(
            [plan.plain_ids[r] for r, _ in share], [samples[q].token_ids for _, q in share]
        )
        found.update(zip([q for _, q in share], values, strict=True))
    if progress is not None:
        progress("likelihood", len(by_row), len(by_row))
    return found


def _scored(
    rows: Sequence[PromptRow],
    by_row: Sequence[Sequence[SampleRequest]],
    answers: dict[SampleRequest, Completion],
    rewards: tuple[NamedReward, ...],
) -> dict[SampleRequest, Completion]:
    """The answers, with new rewards where one of `by_row` asked for them."""
    flat = [(row, q) for row, mine in zip(rows, by_row, strict=True) for q in mine]
    scored = score_answers(
        [row for row, _ in flat],
        [answers[q].text for _, q in flat],
        [answers[q].token_ids for _, q in flat],
        rewards,
    )
    values = zip(flat, scored.rewards, scored.components, strict=True)
    return answers | {
        q: replace(answers[q], reward=reward, reward_components=parts)
        for (_, q), reward, parts in values
    }


def _completions(
    answers: dict[SampleRequest, Completion],
    requests: Sequence[SampleRequest],
    origin: Polarity,
    instruction: str | None,
) -> list[Completion]:
    return [
        replace(answers[q], origin=origin, index=i, instruction=instruction)
        for i, q in enumerate(requests)
    ]


def _own_contrast(pair: InstructionPair, placement: Placement, tools: ProbeTools) -> NamedReward:
    def score(
        prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[float]:
        return [sum(row) for row in tools.logprobs(prompts, completions)]

    def render(prompt: Prompt, polarity: Polarity) -> list[int]:
        return prompt_ids(
            tools.tokenizer, *instructed(prompt, dict(_instructions(pair))[polarity], placement)
        )

    return NamedReward("contrast", ContrastReward(score, render), 1.0)


# ---- numbers -------------------------------------------------------------------------------------


def summarise(
    groups: Sequence[CompletionGroup],
    number: int,
    placement: Placement,
    pair: InstructionPair,
    *,
    seed: int,
) -> PairProbe:
    """The numbers of one pair from its answers: one group a prompt, with positive, negative and
    plain completions.
    """
    good, plain, bad = _of(groups, "positive"), _of(groups, "plain"), _of(groups, "negative")
    positive, negative = _means(good), _means(bad)
    gaps = [
        None if a is None or b is None else a - b for a, b in zip(positive, negative, strict=True)
    ]
    difference = paired_bootstrap(negative, positive, seed=seed)
    d = cohens_d(_rewards(good), _rewards(bad))
    return PairProbe(
        number=number,
        placement=placement,
        verdict=verdict_of(difference, sum(gap is not None for gap in gaps), d),
        positive=_side(good, pair.positive),
        plain=_side(plain, None),
        negative=_side(bad, pair.negative),
        gaps=tuple(gaps),
        gap=difference,
        cohens_d=d,
        inversion_rate=inversion_rate(groups) if difference is not None else None,
    )


def _of(groups: Sequence[CompletionGroup], origin: Polarity) -> list[list[Completion]]:
    return [[c for c in g.completions if c.origin == origin] for g in groups]


def _means(by_prompt: Sequence[Sequence[Completion]]) -> list[float | None]:
    return [mean_of([c.reward for c in mine]) for mine in by_prompt]


def _rewards(by_prompt: Sequence[Sequence[Completion]]) -> list[float]:
    return [c.reward for mine in by_prompt for c in mine if c.reward is not None]


def _side(by_prompt: Sequence[Sequence[Completion]], instruction: str | None) -> Side:
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


def _placement(pairs: Sequence[PairProbe], placement: Placement, seed: int) -> PlacementProbe:
    gaps = tuple(mean_of(of_prompt) for of_prompt in zip(*(p.gaps for p in pairs), strict=True))
    return PlacementProbe(placement, gaps, paired_bootstrap([0.0] * len(gaps), gaps, seed=seed))
