"""Groups as other trainers read them: ranked lists and preference pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.ranking import RankBy, extremes, rank_keys

# ---- Exports -------------------------------------------------------------------------------------


def ranked_rows(
    groups: Iterable[CompletionGroup], *, rank_by: RankBy = "reward"
) -> list[dict[str, Any]]:
    """One row a group: `prompt`, `completions`, `rewards`, `origins`, best first (PRO's and RRHF's
    shape).
    """
    rows = []
    for g in groups:
        keyed = zip(rank_keys(g, rank_by), g.completions, strict=True)
        order = [
            c
            for _, c in sorted(
                keyed, key=lambda pair: -math.inf if pair[0] is None else pair[0], reverse=True
            )
        ]
        rows.append(
            {
                "prompt": g.prompt,
                "completions": [c.text for c in order],
                "rewards": [c.reward for c in order],
                "origins": [c.origin for c in order],
            }
        )
    return rows


def preference_rows(
    groups: Iterable[CompletionGroup], *, margin: float = 0.0, rank_by: RankBy = "reward"
) -> list[dict[str, Any]]:
    """One row a group: best against worst, in TRL's preference format.

    Groups without such a pair are left out.
    """
    rows = []
    for g in groups:
        ends = extremes(rank_keys(g, rank_by), margin)
        if ends is None:
            continue
        best, worst = (g.completions[i] for i in ends)
        chosen: Any = best.text
        rejected: Any = worst.text
        if not isinstance(g.prompt, str):
            chosen = [{"role": "assistant", "content": best.text}]
            rejected = [{"role": "assistant", "content": worst.text}]
        rows.append(
            {
                "prompt": g.prompt,
                "chosen": chosen,
                "rejected": rejected,
                "chosen_reward": best.reward,
                "rejected_reward": worst.reward,
                "chosen_origin": best.origin,
                "rejected_origin": worst.origin,
            }
        )
    return rows
