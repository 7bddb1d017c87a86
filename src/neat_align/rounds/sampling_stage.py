"""Sampling a round's completions: who writes which, under which instruction, with which seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neat_align.errors import DataError, name_list
from neat_align.prompts.instruction_banks import Polarity
from neat_align.prompts.placement import instructed
from neat_align.prompts.rendering import prompt_ids
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.seeds import completion_seed, draw_pair
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.human_answers import human_completions
from neat_align.rounds.params import Progress, RoundParams, RoundTools, progress_counter
from neat_align.rounds.rollout_store import RolloutStore
from neat_align.rounds.scoring_stage import refuse_non_finite
from neat_align.sampling.protocol import Sample, SampleRequest


def sample_groups(
    rows: Sequence[PromptRow],
    round_index: int,
    params: RoundParams,
    tools: RoundTools,
    work: Path,
    progress: Progress | None,
) -> list[CompletionGroup]:
    """Draw every completion of these prompts, or take up what an interrupted attempt has drawn in
    `work`.

    The data's own answers come last in each group. Nothing is filtered or scored yet.
    """
    plain_ids = [_checked_prompt_ids(row, params, tools) for row in rows]
    plans: list[tuple[int, Polarity, int, str | None, SampleRequest]] = []
    for r in range(len(rows)):
        for polarity, count in params.counts():
            asked, written_as, first = _writer(r, rows, polarity, params)
            if asked is None or not count:
                continue
            pair = draw_pair(
                tools.bank, run_seed=params.seed, round_index=round_index, prompt_id=asked.id
            )
            instruction = {"positive": pair.positive, "negative": pair.negative, "plain": None}[
                written_as
            ]
            ids = plain_ids[r]
            if instruction is not None:
                ids = tuple(
                    prompt_ids(
                        tools.tokenizer, *instructed(asked.prompt, instruction, params.placement)
                    )
                )
            for index in range(count):
                seed = completion_seed(
                    params.seed, round_index, asked.id, written_as, first + index
                )
                plans.append((r, polarity, index, instruction, SampleRequest(ids, seed)))
    report = progress_counter(progress, "sample", len(plans))

    def names(numbers: Sequence[int]) -> str:
        return name_list([rows[plans[n][0]].id for n in numbers])

    def check(numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        refuse_non_finite(
            "log-probability", [rows[plans[n][0]].id for n in numbers], [s.logprob for s in samples]
        )

    completions: dict[int, list[Completion]] = {r: [] for r in range(len(rows))}
    numbered = list(enumerate(p[4] for p in plans))
    # Good and bad answers may come from two policies; one policy draws all of them in the same full
    # batches.
    if tools.sampler is tools.negative_sampler:
        shares = [(tools.sampler, numbered)]
    else:
        negatives = {n for n, p in enumerate(plans) if p[1] == "negative"}
        shares = [
            (tools.sampler, [item for item in numbered if item[0] not in negatives]),
            (tools.negative_sampler, [item for item in numbered if item[0] in negatives]),
        ]
    drawn: dict[int, Sample] = {}
    for sampler, mine in shares:
        shards = RolloutStore(work, tools.shard_size)
        drawn |= shards.draw(
            sampler,
            mine,
            params.sampling,
            check=check,
            names=names,
            between=tools.between_shards,
            progress=report,
        )
    for number, (r, polarity, index, instruction, request) in enumerate(plans):
        sample = drawn[number]
        text = tools.tokenizer.decode(sample.token_ids, skip_special_tokens=True).strip()
        completions[r].append(
            Completion(
                origin=polarity,
                index=index,
                text=text,
                token_ids=sample.token_ids,
                finish_reason=sample.finish_reason,
                instruction=instruction,
                seed=request.seed,
                sampling_logprob=sample.logprob,
            )
        )
    if params.use_human_completions:
        for r, row in enumerate(rows):
            completions[r] += human_completions(
                row, tools.tokenizer, params.sampling.max_new_tokens
            )
    return [
        CompletionGroup(row.id, row.prompt, plain_ids[r], tuple(completions[r]))
        for r, row in enumerate(rows)
    ]


def _writer(
    r: int, rows: Sequence[PromptRow], polarity: Polarity, params: RoundParams
) -> tuple[PromptRow | None, Polarity, int]:
    """Whose prompt a completion of row `r` answers, under which instruction, and the first index
    that its seeds count from.

    Its own, but for negatives from other prompts: those are the next row's good answers, drawn
    beside the ones that row keeps. A row that is alone has nobody to take them from.
    """
    if polarity != "negative" or params.negative_source == "instruction":
        return rows[r], polarity, 0
    return (rows[(r + 1) % len(rows)] if len(rows) > 1 else None), "positive", params.num_positive


def _checked_prompt_ids(row: PromptRow, params: RoundParams, tools: RoundTools) -> tuple[int, ...]:
    ids = tuple(prompt_ids(tools.tokenizer, row.prompt))
    if len(ids) > params.max_prompt_length:
        raise DataError(
            f"{row.where}: the prompt is {len(ids)} tokens and max_prompt_length is "
            f"{params.max_prompt_length}: raise it (the model's "
            "context allowing), or drop the row; prompts are never cut"
        )
    return ids
