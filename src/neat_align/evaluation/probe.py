"""How strongly each pair of an instruction bank moves the reward, before anything is trained.

The same prompts are answered under every positive and negative instruction and plainly, with the
same random numbers, so that what differs is the instruction alone. Nothing is filtered: leaks and
blanks, which training drops, are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from neat_align.errors import ConfigError, DataError
from neat_align.evaluation.probe_decoding import probe_decoding
from neat_align.evaluation.probe_params import PROBE_ROUND, ProbeParams, ProbeTools
from neat_align.evaluation.probe_summary import (
    MIN_PROMPTS,
    DecodingProbe,
    PairProbe,
    PlacementProbe,
    Probe,
    summarise_pair,
    summarise_placement,
)
from neat_align.prompts.instruction_banks import (
    CONTRASTED,
    Contrasted,
    InstructionBank,
    InstructionPair,
    Polarity,
)
from neat_align.prompts.placement import Placement
from neat_align.prompts.row_prompts import instructed_ids, instructed_prompt_ids, row_prompt_ids
from neat_align.prompts.rows import NO_INPUTS, Prompt, PromptRow, TemplateInputs
from neat_align.prompts.seeds import completion_seed
from neat_align.prompts.skipped_rows import OnBadRow
from neat_align.prompts.template_inputs import joined_inputs
from neat_align.rewards.contrast import ContrastReward
from neat_align.rewards.protocol import NamedReward
from neat_align.rewards.scoring import score_answers
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.params import Progress, progress_counter
from neat_align.sampling.protocol import Sample, SampleRequest

# Prompts whose log-probabilities are computed at once; between two such shares the progress is
# reported.
LIKELIHOOD_PROMPTS = 4


def probe_bank(
    rows: Sequence[PromptRow],
    bank: InstructionBank,
    params: ProbeParams,
    tools: ProbeTools,
    progress: Progress | None = None,
) -> Probe:
    """Answer the prompts under every instruction at every placement, and compare the rewards.

    With `params.decoding` the prompts are also answered from the contrast of the bank's pairs.
    `progress` is called with (stage, finished, of how many); the stages are sample, likelihood,
    score, and decode. Raises ConfigError for fewer than 8 different prompts, and for decoding with
    the reward contrast; DataError for a prompt that leaves no room for an answer; what the sampler,
    the instructions and the rewards raise comes through.
    """
    # A row that came twice would get equal answers, and count twice.
    rows = list({row.id: row for row in rows}.values())
    _check_asked(rows, params, tools)
    plan = _planned(rows, bank, params, tools)
    answers = _answered(plan, params, tools, progress)
    if progress is not None:
        progress("score", 0, 1)
    if tools.rewards is not None:
        by_row = [plan.of_row(r) for r in range(len(rows))]
        answers = _scored(rows, by_row, answers, tools.rewards, tools.on_bad_row)
    pairs: list[PairProbe] = []
    for placement, number in plan.instructed:
        pair = bank.pairs[number - 1]
        if tools.rewards is None:
            answers = _scored_by_own_contrast(rows, plan, answers, (placement, number), pair, tools)
        groups = _groups(rows, plan, answers, (placement, number), pair)
        pairs.append(summarise_pair(groups, number, placement, pair, seed=params.seed))
    if progress is not None:
        progress("score", 1, 1)
    placements = []
    for placement in params.placements:
        here = [pair for pair in pairs if pair.placement == placement]
        placements.append(summarise_placement(here, placement, seed=params.seed))
    decodings: list[DecodingProbe] = []
    if params.decoding is not None:
        plain = [_completions(answers, mine, "plain", None) for mine in plan.plain]
        decodings = probe_decoding(rows, bank, plan.plain, plain, params, tools, progress)
    return Probe(
        prompt_ids=tuple(row.id for row in rows),
        pairs=tuple(sorted(pairs, key=_gap_first)),
        placements=tuple(sorted(placements, key=_gap_first)),
        decodings=tuple(decodings),
    )


def _check_asked(rows: Sequence[PromptRow], params: ProbeParams, tools: ProbeTools) -> None:
    if len(rows) < MIN_PROMPTS:
        raise ConfigError(
            f"a probe needs {MIN_PROMPTS} different prompts or more and got {len(rows)}: an "
            "interval over fewer means nothing; give it more"
        )
    if params.decoding is not None and tools.rewards is None:
        raise ConfigError(
            "decoding from the contrast is not measured with the reward contrast, which is what it "
            "raises: name another reward, or leave alpha out"
        )


def _gap_first(probe: PairProbe | PlacementProbe) -> tuple[bool, float]:
    """Sorts the largest gap first, and what has none last."""
    return probe.gap is None, 0.0 if probe.gap is None else -probe.gap.delta


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


def _planned(
    rows: Sequence[PromptRow], bank: InstructionBank, params: ProbeParams, tools: ProbeTools
) -> _Plan:
    def requests(row: PromptRow, ids: list[int]) -> list[SampleRequest]:
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
        for polarity in CONTRASTED:
            ids = instructed_ids(tools.tokenizer, row, pair.of(polarity), placement)
            sides[polarity] = requests(row, ids)
        return sides

    for row in rows:
        check_room(row, bank, params.placements, tools.tokenizer, tools.max_prompt_length)
    plain_ids = [row_prompt_ids(tools.tokenizer, row) for row in rows]
    return _Plan(
        plain_ids=[tuple(ids) for ids in plain_ids],
        plain=[requests(row, ids) for row, ids in zip(rows, plain_ids, strict=True)],
        instructed={
            (placement, number): [under(row, pair, placement) for row in rows]
            for placement in params.placements
            for number, pair in enumerate(bank.pairs, start=1)
        },
    )


def check_room(
    row: PromptRow,
    bank: InstructionBank,
    placements: Sequence[Placement],
    tokenizer: Any,
    max_prompt_length: int | None,
) -> None:
    """Refuse a prompt that leaves no room for an answer, plain or under some instruction.

    Raises DataError that names the row, and the PromptError of a template that refuses it.
    """

    def check(ids: Sequence[int], what: str) -> None:
        length = len(ids)
        if max_prompt_length is not None and length > max_prompt_length:
            raise DataError(
                f"{row.where}: the prompt{what} is {length} tokens, and the model's context leaves "
                f"{max_prompt_length} for it beside the answer: lower max_completion_length, "
                "drop the row, or set on_bad_row: skip; prompts are never cut"
            )

    check(row_prompt_ids(tokenizer, row), "")
    for placement in placements:
        for pair in bank.pairs:
            for polarity in CONTRASTED:
                instruction = pair.of(polarity)
                what = f" with {instruction!r} on it ({placement})"
                check(instructed_ids(tokenizer, row, instruction, placement), what)


def _answered(
    plan: _Plan, params: ProbeParams, tools: ProbeTools, progress: Progress | None
) -> dict[SampleRequest, Completion]:
    """The plan's answers by request, with their log-probabilities under the plain prompt.

    All are plain here; `_completions` says of which side they are.
    """
    by_row = [plan.of_row(r) for r in range(len(plan.plain))]
    requests = [q for mine in by_row for q in mine]
    # One call for all of it, so that the batches are full.
    counter = progress_counter(progress, "sample", len(requests))
    sampled = tools.sampler.sample(requests, params.sampling, progress=counter)
    samples = dict(zip(requests, sampled, strict=True))
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
    by_request: dict[SampleRequest, tuple[float, ...]] = {}
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
        by_request.update(zip([q for _, q in share], values, strict=True))
    if progress is not None:
        progress("likelihood", len(by_row), len(by_row))
    return by_request


def _scored(
    rows: Sequence[PromptRow],
    by_row: Sequence[Sequence[SampleRequest]],
    answers: dict[SampleRequest, Completion],
    rewards: tuple[NamedReward, ...],
    on_bad_row: OnBadRow = "error",
) -> dict[SampleRequest, Completion]:
    """The answers, with new rewards where one of `by_row` asked for them."""
    flat = [(row, q) for row, mine in zip(rows, by_row, strict=True) for q in mine]
    scored = score_answers(
        [row for row, _ in flat],
        [answers[q].text for _, q in flat],
        [answers[q].token_ids for _, q in flat],
        rewards,
        on_bad_row,
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


def _scored_by_own_contrast(
    rows: Sequence[PromptRow],
    plan: _Plan,
    answers: dict[SampleRequest, Completion],
    place: tuple[Placement, int],
    pair: InstructionPair,
    tools: ProbeTools,
) -> dict[SampleRequest, Completion]:
    """The answers with the contrast of this very pair as the reward of its sides and the plain."""
    sides = plan.instructed[place]
    by_row = [
        [*plan.plain[r], *sides[r]["positive"], *sides[r]["negative"]] for r in range(len(rows))
    ]
    return _scored(rows, by_row, answers, (_own_contrast(pair, place[0], tools),))


def _groups(
    rows: Sequence[PromptRow],
    plan: _Plan,
    answers: dict[SampleRequest, Completion],
    place: tuple[Placement, int],
    pair: InstructionPair,
) -> list[CompletionGroup]:
    """One group a row: its plain answers, and those under the pair's two instructions."""
    groups = []
    for r, row in enumerate(rows):
        completions = _completions(answers, plan.plain[r], "plain", None)
        for polarity in CONTRASTED:
            requests = plan.instructed[place][r][polarity]
            completions += _completions(answers, requests, polarity, pair.of(polarity))
        groups.append(CompletionGroup(row.id, row.prompt, plan.plain_ids[r], tuple(completions)))
    return groups


def _own_contrast(pair: InstructionPair, placement: Placement, tools: ProbeTools) -> NamedReward:
    def score(
        prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[float]:
        return [sum(row) for row in tools.logprobs(prompts, completions)]

    def render(
        prompt: Prompt, polarity: Contrasted, inputs: TemplateInputs = NO_INPUTS
    ) -> list[int]:
        inputs = joined_inputs(tools.template_kwargs, inputs)
        instruction = pair.of(polarity)
        return instructed_prompt_ids(tools.tokenizer, prompt, instruction, placement, inputs)

    return NamedReward("contrast", ContrastReward(score, render), 1.0)
