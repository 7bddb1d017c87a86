"""The score stage of a round, and of an evaluation: rows of the data and their completions in, rewards out.

What is handed in is scored in one call of every reward function. A round is handed over in shards of whole groups, which `shards`
keeps: a reward that fails later, or a crash, does not make a finished shard be paid for twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from neat_align.data import PromptRow
from neat_align.groups import CompletionGroup
from neat_align.rewards import NamedReward, ScoredRows, score


def scored(groups: Sequence[CompletionGroup], rows: Sequence[PromptRow], rewards: tuple[NamedReward, ...]) -> list[CompletionGroup]:
    """The groups with rewards; `rows` are the groups' rows. Without reward functions, the groups as they are."""
    if not rewards:
        return list(groups)
    flat = [(row, c) for group, row in zip(groups, rows, strict=True) for c in group.completions]
    found = score_texts([row for row, _ in flat], [c.text for _, c in flat], [c.token_ids for _, c in flat], rewards)
    values = iter(zip(found.rewards, found.components, strict=True))
    done = []
    for group in groups:
        pairs = [(c, *next(values)) for c in group.completions]
        done.append(replace(group, completions=tuple(replace(c, reward=r, reward_components=parts) for c, r, parts in pairs)))
    return done


def score_texts(
    rows: Sequence[PromptRow], texts: Sequence[str], ids: Sequence[Sequence[int]], rewards: tuple[NamedReward, ...]
) -> ScoredRows:
    """Rewards of answers to the plain prompts of `rows`, one a row, in one batch."""
    conversational = bool(rows) and not isinstance(rows[0].prompt, str)
    completions: list[Any] = [[{"role": "assistant", "content": t}] for t in texts] if conversational else list(texts)
    names = sorted({name for row in rows for name in row.columns} - {"prompts", "completions", "completion_ids"})
    return score(
        rewards,
        prompts=[row.prompt for row in rows],
        completions=completions,
        completion_ids=[list(i) for i in ids],
        columns={name: [row.columns.get(name) for row in rows] for name in names},
        labels=[row.where for row in rows],
    )
