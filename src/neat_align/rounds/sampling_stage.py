"""Sampling a round's completions: who writes which, under which instruction, with which seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from neat_align.errors import CollapseError, DataError, name_list
from neat_align.prompts.instruction_banks import CONTRASTED, Contrasted, Polarity
from neat_align.prompts.row_prompts import (
    InstructedPairs,
    instructed_ids,
    instructed_pairs,
    row_prompt_ids,
)
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.seeds import completion_seed, draw_pair, draw_pairs
from neat_align.rounds.branching import Branch, answer_to_branch, branch
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.human_answers import human_completions
from neat_align.rounds.kept_samples import KeptSamples
from neat_align.rounds.params import RoundParams, RoundTools
from neat_align.rounds.rollout_store import RolloutStore
from neat_align.rounds.scoring_stage import instructed_logprobs
from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, handing_over

T = TypeVar("T")
# Batches that a sampler which hands over is asked for at once. It fills places again as completions
# end, and they run empty only at the end of a call: an eighth as often as batch by batch.
BATCHES_A_CALL = 8


@dataclass(frozen=True, slots=True)
class PlannedCompletion:
    """A completion that is to be drawn: for which row, as what, and with which request.

    With a `branch` the request asks for what follows the tokens that are kept.
    """

    row: int
    prompt_id: str
    origin: Polarity
    index: int
    instruction: str | None
    request: SampleRequest
    branch: Branch | None = None


def sample_groups(
    rows: Sequence[PromptRow],
    round_index: int,
    params: RoundParams,
    tools: RoundTools,
    store: RolloutStore,
    report: Callable[[int], None],
) -> list[CompletionGroup]:
    """Draw every completion of these prompts, or read what an interrupted attempt has stored.

    One group a row, in order; the data's own answers come last in each. Answers that branch are
    drawn after the plain ones that they continue (`branching`). Nothing is filtered or scored yet.
    `report` is told how many completions were just finished. Raises DataError for a prompt over
    `max_prompt_length`, and CollapseError, with the prompts, where the policy gives numbers that
    are not finite.
    """
    plain_ids = [_checked_prompt_ids(row, params, tools) for row in rows]
    planned = _plan_completions(rows, plain_ids, round_index, params, tools)
    samples: dict[int, Sample] = {}
    if params.contrast_from == "branch":
        plain = {n: plan for n, plan in enumerate(planned) if plan.origin == "plain"}
        samples = draw_samples(tools.sampler, plain, params, tools, store, report)
        answers = {n: samples[n].token_ids for n in plain}
        branches = _find_branches(rows, plain, answers, round_index, params, tools, store)
        planned = _from_branches(planned, branches, params)
    undrawn = {n: plan for n, plan in enumerate(planned) if n not in samples}
    for sampler, share in _shares(undrawn, tools):
        samples |= draw_samples(sampler, share, params, tools, store, report)

    completions: list[list[Completion]] = [[] for _ in rows]
    for number, plan in enumerate(planned):
        completions[plan.row].append(_completion(plan, samples[number], tools.tokenizer))
    if params.use_human_completions:
        for r, row in enumerate(rows):
            completions[r] += human_completions(
                row, tools.tokenizer, params.sampling.max_new_tokens
            )
    return [
        CompletionGroup(
            row.id,
            row.prompt,
            plain_ids[r],
            tuple(completions[r]),
            _contrast_ids(row, round_index, params, tools),
        )
        for r, row in enumerate(rows)
    ]


def sampled_groups(
    rows: Sequence[PromptRow],
    round_index: int,
    params: RoundParams,
    tools: RoundTools,
    store: RolloutStore,
    report: Callable[[int], None],
) -> list[CompletionGroup]:
    """What `sample_groups` gives, stored when it is finished, and read from then on."""
    sampled = store.read_sampled()
    if sampled is None:
        sampled = sample_groups(rows, round_index, params, tools, store, report)
        store.write_sampled(sampled)
    else:
        report(params.sampled_for(len(rows)))
    return sampled


def draw_samples(
    sampler: Sampler,
    planned: Mapping[int, PlannedCompletion],
    params: RoundParams,
    tools: RoundTools,
    store: RolloutStore,
    report: Callable[[int], None],
) -> dict[int, Sample]:
    """A sample for each planned completion, by its number: stored already, or drawn and stored.

    The sample of a completion that branches is the whole of it, with the tokens that are kept.
    A sampler is asked for at most `tools.batch_size` at a time, and for `BATCHES_A_CALL` times as
    many if it hands over what has ended: that is stored as it comes (`KeptSamples`).
    `tools.between_batches` is called before each call and after what was handed over is stored.
    """
    samples = store.read_samples(set(planned))
    samples = {n: s for n, s in samples.items() if _continues(s, planned[n].branch)}
    report(len(samples))
    handing = handing_over(sampler)
    most = tools.batch_size * (1 if handing is None else BATCHES_A_CALL)
    # Prompts of one length stand together, and equal ones meet in a batch; within a call the
    # sampler orders them itself.
    order = sorted(planned, key=lambda n: _longest_first(planned[n].request))
    for _, batch in even_batches(order, most):
        missing = sorted(n for n in batch if n not in samples)
        if not missing:
            continue
        tools.between_batches()
        requests = [planned[n].request for n in missing]
        prompts = [planned[n].prompt_id for n in missing]

        def whole(n: int, sample: Sample) -> Sample:
            return _whole(planned[n], sample)

        kept = KeptSamples(missing, prompts, whole, store, tools)
        try:
            if handing is not None:
                drawn = handing.sample(
                    requests, params.sampling, progress=report, finished=kept.finished
                )
            else:
                drawn = sampler.sample(requests, params.sampling, progress=report)
        except CollapseError as error:
            raise CollapseError(f"{error}; prompts {name_list(prompts)}") from error
        finally:  # also where a sampler's server is gone
            kept.store_the_rest()
        samples.update(kept.all_of(drawn))
    return samples


def even_batches(items: Sequence[T], batch_size: int) -> Iterator[tuple[int, Sequence[T]]]:
    """(position of the first, members) of as few batches as `batch_size` allows, of like size."""
    count = max(1, -(-len(items) // max(1, batch_size)))
    step = max(1, -(-len(items) // count))
    for start in range(0, len(items), step):
        yield start, items[start : start + step]


def _plan_completions(
    rows: Sequence[PromptRow],
    plain_ids: Sequence[tuple[int, ...]],
    round_index: int,
    params: RoundParams,
    tools: RoundTools,
) -> list[PlannedCompletion]:
    """Every completion of these rows, row by row, the good ones of a row first.

    A completion's place in this list is its number in the rollout store.
    """
    planned: list[PlannedCompletion] = []
    for r, row in enumerate(rows):
        for origin, count in params.counts():
            source = _source(r, rows, origin, params)
            if source is None or not count:
                continue
            instruction, ids = None, plain_ids[r]
            if source.polarity != "plain":
                instruction, ids = _instructed(
                    source.row, source.polarity, round_index, params, tools
                )
            for index in range(count):
                seed = completion_seed(
                    params.seed,
                    round_index,
                    source.row.id,
                    source.polarity,
                    source.first_index + index,
                )
                request = SampleRequest(ids, seed)
                planned.append(PlannedCompletion(r, row.id, origin, index, instruction, request))
    return planned


@dataclass(frozen=True, slots=True)
class _Source:
    """The prompt that completions answer, its polarity, and the index their seeds count from."""

    row: PromptRow
    polarity: Polarity
    first_index: int


def _source(
    r: int, rows: Sequence[PromptRow], origin: Polarity, params: RoundParams
) -> _Source | None:
    """What completions of this origin for row `r` are sampled from.

    The row itself, but for negatives from other prompts: those are the next row's good answers,
    drawn beside the ones that row keeps. A row that is alone has nobody to take them from: None.
    """
    if origin != "negative" or params.negative_source == "instruction":
        return _Source(rows[r], origin, 0)
    if len(rows) == 1:
        return None
    return _Source(rows[(r + 1) % len(rows)], "positive", params.num_positive)


def _instructed(
    row: PromptRow,
    polarity: Contrasted,
    round_index: int,
    params: RoundParams,
    tools: RoundTools,
) -> tuple[str, tuple[int, ...]]:
    """The instruction of this polarity that a row is sampled under, and its prompt with that."""
    pair = draw_pair(tools.bank, run_seed=params.seed, round_index=round_index, prompt_id=row.id)
    instruction = pair.of(polarity)
    ids = instructed_ids(tools.tokenizer, row, instruction, params.placement)
    return instruction, tuple(ids)


def _find_branches(
    rows: Sequence[PromptRow],
    plain: Mapping[int, PlannedCompletion],
    answers: Mapping[int, tuple[int, ...]],
    round_index: int,
    params: RoundParams,
    tools: RoundTools,
    store: RolloutStore,
) -> dict[tuple[int, int], Branch]:
    """Where plain answers branch, by row and index: stored already, or found and stored.

    `answers` are the tokens of the completions `plain`, by number. Those from which nothing
    branches are left out. In batches as samples are drawn. Raises CollapseError, with the prompts,
    where a log-probability is not finite.
    """
    if tools.policy_logprobs is None:
        raise ValueError("answers that branch need policy_logprobs: pass a function that scores")
    used = [n for n in plain if plain[n].index < max(params.num_positive, params.num_negative)]
    branches = store.read_branches({n: answers[n] for n in used})
    for _, batch in even_batches(used, tools.batch_size):
        missing = [n for n in batch if n not in branches]
        if not missing:
            continue
        tools.between_batches()
        prompts = {
            polarity: [
                _instructed(rows[plain[n].row], polarity, round_index, params, tools)[1]
                for n in missing
            ]
            for polarity in CONTRASTED
        }
        logprobs = instructed_logprobs(
            tools.policy_logprobs,
            prompts,
            [answers[n] for n in missing],
            [plain[n].prompt_id for n in missing],
        )
        both = zip(missing, logprobs["positive"], logprobs["negative"], strict=True)
        found = [branch(answers[n], positive, negative) for n, positive, negative in both]
        store.write_branches(missing, found)
        branches.update(zip(missing, found, strict=True))
    return {(plain[n].row, plain[n].index): branches[n] for n in used}


def _from_branches(
    planned: Sequence[PlannedCompletion],
    branches: Mapping[tuple[int, int], Branch],
    params: RoundParams,
) -> list[PlannedCompletion]:
    """The plan in which positive and negative completions continue plain ones."""
    continued = list(planned)
    for n, plan in enumerate(planned):
        if plan.origin == "plain":
            continue
        begun = branches[plan.row, answer_to_branch(plan.index, params.num_plain)]
        request = replace(
            plan.request,
            prompt_ids=plan.request.prompt_ids + begun.prefix,
            max_new_tokens=params.sampling.max_new_tokens - begun.kept,
        )
        continued[n] = replace(plan, request=request, branch=begun)
    return continued


def _continues(sample: Sample, begun: Branch | None) -> bool:
    """Whether a stored sample has the tokens that are kept, and more."""
    return begun is None or (
        len(sample.token_ids) > begun.kept and sample.token_ids[: begun.kept] == begun.prefix
    )


def _whole(plan: PlannedCompletion, sample: Sample) -> Sample:
    """What was drawn, after the tokens that are kept."""
    # A sampler may keep its lists, and use them again.
    drawn = tuple(sample.token_ids)
    if plan.branch is None or plan.origin == "plain":
        return replace(sample, token_ids=drawn)
    most = plan.request.max_new_tokens
    if most is not None and len(drawn) > most:
        raise ValueError(
            f"a sampler drew {len(drawn)} tokens for a request whose max_new_tokens is {most}: it "
            "has to keep to each request's own limit"
        )
    return replace(
        sample,
        token_ids=plan.branch.prefix + drawn,
        logprob=plan.branch.logprob(plan.origin) + sample.logprob,
    )


def _contrast_ids(
    row: PromptRow, round_index: int, params: RoundParams, tools: RoundTools
) -> InstructedPairs:
    """The row's prompt under as many instruction pairs as the objective contrasts."""
    if not params.contrast_pairs:
        return ()
    pairs = draw_pairs(
        tools.bank,
        params.contrast_pairs,
        run_seed=params.seed,
        round_index=round_index,
        prompt_id=row.id,
    )
    inputs = row.template_inputs
    return instructed_pairs(tools.tokenizer, row.prompt, pairs, params.placement, inputs)


