"""Is it better? A policy on held-out prompts, with the same seeds before and after training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, TypeAlias

from neat_align.evaluation.statistics import mean_of
from neat_align.modeling.kl import Divergence
from neat_align.prompts.copies import deep_copy
from neat_align.prompts.instruction_banks import CONTRASTED, InstructionBank, Polarity
from neat_align.prompts.row_prompts import instructed_ids, row_prompt_ids
from neat_align.prompts.rows import Prompt, PromptRow
from neat_align.prompts.seeds import completion_seed, draw_pair
from neat_align.prompts.skipped_rows import OnBadRow
from neat_align.rewards.protocol import NamedReward, ScoredRows
from neat_align.rewards.scoring import ScoreFunction, added, score_answers
from neat_align.rounds.human_answers import answer_ids
from neat_align.rounds.params import LogprobFunction, progress_counter
from neat_align.rounds.scoring_notes import logged_means
from neat_align.rounds.text_metrics import distinct_n, is_refusal, repetition
from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, SamplingParams

# (prompt ids, completion ids) → the divergence at the completions' tokens.
DivergenceFunction: TypeAlias = Callable[
    [Sequence[Sequence[int]], Sequence[Sequence[int]]], Divergence
]
# Rounds count from 0; evaluation draws its seeds apart from every round's.
EVAL_ROUND = -1


@dataclass(frozen=True)
class EvalTools:
    """Who samples and who judges.

    `judges` are never trained on. `logprobs` are the policy's, of completions after plain prompts;
    `divergence` is its distance from the start policy there, None before training. `context` is how
    many tokens the policy can read; None: any number. `score` calls rewards and judges.
    `on_bad_row`: an answer that a reward or judge cannot score is an error, or has no score.
    """

    tokenizer: Any
    sampler: Sampler
    rewards: tuple[NamedReward, ...]
    judges: tuple[NamedReward, ...]
    bank: InstructionBank
    placement: str
    sampling: SamplingParams
    logprobs: LogprobFunction
    context: int | None = None
    divergence: DivergenceFunction | None = None
    on_bad_row: OnBadRow = "error"
    score: ScoreFunction = score_answers


@dataclass(frozen=True)
class Evaluation:
    """One policy on held-out prompts. Lists have one entry a prompt, means over that prompt's
    samples.

    `perplexity` is exp of the mean negative log-likelihood a token of the data's `chosen` answers
    under the plain prompt; `kl` and `entropy` are exact, on the plain samples, in nats per token,
    KL to the start policy; `contrast` is the mean reward under the positive and the negative
    instruction (and plain). `repetition` and `refusals` are those of `text_metrics`;
    `pair_accuracy` is 1 where the policy prefers the data's `chosen` answer to its `rejected` one
    (mean log-probability a token), 0 where not, 0.5 for equal ones. None, or an empty list, where
    there is nothing to measure. `left_out` are the answers that a reward or judge could not score;
    `by_reward` are the single rewards, unweighted, where `rewards` is the sum of several. `logged`
    and `extra` are what reward functions logged (`log_metric`, a mean, `log_total`, a sum, and
    `log_extra`, a column of one value an answer).
    """

    prompt_ids: list[str]
    prompts: list[Prompt]
    completions: list[list[str]]
    rewards: list[float | None]
    judges: dict[str, list[float | None]]
    lengths: list[float]
    clipped: list[float]
    distinct2: float | None
    perplexity: float | None
    kl: float | None
    entropy: float | None
    contrast: dict[str, float]
    kl_by_prompt: list[float] = field(default_factory=list)
    repetition: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    pair_accuracy: list[float | None] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    logged: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    by_reward: dict[str, list[float | None]] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """The means, as logged under `eval_`. What was not measured is left out."""
        values: dict[str, float | None] = {
            "reward": mean_of(self.rewards),
            **{f"rewards/{name}/mean": mean_of(scores) for name, scores in self.by_reward.items()},
            **{f"judges/{name}": mean_of(scores) for name, scores in self.judges.items()},
            "completions/mean_length": fmean(self.lengths),
            "completions/clipped_ratio": fmean(self.clipped),
            "distinct2": self.distinct2,
            "repetition": mean_of(self.repetition),
            "refusals": mean_of(self.refusals),
            "pair_accuracy": mean_of(self.pair_accuracy),
            "perplexity": self.perplexity,
            "kl": self.kl,
            "entropy": self.entropy,
            **{f"contrast/reward/{name}": value for name, value in self.contrast.items()},
        }
        if self.left_out:
            answers = {(line["prompt_id"], line["sample"]) for line in self.left_out}
            values["unscorable"] = float(len(answers))
        measured = {k: v for k, v in values.items() if v is not None}
        return measured | logged_means({k: [v] for k, v in self.logged.items()}, measured)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a file."""
        return asdict(self)


