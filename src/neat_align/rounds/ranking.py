"""The order of a group's completions: what ranks them, which pairs there are, which is the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from neat_align.rounds.completions import CompletionGroup, Origin

RankBy: TypeAlias = Literal["reward", "origin", "origin_then_reward"]
PairSelection: TypeAlias = Literal["all", "best_worst"]
# What `rank_by: origin` means: a larger number is better; equal numbers make no pair.
ORIGIN_RANK: dict[Origin, int] = {
    "positive": 2,
    "chosen": 2,
    "plain": 1,
    "negative": 0,
    "rejected": 0,
}
# Origins that were written to be bad; never the target of the language-modelling loss by default.
BAD_ORIGINS: frozenset[Origin] = frozenset({"negative", "rejected"})
# How far `rank_by: origin_then_reward` puts the best bad completion below the worst good one, in
# reward units.
ORIGIN_STEP = 1.0


def rank_keys(group: CompletionGroup, rank_by: RankBy) -> list[float | None]:
    """The number by which each completion is ranked, higher is better; None takes part in no pair.

    For `origin_then_reward` the rewards of negative and rejected completions are shifted together
    so that the best of them stands `ORIGIN_STEP` below the worst of the others.
    """
    if rank_by == "origin":
        return [float(ORIGIN_RANK[c.origin]) for c in group.completions]
    keys = [c.reward for c in group.completions]
    if rank_by == "reward":
        return keys
    is_bad = [c.origin in BAD_ORIGINS for c in group.completions]
    good = [k for k, bad in zip(keys, is_bad, strict=True) if k is not None and not bad]
    low = [k for k, bad in zip(keys, is_bad, strict=True) if k is not None and bad]
    if not good or not low:
        return keys
    shift = min(good) - ORIGIN_STEP - max(low)
    return [k + shift if k is not None and bad else k for k, bad in zip(keys, is_bad, strict=True)]


def ordered_pairs(keys: Sequence[float | None], margin: float) -> list[tuple[int, int]]:
    """Pairs (i, j) with key i above key j by more than `margin`.

    Ties, near-ties and missing keys make no pair.
    """
    present = [(i, k) for i, k in enumerate(keys) if k is not None]
    return [(i, j) for i, a in present for j, b in present if a - b > margin]


def best_index(
    group: CompletionGroup,
    keys: Sequence[float | None],
    *,
    allow_bad_origins: bool = False,
    allow_cut: bool = False,
) -> int | None:
    """Index of the language-modelling target y*: the completion with the highest key.

    `keys` are `rank_keys`. Completions of negative or rejected origin are eligible only with
    `allow_bad_origins`, cut ones only with `allow_cut` (they have no end of turn, so they teach
    nothing about where to stop); ones without a key never are. Ties go to the earlier completion.
    None when nothing is eligible.
    """
    best: int | None = None
    best_key = -math.inf
    for i, (c, key) in enumerate(zip(group.completions, keys, strict=True)):
        eligible = (allow_cut or c.finish_reason == "stop") and (
            allow_bad_origins or c.origin not in BAD_ORIGINS
        )
        if eligible and key is not None and key > best_key:
            best, best_key = i, key
    return best


def extremes(keys: Sequence[float | None], margin: float) -> tuple[int, int] | None:
    """Indices of the best and the worst key; None when they are within `margin`.

    Where several are equal, the earlier one.
    """
    present = [(i, k) for i, k in enumerate(keys) if k is not None]
    if not present:
        return None
    best, worst = max(present, key=lambda pair: pair[1]), min(present, key=lambda pair: pair[1])
    return (best[0], worst[0]) if best[1] - worst[1] > margin else None


def kept_completions(group: CompletionGroup, indices: Iterable[int | None]) -> CompletionGroup:
    """The group with only these completions, in their order.

    The first one where none is named, since a group is never empty.
    """
    wanted = {i for i in indices if i is not None} or {0}
    return replace(
        group, completions=tuple(c for i, c in enumerate(group.completions) if i in wanted)
    )
