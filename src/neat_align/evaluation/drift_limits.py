"""How far the policy has gone from its start, and when that is too far.

Measured on plain samples of a fixed set of prompts. What passes `max_kl` or `min_distinct2_ratio`
stops the run after its round (`drift_monitor`, and `trainer/round_callback.py`, which acts on it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from neat_align.evaluation.held_out import EvalTools, evaluate_policy
from neat_align.prompts.rows import PromptRow


def measure_drift(
    rows: Sequence[PromptRow], tools: EvalTools, *, seed: int, prompts: int
) -> dict[str, float]:
    """KL to the start, entropy (nats per token), distinct-2, mean length (tokens), share cut."""
    fixed = sorted(rows, key=lambda row: row.id)[:prompts]
    rows_alone = [_without_answers(row) for row in fixed]
    summary = evaluate_policy(rows_alone, tools, seed=seed, contrast=False).summary()
    names = {"completions/mean_length": "mean_length", "completions/clipped_ratio": "clipped_ratio"}
    wanted = ("kl", "entropy", "distinct2", *names)
    return {names.get(k, k): v for k, v in summary.items() if k in wanted}


def drift_ratios(facts: dict[str, float], start: dict[str, float]) -> dict[str, float]:
    """Distinct-2 and mean length as shares of their values at the start."""
    # No answer with two words has no distinct-2: that is the collapse it is there to see.
    distinct2 = facts.get("distinct2", 0.0) / start["distinct2"] if start.get("distinct2") else 1.0
    return {
        "distinct2_ratio": distinct2,
        "length_ratio": facts["mean_length"] / max(start["mean_length"], 1e-9),
    }


def limit_passed(
    facts: dict[str, float], *, max_kl: float | None, min_distinct2_ratio: float
) -> str | None:
    """Why training should stop, or None."""
    if max_kl is not None and facts["kl"] > max_kl:
        return f"KL to the start is {facts['kl']:.3f} nats per token, over max_kl={max_kl}"
    if facts["distinct2_ratio"] < min_distinct2_ratio:
        return (
            f"distinct-2 of plain answers fell to {facts['distinct2_ratio']:.0%} of the start, "
            f"under min_distinct2_ratio={min_distinct2_ratio}: the answers are becoming one"
        )
    return None


def _without_answers(row: PromptRow) -> PromptRow:
    return replace(row, chosen=None, rejected=None, columns={})
