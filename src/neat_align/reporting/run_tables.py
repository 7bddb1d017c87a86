"""A run's tables: before and after, each of several rewards, and the contrast that is left."""

from __future__ import annotations

from typing import Any, TypeAlias

from neat_align.reporting.pages import bounds, digits_for, plain, signed
from neat_align.reporting.run_files import RunContents, interval_of, number

# (what, before, after, change, interval)
Row: TypeAlias = tuple[str, str, str, str, str]


def before_after_rows(run: RunContents) -> list[Row]:
    """(what, before, after, change, interval) of everything that was measured twice.

    Of several rewards each stands below their sum, and each further judge below the first.
    """
    judge = run.result.get("second_judge")
    rewards, judges = run.single("by_reward"), run.single("by_judge")
    of_sum = f"Reward, weighted sum of {len(rewards)}" if rewards else "Reward"
    rows = [
        measured_row(run, of_sum, "reward"),
        *(_single(f"Reward: {name}", found) for name, found in rewards),
        measured_row(run, f"Second judge: {judge}", "second_judge"),
        *(_single(f"Judge: {name}", found) for name, found in judges if name != judge),
        measured_row(run, "Perplexity of preferred answers", "perplexity"),
        measured_row(run, "Distinct-2", "distinct2"),
        measured_row(run, "Length, tokens", "mean_length"),
        measured_row(run, "Share cut at the limit", "clipped"),
    ]
    return [row for row in (*rows, kl_row(run)) if row is not None]


def kl_row(run: RunContents) -> Row | None:
    """The KL to the start, which begins at 0; None where it was not measured."""
    kl = number(run.result.get("kl_per_token"))
    if kl is None:
        return None
    return "KL to the start, nats per token", plain(0, 3), plain(kl, 3), signed(kl, 3), ""


def measured_row(run: RunContents, label: str, name: str) -> Row | None:
    """A number of the result that was measured twice; None where a side is missing."""
    both = run.both(name)
    if both is None:
        return None
    digits = 1 if name == "mean_length" else digits_for(both)
    before, after = (plain(v, digits) for v in both)
    by, interval = signed(run.delta(name), digits), bounds(*run.interval(name), digits)
    return label, before, after, by, interval


def _single(label: str, found: dict[str, Any]) -> Row | None:
    before, after = number(found.get("before")), number(found.get("after"))
    if before is None or after is None:
        return None
    digits = digits_for((before, after))
    low, high = interval_of(found.get("delta_ci95"))
    interval = bounds(low, high, digits)
    return (
        label,
        plain(before, digits),
        plain(after, digits),
        signed(found.get("delta"), digits),
        interval,
    )


def single_reward_rows(run: RunContents) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """(names, (round, mean of each) rows) of several rewards, unweighted, as they were sampled;
    nothing to show for one.
    """
    names = list(dict.fromkeys(n for r in run.rounds for n in _single_names(r.metrics)))
    if len(names) < 2:
        return [], []
    rows = [
        (r.name, [number(r.metrics.get(f"rewards/{name}/mean")) for name in names])
        for r in run.rounds
    ]
    return names, rows


def _single_names(metrics: dict[str, float]) -> list[str]:
    ends = ("rewards/", "/mean")
    return [
        key[len(ends[0]) : -len(ends[1])]
        for key in metrics
        if key.startswith(ends[0]) and key.endswith(ends[1])
    ]


def contrast_rows(run: RunContents) -> list[tuple[str, str, str, str]]:
    """(instruction, before, after, change) of the mean held-out reward, and of the gap between the
    two instructions.
    """
    before, after = (_contrast(run, side) for side in ("before", "after"))
    names = [n for n in ("positive", "plain", "negative", "gap") if n in before and n in after]
    digits = digits_for([*before.values(), *after.values()])
    return [
        (n, plain(before[n], digits), plain(after[n], digits), signed(after[n] - before[n], digits))
        for n in names
    ]


def _contrast(run: RunContents, side: str) -> dict[str, float]:
    """The mean held-out reward under each instruction, with the gap where both are known."""
    measured = run.result.get(f"contrast_{side}") or {}
    means = {name: v for name in measured if (v := number(measured[name])) is not None}
    if "positive" in means and "negative" in means:
        means["gap"] = means["positive"] - means["negative"]
    return means