def metric_names(
    rows: Sequence[PromptRow], judges: Sequence[str], *, rewards: Sequence[str], contrast: bool
) -> tuple[str, ...]:
    """The names that `Evaluation.summary` gives for these rows once training has begun.

    `judges` and `rewards` are names; with `contrast` answers under the instructions are rewarded,
    too.
    """
    names = [
        *(f"judges/{name}" for name in judges),
        "completions/mean_length",
        "completions/clipped_ratio",
        "distinct2",
        "repetition",
        "refusals",
        "kl",
        "entropy",
    ]
    if len(rewards) > 1:
        names += [f"rewards/{name}/mean" for name in rewards]
    if rewards:
        names += ["reward", "contrast/reward/plain"]
        names += [f"contrast/reward/{polarity}" for polarity in CONTRASTED if contrast]
    if any(row.chosen is not None for row in rows):
        names.append("perplexity")
    if any(row.chosen is not None and row.rejected is not None for row in rows):
        names.append("pair_accuracy")
    return tuple(names)


def evaluate_policy(
    rows: Sequence[PromptRow],
    tools: EvalTools,
    *,
    seed: int,
    samples_per_prompt: int = 1,
    contrast: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Sample the policy on the plain prompts, reward the answers, measure drift and contrast.

    The contrast that is left is the reward of one answer to each prompt under its instructions. KL
    and entropy are of the first answer to each plain prompt, all else of all answers. Seeds depend
    on `seed`, the prompt and the sample's number, so two policies are compared on the same random
    draws.
    """
    n = samples_per_prompt
    plain = _sample(rows, tools, seed, n, "plain", progress)
    texts = _texts(plain, tools)
    asked = [row for row in rows for _ in range(n)]
    token_ids, everybody = [s.token_ids for s in plain], (*tools.rewards, *_silent(tools.judges))
    scored = tools.score(asked, texts, token_ids, everybody, tools.on_bad_row)
    # Exact at each token, so a prompt's first answer says nearly all; the dearest part.
    drift = _drift(rows, plain[::n], tools)
    human_logprobs = _human_logprobs(rows, tools)
    distinct2 = distinct_n(texts)  # NaN when no answer has two words
    under = {"plain": scored}
    if contrast and tools.rewards:
        under |= {p: _scored_under(p, rows, tools, seed, progress) for p in CONTRASTED}
    rewards = {name: mean_of(of_it.rewards) for name, of_it in under.items()}
    found = Evaluation(
        prompt_ids=[row.id for row in rows],
        prompts=[deep_copy(row.prompt) for row in rows],  # the caller's, to do with as it likes
        completions=[texts[i : i + n] for i in range(0, len(texts), n)],
        rewards=_by_prompt(list(scored.rewards), n),
        judges=_scores(scored.components, tools.judges, len(tools.rewards), n),
        lengths=_means([len(s.token_ids) for s in plain], n),
        clipped=_means([s.finish_reason == "length" for s in plain], n),
        distinct2=None if math.isnan(distinct2) else distinct2,
        perplexity=_perplexity(human_logprobs),
        kl=drift.kl_per_token if drift is not None else None,
        entropy=drift.entropy_per_token if drift is not None else None,
        contrast={k: v for k, v in rewards.items() if v is not None},
        kl_by_prompt=_kl_by_prompt(drift),
        repetition=_means([repetition(t) for t in texts], n),
        refusals=_means([is_refusal(t) for t in texts], n),
        pair_accuracy=_pair_accuracy(human_logprobs),
        by_reward=_scores(scored.components, tools.rewards, 0, n) if len(tools.rewards) > 1 else {},
    )
    return _with_notes(found, scored, added(s.totals for s in under.values()))


def _texts(samples: Sequence[Sample], tools: EvalTools) -> list[str]:
    return [tools.tokenizer.decode(s.token_ids, skip_special_tokens=True).strip() for s in samples]


def _scored_under(
    polarity: Polarity,
    rows: Sequence[PromptRow],
    tools: EvalTools,
    seed: int,
    progress: Callable[[str, int, int], None] | None,
) -> ScoredRows:
    """Rewards of one answer to each prompt under its instruction of that polarity."""
    samples = _sample(rows, tools, seed, 1, polarity, progress)
    token_ids = [s.token_ids for s in samples]
    texts = _texts(samples, tools)
    return tools.score(rows, texts, token_ids, tools.rewards, tools.on_bad_row)


def _silent(judges: tuple[NamedReward, ...]) -> tuple[NamedReward, ...]:
    # Weight 0: recorded beside the reward, never part of it.
    return tuple(replace(judge, weight=0.0) for judge in judges)


def _with_notes(found: Evaluation, scored: ScoredRows, totals: Mapping[str, float]) -> Evaluation:
    """The evaluation with what scoring its answers noted, and the totals of all scoring."""
    places = [
        {"prompt_id": prompt_id, "sample": i}
        for prompt_id, answers in zip(found.prompt_ids, found.completions, strict=True)
        for i in range(len(answers))
    ]
    return replace(
        found,
        left_out=[
            {**places[left.row], "reward": left.reward, "reason": left.reason}
            for left in scored.left_out
        ],
        logged={**{name: fmean(values) for name, values in scored.metrics.items()}, **totals},
        extra={name: list(values) for name, values in scored.extra.items()},
    )


def _scores(
    components: Sequence[Sequence[float | None]], of: Sequence[NamedReward], first: int, n: int
) -> dict[str, list[float | None]]:
    """The scores of some rewards or judges, a mean a prompt; they stand in the components from
    `first` on.
    """
    return {
        named.name: _by_prompt([parts[i] for parts in components], n)
        for i, named in enumerate(of, start=first)
    }


def _by_prompt(values: Sequence[float | None], n: int) -> list[float | None]:
    """Means over each prompt's `n` samples that have a value."""
    return [mean_of(values[i : i + n]) for i in range(0, len(values), n)]


def _means(values: Sequence[float], n: int) -> list[float]:
    """Means over each prompt's `n` samples."""
    return [fmean(values[i : i + n]) for i in range(0, len(values), n)]


def _sample(
    rows: Sequence[PromptRow],
    tools: EvalTools,
    seed: int,
    n: int,
    polarity: Polarity,
    progress: Callable[[str, int, int], None] | None,
) -> list[Sample]:
    requests = []
    for row in rows:
        if polarity == "plain":
            ids = row_prompt_ids(tools.tokenizer, row)
        else:
            pair = draw_pair(tools.bank, run_seed=seed, round_index=EVAL_ROUND, prompt_id=row.id)
            ids = instructed_ids(tools.tokenizer, row, pair.of(polarity), tools.placement)
        requests += [
            SampleRequest(tuple(ids), completion_seed(seed, EVAL_ROUND, row.id, polarity, i))
            for i in range(n)
        ]
    return tools.sampler.sample(
        requests,
        tools.sampling,
        progress=progress_counter(progress, f"evaluate ({polarity})", len(requests)),
    )


# Per-token log-probabilities of a row's chosen and rejected answer, in nats; None where the row has
# none.
_AnswerLogprobs = tuple[tuple[float, ...] | None, tuple[float, ...] | None]


def _human_logprobs(rows: Sequence[PromptRow], tools: EvalTools) -> list[_AnswerLogprobs]:
    """The data's own answers under the plain prompt, end-of-turn token included."""
    given = [
        (r, side, text)
        for r, row in enumerate(rows)
        for side, text in enumerate((row.chosen, row.rejected))
        if text is not None
    ]
    prompts = [row_prompt_ids(tools.tokenizer, rows[r]) for r, _, _ in given]
    # A model with learned positions cannot read past its context; what does not fit is left out of
    # the mean.
    context = tools.context
    room = [None if context is None else context - len(ids) for ids in prompts]
    answers = [
        answer_ids(rows[r], text, tools.tokenizer, n)[0]
        for (r, _, text), n in zip(given, room, strict=True)
    ]
    logps = tools.logprobs(prompts, answers) if given else []
    by_answer = {(r, side): row for (r, side, _), row in zip(given, logps, strict=True)}
    return [(by_answer.get((r, 0)), by_answer.get((r, 1))) for r in range(len(rows))]


def _perplexity(answers: Sequence[_AnswerLogprobs]) -> float | None:
    """exp(mean NLL a token) of the `chosen` answers, all tokens weighted alike; None without."""
    flat = [v for chosen, _ in answers if chosen is not None for v in chosen]
    return math.exp(-fmean(flat)) if flat else None


def _pair_accuracy(answers: Sequence[_AnswerLogprobs]) -> list[float | None]:
    def verdict(
        chosen: tuple[float, ...] | None, rejected: tuple[float, ...] | None
    ) -> float | None:
        if not chosen or not rejected:
            return None
        gap = fmean(chosen) - fmean(rejected)
        return 0.5 if gap == 0 else float(gap > 0)

    return [verdict(*pair) for pair in answers]


def _drift(
    rows: Sequence[PromptRow], samples: Sequence[Sample], tools: EvalTools
) -> Divergence | None:
    if tools.divergence is None:
        return None
    prompts = [row_prompt_ids(tools.tokenizer, row) for row in rows]
    return tools.divergence(prompts, [s.token_ids for s in samples])


def _kl_by_prompt(drift: Divergence | None) -> list[float]:
    """Nats per token of each prompt's first answer; empty without a start policy."""
    if drift is None:
        return []
    return [kl / max(tokens, 1) for kl, tokens in zip(drift.kl, drift.tokens, strict=True)]
