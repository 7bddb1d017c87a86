"""The score stage of a round, and of an evaluation: rows of the data and their completions in, rewards out.

A round is scored in batches of whole groups (so that a reward that compares the completions of one prompt sees all of them), and
each batch's scores are kept as a file as soon as they are there: a reward that fails later, or a crash, does not make a finished
batch be paid for twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neat_align.data import PromptRow
from neat_align.groups import CompletionGroup
from neat_align.rewards import NamedReward, ScoredRows, score
from neat_align.storage import read_json, write_json

logger = logging.getLogger(__name__)

# Rows of a batch: it ends with the group that reaches this.
BATCH_ROWS = 64


def scored_groups(
    groups: Sequence[CompletionGroup], rows: Sequence[PromptRow], rewards: tuple[NamedReward, ...], folder: Path
) -> list[CompletionGroup]:
    """The groups with rewards. Finished batches are kept in `folder` and taken up from there; `rows` are the groups' rows."""
    if not rewards:
        return list(groups)
    return [
        group
        for first, end in _batches([len(g.completions) for g in groups])
        for group in _scored_batch(groups[first:end], rows[first:end], rewards, folder / f"{first:06d}.json")
    ]


def _batches(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of groups with at least BATCH_ROWS rows each, but for the last."""
    first, held = 0, 0
    for i, size in enumerate(sizes, start=1):
        held += size
        if held >= BATCH_ROWS or i == len(sizes):
            yield first, i
            first, held = i, 0


def _scored_batch(
    groups: Sequence[CompletionGroup], rows: Sequence[PromptRow], rewards: tuple[NamedReward, ...], path: Path
) -> list[CompletionGroup]:
    flat = [(row, c) for group, row in zip(groups, rows, strict=True) for c in group.completions]
    texts = [(row.id, c.text) for row, c in flat]
    scored = _kept(path, texts)
    if scored is None:
        scored = score_texts([row for row, _ in flat], [c.text for _, c in flat], [c.token_ids for _, c in flat], rewards)
        write_json(path, {"rewards": scored.rewards, "components": scored.components, "sha256": _digest(texts, scored)})
    values = iter(zip(scored.rewards, scored.components, strict=True))
    done = []
    for group in groups:
        pairs = [(c, *next(values)) for c in group.completions]
        done.append(replace(group, completions=tuple(replace(c, reward=r, reward_components=parts) for c, r, parts in pairs)))
    return done


def _kept(path: Path, texts: Sequence[tuple[str, str]]) -> ScoredRows | None:
    """A finished batch's scores, if they are there, whole, and of these texts."""
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        scored = ScoredRows(tuple(found["rewards"]), tuple(tuple(row) for row in found["components"]))
        if found["sha256"] == _digest(texts, scored):
            return scored
    except (ValueError, KeyError, TypeError):
        pass  # not what was written; said below
    logger.warning("%s is damaged, or of other completions: these are scored again", path)
    return None


def _digest(texts: Sequence[tuple[str, str]], scored: ScoredRows) -> str:
    """Over a batch's row ids, completions and scores: a changed digit in a file must not become a reward."""
    return hashlib.sha256(json.dumps([texts, scored.rewards, scored.components]).encode("ascii")).hexdigest()


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
