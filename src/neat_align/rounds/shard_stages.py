"""What workers do with a shard, stage by stage: the policy's work, then the rewards'.

What is made in one process from the same rows is the same to the bit (`make_round`): batches are
cut alike, and a completion's seed is its own. Every stage takes up what an interrupted one has
finished, so a worker that dies costs one batch of samples, or of rewards, at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neat_align.errors import NEATError
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.filters import without_unusable
from neat_align.rounds.params import RoundParams, RoundTools
from neat_align.rounds.rollout_store import RolloutStore
from neat_align.rounds.sampling_stage import sampled_groups
from neat_align.rounds.scoring_stage import (
    group_batches,
    score_the_rest,
    with_contrasts,
    with_logprobs,
    with_rewards,
)
from neat_align.rounds.shards import (
    RolledOut,
    ShardStage,
    Slice,
    read_shard,
    write_shard,
)


@dataclass(frozen=True)
class Shard:
    """A slice that a worker is given, under its key; all of it can be pickled."""

    number: int
    key: str
    part: Slice
    round_index: int
    params: RoundParams
    reward_names: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self.part.folder


def sample_shard(shard: Shard, tools: RoundTools) -> None:
    """The policy's stage: completions, filtered, with log-probabilities and contrasts.

    Without rewards that finishes the shard.
    """
    if read_shard(shard.folder, "finished", shard.key) is not None:
        return
    store, part, params = RolloutStore(shard.folder), shard.part, shard.params
    store.open_for(part.plan)
    if read_shard(shard.folder, "unrewarded", shard.key) is not None:
        return
    sampled = sampled_groups(part.rows, shard.round_index, params, tools, store, _nobody)
    removed: Counter[str] = Counter()
    usable = [without_unusable(group, removed) for group in sampled]
    made: list[CompletionGroup] = []
    for _, batch in group_batches(usable, tools.batch_size):
        measured = with_logprobs(batch, tools, part.measured)
        made += with_contrasts(measured, tools.start_logprobs, params.weighing_pairs)
    stage: ShardStage = "unrewarded" if shard.reward_names else "finished"
    write_shard(shard.folder, stage, shard.key, RolledOut(made, removed))


def reward_shard(shard: Shard, tools: RoundTools) -> None:
    """The rewards' stage, which finishes the shard; it needs no policy."""
    if read_shard(shard.folder, "finished", shard.key) is not None:
        return
    unrewarded = read_shard(shard.folder, "unrewarded", shard.key)
    if unrewarded is None:
        raise not_shared(shard.folder)
    made = replace(unrewarded, groups=_rewarded(shard, list(unrewarded.groups), tools))
    write_shard(shard.folder, "finished", shard.key, made, shard.reward_names)


def not_shared(folder: Path) -> NEATError:
    """What is said where one process does not see what another one has written."""
    return NEATError(
        f"{folder} has not what another worker has just written there: all nodes have to see the "
        "run directory (beside --output) under one path, so put it on a disk that they share"
    )


def _rewarded(
    shard: Shard, groups: Sequence[CompletionGroup], tools: RoundTools
) -> list[CompletionGroup]:
    """The groups with rewards: stored already, or made and stored, batch by batch."""
    store = RolloutStore(shard.folder)
    scored = score_the_rest(
        groups,
        shard.part.rows,
        store.read_scored(groups),
        lambda batch, rows: with_rewards(batch, rows, tools),
        tools,
        store,
        _nobody,
    )
    return [_with_scores_of(g, s) for g, s in zip(groups, scored, strict=True)]


def _with_scores_of(group: CompletionGroup, scored: CompletionGroup) -> CompletionGroup:
    """The group with another one's rewards: an earlier attempt may have stored them."""
    both = zip(group.completions, scored.completions, strict=True)
    completions = (
        replace(own, reward=c.reward, reward_components=c.reward_components) for own, c in both
    )
    return replace(group, completions=tuple(completions))


def _nobody(_: int) -> None:
    """Finished completions are told of when their shard is finished."""
