"""What the judges of a run used in all, from its log."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TOTAL = re.compile(
    r"(?:\w+_)?judge/(.+)/(calls|cached|failed|prompt_tokens|completion_tokens|cost)$"
)


def judge_totals(metrics_file: Path) -> dict[str, dict[str, float]]:
    """By judge, the sums over rounds and evaluations of a run's metrics.jsonl; none without judges.

    Work that a crash threw away, or that was read from the cache, is not in them.
    """
    totals: dict[str, dict[str, float]] = {}
    if not metrics_file.is_file():
        return totals
    with metrics_file.open(encoding="utf-8") as lines:
        for line in lines:
            if "judge/" not in line:
                continue
            for key, value in json.loads(line).items():
                found = _TOTAL.fullmatch(key)
                if found is not None and isinstance(value, int | float):
                    of_judge = totals.setdefault(found[1], {})
                    of_judge[found[2]] = of_judge.get(found[2], 0.0) + value
    return totals


def total_line(totals: Mapping[str, Any]) -> str:
    """A judge's totals in words: "96 calls (12 more from the cache), 2 failed, 10,560 tokens"."""
    number = {name: float(totals.get(name) or 0) for name in ("calls", "cached", "failed")}
    tokens = sum(float(totals.get(f"{what}_tokens") or 0) for what in ("prompt", "completion"))
    words = f"{number['calls']:,.0f} calls"
    if number["cached"]:
        words += f" ({number['cached']:,.0f} more from the cache)"
    if number["failed"]:
        words += f", {number['failed']:,.0f} judgements failed"
    words += f", {tokens:,.0f} tokens"
    cost = totals.get("cost")
    return words if cost is None else f"{words}, cost {float(cost):,.2f}"