def _shares(
    numbered: Mapping[int, PlannedCompletion], tools: RoundTools
) -> list[tuple[Sampler, Mapping[int, PlannedCompletion]]]:
    """Who draws which completions: good and bad ones may come from two policies.

    One policy draws all of them together, so that its batches are full.
    """
    if tools.sampler is tools.negative_sampler:
        return [(tools.sampler, numbered)]
    negatives = {n: p for n, p in numbered.items() if p.origin == "negative"}
    others = {n: p for n, p in numbered.items() if p.origin != "negative"}
    return [(tools.sampler, others), (tools.negative_sampler, negatives)]


def _longest_first(request: SampleRequest) -> tuple[int, tuple[int, ...]]:
    return -len(request.prompt_ids), request.prompt_ids


def _completion(plan: PlannedCompletion, sample: Sample, tokenizer: Any) -> Completion:
    return Completion(
        origin=plan.origin,
        index=plan.index,
        text=tokenizer.decode(sample.token_ids, skip_special_tokens=True).strip(),
        token_ids=sample.token_ids,
        finish_reason=sample.finish_reason,
        instruction=plan.instruction,
        seed=plan.request.seed,
        sampling_logprob=sample.logprob,
        branch_at=None if plan.branch is None else plan.branch.kept,
    )


def _checked_prompt_ids(row: PromptRow, params: RoundParams, tools: RoundTools) -> tuple[int, ...]:
    ids = tuple(row_prompt_ids(tools.tokenizer, row))
    if len(ids) > params.max_prompt_length:
        raise DataError(
            f"{row.where}: the prompt is {len(ids)} tokens and max_prompt_length is "
            f"{params.max_prompt_length}: raise it (the model's context allowing), or drop the "
            "row; prompts are never cut"
        )
    return ids
