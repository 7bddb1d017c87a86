"""One round of data: sample → filter → score → rank, stage by stage on disk.

    prompts ──► completions under + and − instructions ──► leaks, blanks, repeats out
            ──► rewards and log-probabilities ──► groups with a pair

A round's folder holds `groups.parquet` and, written last, `manifest.json`: a folder with a manifest
is finished and is read instead of made again. Until then finished batches of samples and of scores
are kept in its `work` folder (`rollout_store`) and taken up.
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
from neat_align.prompts.rows import PromptRow
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.filters import without_unusable
from neat_align.rounds.metrics import round_metrics
from neat_align.rounds.params import Progress, RoundParams, RoundTools
from neat_align.rounds.prompt_order import prompt_at
from neat_align.rounds.ranking import ordered_pairs, rank_keys
from neat_align.rounds.rollout_store import RolloutStore
from neat_align.rounds.round_files import FORMAT, FinishedRound, read_round, write_round
from neat_align.rounds.sampling_stage import sample_groups
from neat_align.rounds.scoring_notes import read_notes, with_notes, write_lists
from neat_align.rounds.scoring_stage import score_groups


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

    `position` is where the round begins in the stream of prompts (`prompt_order`). Prompts whose
    completions make no pair are counted and left out, and the prompts that follow take their place,
    as long as the round's budget of prompts lasts (each prompt at most once a round, at most twice
    `num_groups` prompts).

    Raises CollapseError when fewer than `min_pair_fraction` of the prompts made a pair, or none
    did.
    """
    finished = read_round(folder)
    if finished is not None:
        return finished
    budget = min(len(rows), 2 * num_groups)
    sampled: list[CompletionGroup] = []
    kept: list[CompletionGroup] = []
    removed: Counter[str] = Counter()
    used = 0
    while len(kept) < num_groups and used < budget:
        take = min(num_groups - len(kept), budget - used)
        seen = {group.prompt_id for group in sampled}
        batch = _unseen_rows(rows, range(position + used, position + used + take), params, seen)
        store = RolloutStore(folder / "work" / f"{used:06d}")
        groups = _roll_out(batch, round_index, params, tools, store, removed, progress)
        sampled += groups
        kept += [group for group in groups if _has_pair(group, params)]
        used += take
    _refuse_too_few_pairs(len(kept), len(sampled), params, removed)
    reward_names = [reward.name for reward in tools.rewards]
    notes = read_notes(folder / "work")
    metrics = with_notes(round_metrics(sampled, kept, removed, reward_names), notes)
    write_lists(folder, notes)
    made = FinishedRound(round_index, tuple(kept), metrics, position + used)
    write_round(folder, made, num_prompts=len(sampled), reward_names=reward_names)
    shutil.rmtree(folder / "work", ignore_errors=True)
    return made


def _unseen_rows(
    rows: Sequence[PromptRow], positions: range, params: RoundParams, seen: set[str]
) -> list[PromptRow]:
    """The rows at these positions of the prompt stream, each prompt once and none of `seen`.

    A round that runs from one pass over the data into the next can meet a prompt again.
    """
    unseen: dict[str, PromptRow] = {}
    for position in positions:
        row = rows[prompt_at(len(rows), params.seed, position)]
        if row.id not in seen:
            unseen.setdefault(row.id, row)
    return list(unseen.values())


def _roll_out(
    rows: Sequence[PromptRow],
    round_index: int,
    params: RoundParams,
    tools: RoundTools,
    store: RolloutStore,
    removed: Counter[str],
    progress: Progress | None,
) -> list[CompletionGroup]:
    """Sample, filter and score these prompts; what is finished is in `store`."""
    if not rows:
        return []
    store.open_for(_plan(rows, round_index, params, tools))
    sampled = store.read_sampled()
    if sampled is None:
        sampled = sample_groups(rows, round_index, params, tools, store, progress)
        store.write_sampled(sampled)
    usable = [without_unusable(group, removed) for group in sampled]
    return score_groups(usable, rows, tools, store, progress)


def _plan(
    rows: Sequence[PromptRow], round_index: int, params: RoundParams, tools: RoundTools
) -> dict[str, Any]:
    """What decides the samples and scores of these prompts, as JSON.

    Stored work is taken up only where this is the same.
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


def _has_pair(group: CompletionGroup, params: RoundParams) -> bool:
    return bool(ordered_pairs(rank_keys(group, params.rank_by), params.reward_margin))


def _refuse_too_few_pairs(
    kept: int, sampled: int, params: RoundParams, removed: Counter[str]
) -> None:
    if kept == 0 or kept < params.min_pair_fraction * sampled:
        raise CollapseError(
            f"{kept} of {sampled} prompts gave two completions whose rewards differ by more than "
            f"reward_margin={params.reward_margin} ({removed['empty']} empty answers were left "
            "out): there is too little to rank. Either the reward does not tell these answers "
            "apart (try another reward, or a smaller margin), or the policy no longer obeys the "
            "negative instruction (negative_policy: initial, or fewer rounds); the last "
            "checkpoint is kept"
        )
