"""One round of data: sample → filter → score → rank, stage by stage on disk.

    prompts ──► completions under + and − instructions ──► leaks, blanks, repeats out ──► rewards
    ──► groups with a pair

A round's folder holds `groups.parquet` and, written last, `manifest.json`: a folder with a manifest
is finished and is read instead of made again. Until then finished shards of samples and of scores
are kept in the folder and taken up.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neat_align.errors import CollapseError
from neat_align.files.atomic import read_json, sha256_of, write_json, write_table
from neat_align.prompts.rows import PromptRow
from neat_align.rounds.completions import CompletionGroup, groups_to_table, read_groups
from neat_align.rounds.filters import without_unusable
from neat_align.rounds.metrics import round_metrics
from neat_align.rounds.params import Progress, RoundParams, RoundTools, progress_counter
from neat_align.rounds.prompt_order import prompt_at
from neat_align.rounds.ranking import ordered_pairs, rank_keys
from neat_align.rounds.rollout_store import scored_in_shards
from neat_align.rounds.round_files import FORMAT, FinishedRound, read_round
from neat_align.rounds.sampling_stage import sample_groups
from neat_align.rounds.scoring_stage import with_logprobs, with_rewards


def make_round(
    rows: Sequence[PromptRow],
    *,
    num_groups: int,
    position: int,
    round_index: int,
    params: RoundParams,
    tools: RoundTools,
    folder: Path,
    progress: Progress | None = None,
) -> FinishedRound:
    """Make one round of up to `num_groups` groups, or read it when it is finished on disk.

    Prompts whose completions make no pair are counted and left out, and the prompts that follow
    take their place, as long as this pass's share of prompts lasts (each prompt at most once a
    round, at most twice `num_groups` prompts).

    Raises CollapseError when fewer than `min_pair_fraction` of the prompts made a pair, or none
    did.
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
        chosen = [
            row
            for i, row in enumerate(chosen)
            if row.id not in {g.prompt_id for g in everything} | {r.id for r in chosen[:i]}
        ]
        work = folder / "work" / f"{used:06d}"
        groups = _groups_of(chosen, round_index, params, tools, work, removed, progress)
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
    return FinishedRound(round_index, tuple(kept), metrics, position + used)


def _groups_of(
    rows: Sequence[PromptRow],
    round_index: int,
    params: RoundParams,
    tools: RoundTools,
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
        sampled = sample_groups(rows, round_index, params, tools, work, progress)
        write_table(sampled_file, groups_to_table(sampled))
    usable = [without_unusable(g, removed) for g in sampled]
    return scored_in_shards(
        usable,
        lambda numbers: with_logprobs(
            with_rewards([usable[i] for i in numbers], [rows[i] for i in numbers], tools.rewards),
            tools,
        ),
        folder=work,
        size=tools.shard_size,
        reward_names=[r.name for r in tools.rewards],
        between=tools.between_shards,
        progress=progress_counter(progress, "score", len(usable)),
    )


def _plan(
    rows: Sequence[PromptRow], round_index: int, params: RoundParams, tools: RoundTools
) -> dict[str, Any]:
    """What decides the samples and scores of a slice, as JSON: kept work is taken up only when it
    is the same.
    """
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


# ---- rank ----------------------------------------------------------------------------------------


def _has_pair(group: CompletionGroup, params: RoundParams) -> bool:
    return bool(ordered_pairs(rank_keys(group, params.rank_by), params.reward_margin))


def _check_pairs(kept: int, tried: int, params: RoundParams, removed: Counter[str]) -> None:
    if kept == 0 or kept < params.min_pair_fraction * tried:
        raise CollapseError(
            f"{kept} of {tried} prompts gave two completions whose rewards differ by more than "
            f"reward_margin={params.reward_margin} ({removed['empty']} empty answers were left "
            "out): there is too little to rank. "
            "Either the reward does not tell these answers "
            "apart (try another reward, or a smaller margin), or the policy no longer obeys the "
            "negative instruction "
            "(negative_policy: initial, or fewer rounds); the last checkpoint is kept"
        )
