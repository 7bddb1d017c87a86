"""Groups as other trainers read them: ranked lists and preference pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.ranking import RankBy, extremes, rank_keys


def ranked_rows(
    groups: Iterable[CompletionGroup], *, rank_by: RankBy = "reward"
) -> list[dict[str, Any]]:
    """One row a group: `prompt`, `completions`, `rewards`, `origins`, best first.

    The shape that PRO and RRHF train on. Completions without a rank come last.
    """
    rows = []
    for group in groups:
        ranked = _best_first(group, rank_by)
        rows.append(
            {
                "prompt": group.prompt,
                "completions": [c.text for c in ranked],
                "rewards": [c.reward for c in ranked],
                "origins": [c.origin for c in ranked],
            }
        )
    return rows


def preference_rows(
    groups: Iterable[CompletionGroup], *, margin: float = 0.0, rank_by: RankBy = "reward"
) -> list[dict[str, Any]]:
    """One row a group: best against worst, in TRL's preference format.

    Groups whose best and worst are within `margin` are left out.
    """
    rows = []
    for group in groups:
        ends = extremes(rank_keys(group, rank_by), margin)
        if ends is None:
            continue
        best, worst = (group.completions[i] for i in ends)
        conversational = not isinstance(group.prompt, str)
        rows.append(
            {
                "prompt": group.prompt,
                "chosen": _answer(best, conversational),
                "rejected": _answer(worst, conversational),
                "chosen_reward": best.reward,
                "rejected_reward": worst.reward,
                "chosen_origin": best.origin,
                "rejected_origin": worst.origin,
            }
        )
    return rows


def _best_first(group: CompletionGroup, rank_by: RankBy) -> list[Completion]:
    keys = [-math.inf if key is None else key for key in rank_keys(group, rank_by)]
    order = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
    return [group.completions[i] for i in order]


def _answer(completion: Completion, conversational: bool) -> Any:
    if conversational:
        return [{"role": "assistant", "content": completion.text}]
    return completion.text
