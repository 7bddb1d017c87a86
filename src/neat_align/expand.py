"""One round of data: sample → filter → score → rank, stage by stage on disk.

    prompts ──► completions under + and − instructions ──► leaks, blanks, repeats out ──► rewards ──► groups with a pair

A round's folder holds `groups.parquet` and, written last, `manifest.json`: a folder with a manifest is finished and is
read instead of made again. Until then finished shards of samples and of scores are kept in the folder and taken up.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from neat_align.data import PromptRow
from neat_align.errors import CollapseError, DataError
from neat_align.groups import (
    Completion,
    CompletionGroup,
    Origin,
    Polarity,
    RankBy,
    groups_to_table,
    ordered_pairs,
    rank_keys,
    read_groups,
)
from neat_align.guards import name_list, not_finite
from neat_align.leaks import leaks_instruction
from neat_align.prompts import InstructionBank, answer_text_ids, completion_seed, draw_pair, end_of_turn_id, instructed, prompt_ids
from neat_align.rewards import NamedReward
from neat_align.round_metrics import round_metrics
from neat_align.sampling import Sample, Sampler, SampleRequest, SamplingParams
from neat_align.score_stage import scored
from neat_align.shards import SampleShards, scored_in_shards
from neat_align.storage import free_name, read_json, sha256_of, write_json, write_table

logger = logging.getLogger(__name__)

# (prompt ids, completion ids) → per-token log-probabilities in nats, in order.
LogprobFunction = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[tuple[float, ...]]]
# (stage, finished, of how many)
Progress = Callable[[str, int, int], None]
FORMAT = 1


@dataclass(frozen=True)
class ExpandParams:
    """What a round is made of. Counts are per prompt; `seed` is the run's."""

    seed: int
    num_positive: int
    num_negative: int
    num_plain: int
    use_human_completions: bool
    placement: str
    sampling: SamplingParams
    rank_by: RankBy
    reward_margin: float
    max_prompt_length: int
    min_pair_fraction: float = 0.0
    negative_source: Literal["instruction", "other_prompts"] = "instruction"

    def counts(self) -> tuple[tuple[Polarity, int], ...]:
        """How many completions of each origin are sampled, good ones first (of two equal texts the first is kept)."""
        return (("positive", self.num_positive), ("plain", self.num_plain), ("negative", self.num_negative))


@dataclass(frozen=True)
class ExpandTools:
    """Who does the work. `negative_sampler` writes the negatives; `policy_logprobs` and `ref_logprobs` score every
    completion under the plain prompt, for the current and for the start policy (None: not computed).

    Samples and scores are kept on the disk every `shard_size` completions; reward functions are called with as many at most.
    `between_shards` is called before each of these pieces: what it raises (a run that is asked to stop) loses none.
    """

    tokenizer: Any
    bank: InstructionBank
    rewards: tuple[NamedReward, ...]
    sampler: Sampler
    negative_sampler: Sampler
    policy_logprobs: LogprobFunction | None = None
    ref_logprobs: LogprobFunction | None = None
    shard_size: int = 64
    between_shards: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Round:
    """A finished round. `next_position` is where the next one goes on in the stream of prompts."""

    index: int
    groups: tuple[CompletionGroup, ...]
    metrics: dict[str, float]
    next_position: int


def tally(progress: Progress | None, stage: str, total: int) -> Callable[[int], None]:
    """A counter of what a stage has finished, which tells `progress` of every piece."""
    finished = 0

    def report(n: int) -> None:
        nonlocal finished
        finished += n
        if progress is not None:
            progress(stage, finished, total)

    return report


def prompt_at(n_rows: int, seed: int, position: int) -> int:
    """Row number at a position of the endless prompt stream: a fresh seeded shuffle for every pass over the data."""
    cycle, offset = divmod(position, n_rows)
    return _pass_order(n_rows, seed, cycle)[offset]


@lru_cache(maxsize=2)  # the pass a round is in, and the one it may end in: a shuffle of a million rows takes half a second
def _pass_order(n_rows: int, seed: int, cycle: int) -> tuple[int, ...]:
    order = list(range(n_rows))
    random.Random(f"{seed}/{cycle}").shuffle(order)
    return tuple(order)


def read_round(folder: Path) -> Round | None:
    """The finished round in a folder, or None when there is none. A manifest that its groups do not match is an error."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return None
    facts = read_json(manifest)
    groups_file = folder / "groups.parquet"
    if not groups_file.is_file() or sha256_of(groups_file) != facts["groups_sha256"]:
        raise DataError(f"{groups_file} does not match {manifest}: delete the folder {folder} and the round is made again")
    return Round(facts["round"], tuple(read_groups(groups_file)), facts["metrics"], facts["next_position"])


def next_position(folder: Path) -> int | None:
    """Where the prompts of the round after a finished one begin; None when the folder holds no finished round."""
    manifest = folder / "manifest.json"
    return int(read_json(manifest)["next_position"]) if manifest.is_file() else None


def set_aside_round(folder: Path, why: str) -> None:
    """Rename a round that is not to be read, with a warning."""
    aside = free_name(folder, ".incomplete")
    if (folder / "manifest.json").is_file():  # nobody is to take it for a finished round
        (folder / "manifest.json").replace(folder / "manifest.old.json")
    folder.replace(aside)
    logger.warning("%s is now %s and is made again: %s", folder, aside.name, why)


def set_aside_if_damaged(folder: Path) -> None:
    """Set a finished round aside when its groups are not what was written. Only for a round that can be made again: the
    policy must be the one that sampled it."""
    try:
        read_round(folder)
    except DataError as error:
        set_aside_round(folder, str(error))


def expand(
    rows: Sequence[PromptRow],
    *,
    num_groups: int,
    position: int,
    round_index: int,
    params: ExpandParams,
    tools: ExpandTools,
    folder: Path,
    progress: Progress | None = None,
) -> Round:
    """Make one round of up to `num_groups` groups, or read it when it is finished on disk.

    Prompts whose completions make no pair are counted and left out, and the prompts that follow take their place, as long
    as this pass's share of prompts lasts (each prompt at most once a round, at most twice `num_groups` prompts).

    Raises CollapseError when fewer than `min_pair_fraction` of the prompts made a pair, or none did.
    """
    finished = read_round(folder)
    if finished is not None:
        return finished
    budget = min(len(rows), 2 * num_groups)
    kept: list[CompletionGroup] = []
    everything: list[CompletionGroup] = []
    removed: Counter[str] = Counter()
    used = 0
    while len(kept) < num_groups and used < budget:
        take = min(num_groups - len(kept), budget - used)
        chosen = [rows[prompt_at(len(rows), params.seed, position + used + i)] for i in range(take)]
        chosen = [row for i, row in enumerate(chosen) if row.id not in {g.prompt_id for g in everything} | {r.id for r in chosen[:i]}]
        work = folder / "work" / f"{used:06d}"
        groups = _slice(chosen, round_index, params, tools, work, removed, progress)
        everything += groups
        kept += [g for g in groups if _has_pair(g, params)]
        used += take
    _check_pairs(len(kept), len(everything), params, removed)
    names = [r.name for r in tools.rewards]
    metrics = round_metrics(everything, kept, removed, names)
    groups_file = folder / "groups.parquet"
    write_table(groups_file, groups_to_table(kept, names))
    manifest = {
        "format": FORMAT,
        "round": round_index,
        "groups": len(kept),
        "prompts": len(everything),
        "next_position": position + used,
        "groups_sha256": sha256_of(groups_file),
        "reward_names": names,
        "metrics": metrics,
    }
    write_json(folder / "manifest.json", manifest)
    shutil.rmtree(folder / "work", ignore_errors=True)
    return Round(round_index, tuple(kept), metrics, position + used)


def _slice(
    rows: Sequence[PromptRow],
    round_index: int,
    params: ExpandParams,
    tools: ExpandTools,
    work: Path,
    removed: Counter[str],
    progress: Progress | None,
) -> list[CompletionGroup]:
    """Sample, filter and score some prompts; each finished stage is kept in `work`."""
    if not rows:
        return []
    sampled_file, plan_file = work / "sampled.parquet", work / "plan.json"
    plan = _plan(rows, round_index, params, tools)
    found = read_json(plan_file) if plan_file.is_file() else None
    if found is None or found["sampling"] != plan["sampling"]:
        # Work of other rows or other settings: start this slice again rather than mix two runs.
        shutil.rmtree(work, ignore_errors=True)
    elif found != plan:
        for path in work.glob("scored-*.parquet"):
            path.unlink()
    write_json(plan_file, plan)
    if sampled_file.is_file():
        sampled = read_groups(sampled_file)
    else:
        sampled = _sample(rows, round_index, params, tools, work, progress)
        write_table(sampled_file, groups_to_table(sampled))
    filtered = [_filtered(g, removed) for g in sampled]
    return scored_in_shards(
        filtered,
        lambda numbers: _add_logprobs(scored([filtered[i] for i in numbers], [rows[i] for i in numbers], tools.rewards), tools),
        folder=work,
        size=tools.shard_size,
        reward_names=[r.name for r in tools.rewards],
        between=tools.between_shards,
        progress=tally(progress, "score", len(filtered)),
    )


def _plan(rows: Sequence[PromptRow], round_index: int, params: ExpandParams, tools: ExpandTools) -> dict[str, Any]:
    """What decides the samples and scores of a slice, as JSON: kept work is taken up only when it is the same."""
    return {
        "sampling": {
            "format": FORMAT,
            "round": round_index,
            "rows": [[row.id, row.prompt, row.chosen, row.rejected] for row in rows],
            "params": json.loads(json.dumps(asdict(params))),
            "bank": [[pair.positive, pair.negative] for pair in tools.bank.pairs],
        },
        "rewards": [[reward.name, reward.weight] for reward in tools.rewards],
    }


# ---- sample ----------------------------------------------------------------------------------------------------------


def _sample(
    rows: Sequence[PromptRow], round_index: int, params: ExpandParams, tools: ExpandTools, work: Path, progress: Progress | None
) -> list[CompletionGroup]:
    plain_ids = [_checked_prompt_ids(row, params, tools) for row in rows]
    plans: list[tuple[int, Polarity, int, str | None, SampleRequest]] = []
    for r in range(len(rows)):
        for polarity, count in params.counts():
            asked, written_as, first = _writer(r, rows, polarity, params)
            if asked is None or not count:
                continue
            pair = draw_pair(tools.bank, run_seed=params.seed, round_index=round_index, prompt_id=asked.id)
            instruction = {"positive": pair.positive, "negative": pair.negative, "plain": None}[written_as]
            ids = plain_ids[r]
            if instruction is not None:
                ids = tuple(prompt_ids(tools.tokenizer, *instructed(asked.prompt, instruction, params.placement)))
            for index in range(count):
                seed = completion_seed(params.seed, round_index, asked.id, written_as, first + index)
                plans.append((r, polarity, index, instruction, SampleRequest(ids, seed)))
    report = tally(progress, "sample", len(plans))

    def names(numbers: Sequence[int]) -> str:
        return name_list([rows[plans[n][0]].id for n in numbers])

    def check(numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        _refuse_non_finite("log-probability", [rows[plans[n][0]].id for n in numbers], [s.logprob for s in samples])

    completions: dict[int, list[Completion]] = {r: [] for r in range(len(rows))}
    numbered = list(enumerate(p[4] for p in plans))
    # Good and bad answers may come from two policies; one policy draws all of them in the same full batches.
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
        shards = SampleShards(work, tools.shard_size)
        drawn |= shards.draw(sampler, mine, params.sampling, check=check, names=names, between=tools.between_shards, progress=report)
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
            completions[r] += human_completions(row, tools.tokenizer, params.sampling.max_new_tokens)
    return [CompletionGroup(row.id, row.prompt, plain_ids[r], tuple(completions[r])) for r, row in enumerate(rows)]


def _writer(r: int, rows: Sequence[PromptRow], polarity: Polarity, params: ExpandParams) -> tuple[PromptRow | None, Polarity, int]:
    """Whose prompt a completion of row `r` answers, under which instruction, and the first index that its seeds count from.

    Its own, but for negatives from other prompts: those are the next row's good answers, drawn beside the ones that row
    keeps. A row that is alone has nobody to take them from.
    """
    if polarity != "negative" or params.negative_source == "instruction":
        return rows[r], polarity, 0
    return (rows[(r + 1) % len(rows)] if len(rows) > 1 else None), "positive", params.num_positive


def _checked_prompt_ids(row: PromptRow, params: ExpandParams, tools: ExpandTools) -> tuple[int, ...]:
    ids = tuple(prompt_ids(tools.tokenizer, row.prompt))
    if len(ids) > params.max_prompt_length:
        raise DataError(
            f"{row.where}: the prompt is {len(ids)} tokens and max_prompt_length is {params.max_prompt_length}: raise it (the model's "
            "context allowing), or drop the row; prompts are never cut"
        )
    return ids


def answer_ids(row: PromptRow, text: str, tokenizer: Any, max_length: int) -> tuple[tuple[int, ...], Literal["stop", "length"]]:
    """A human answer as the policy would write it: its tokens and the end-of-turn token, or cut without one.

    After a text prompt that does not end in white space ("…Assistant:") the answer begins with a space.
    """
    if isinstance(row.prompt, str) and row.prompt and not row.prompt[-1].isspace() and text and not text[0].isspace():
        text = " " + text
    conversational = not isinstance(row.prompt, str)
    ids = answer_text_ids(tokenizer, text, conversational=conversational)
    if len(ids) + 1 > max_length:
        return tuple(ids[:max_length]), "length"
    return (*ids, end_of_turn_id(tokenizer, conversational=conversational)), "stop"


def human_completions(row: PromptRow, tokenizer: Any, max_length: int) -> list[Completion]:
    """The data's own chosen and rejected answers. One longer than `max_length` tokens is cut, in text too: what is
    rewarded is what the policy is trained on."""
    out: list[Completion] = []
    origins: tuple[tuple[Origin, str | None], ...] = (("chosen", row.chosen), ("rejected", row.rejected))
    for origin, text in origins:
        if text is None:
            continue
        ids, finish_reason = answer_ids(row, text, tokenizer, max_length)
        kept = text if finish_reason == "stop" else tokenizer.decode(ids, skip_special_tokens=True).strip()
        out.append(Completion(origin=origin, index=0, text=kept, token_ids=ids, finish_reason=finish_reason))
    return out


# ---- filter ----------------------------------------------------------------------------------------------------------


def _filtered(group: CompletionGroup, removed: Counter[str]) -> CompletionGroup:
    """Without blank answers, repeats of another's text, and leaked instructions; each is counted by its reason."""
    kept: list[Completion] = []
    seen: set[str] = set()
    for c in group.completions:
        if not c.text.strip():
            removed["empty"] += 1
        elif c.text in seen:
            removed["duplicate"] += 1
        elif leaks_instruction(c.text, c.instruction):
            removed["leak"] += 1
        else:
            seen.add(c.text)
            kept.append(c)
    return replace(group, completions=tuple(kept))


# ---- score -----------------------------------------------------------------------------------------------------------


def _add_logprobs(groups: Sequence[CompletionGroup], tools: ExpandTools) -> list[CompletionGroup]:
    prompts = [g.prompt_ids for g in groups for _ in g.completions]
    completions = [c.token_ids for g in groups for c in g.completions]
    nothing: list[tuple[float, ...]] = [()] * len(completions)
    if not completions:
        return list(groups)
    policy = nothing if tools.policy_logprobs is None else tools.policy_logprobs(prompts, completions)
    ref = policy  # before the first step the two policies are one
    if tools.ref_logprobs is not tools.policy_logprobs:
        ref = nothing if tools.ref_logprobs is None else tools.ref_logprobs(prompts, completions)
    owners = [g.prompt_id for g in groups for _ in g.completions]
    _refuse_non_finite("policy's log-probability", owners, [sum(row) for row in policy])
    _refuse_non_finite("start policy's log-probability", owners, [sum(row) for row in ref])
    both = iter(zip(policy, ref, strict=True))
    out = []
    for g in groups:
        pairs = [next(both) for _ in g.completions]
        done = [replace(c, policy_logprobs=p, ref_logprobs=r) for c, (p, r) in zip(g.completions, pairs, strict=True)]
        out.append(replace(g, completions=tuple(done)))
    return out


def _refuse_non_finite(name: str, prompts: Sequence[str], values: Sequence[float]) -> None:
    found = not_finite(name, prompts, values)
    if found is not None:
        raise CollapseError(
            f"{found}. The weights hold numbers that are not finite, or computing in half precision overflowed: nothing of it was "
            "kept; go on from the last checkpoint with a smaller learning rate, or with bf16: false"
        )


# ---- rank ------------------------------------------------------------------------------------------------------------


def _has_pair(group: CompletionGroup, params: ExpandParams) -> bool:
    return bool(ordered_pairs(rank_keys(group, params.rank_by), params.reward_margin))


def _check_pairs(kept: int, tried: int, params: ExpandParams, removed: Counter[str]) -> None:
    if kept == 0 or kept < params.min_pair_fraction * tried:
        raise CollapseError(
            f"{kept} of {tried} prompts gave two completions whose rewards differ by more than "
            f"reward_margin={params.reward_margin} ({removed['empty']} empty answers were left out): there is too little to rank. "
            "Either the reward does not tell these answers "
            "apart (try another reward, or a smaller margin), or the policy no longer obeys the negative instruction "
            "(negative_policy: initial, or fewer rounds); the last checkpoint is kept"
        )
