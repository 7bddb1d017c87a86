"""A comparison's table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.table import Table

from neat_align.comparison.outcomes import Run


def comparison_table(result: Mapping[str, Any]) -> Table:
    """The comparison as a table of at most 80 columns; a rich renderable.

    Changes are against the start policy.
    """
    judge = next(iter(result["judges"]), None)
    target = result["kl_target"]
    equal = f"at KL {target:.3g}" if target else "at equal KL"
    table = Table(
        title=f"{result['name']}: change over base, 95 % interval",
        title_justify="left",
        padding=(0, 1, 0, 0),
    )
    for heading in (
        "method",
        "reward",
        *([judge] if judge else []),
        f"{judge or 'reward'} {equal}",
        "KL",
        "ppl",
        "len",
    ):
        table.add_column(
            heading, justify="left" if heading == "method" else "right", overflow="fold"
        )
    for row in result["table"]:
        at, kl = row["at_budget"], row["at_equal_kl"] or {}
        name = (
            f"{row['method']} (collapsed {row['collapsed']}/{row['runs']})"
            if row["collapsed"]
            else row["method"]
        )
        key = f"judges/{judge}" if judge else "reward"
        cells = [
            _change(at.get("reward")),
            *([_change(at.get(key))] if judge else []),
            _change(kl.get(key)),
        ]
        cells += [
            f"{at['kl']['mean']:.3f}" if at else "",
            _ratio(at.get("perplexity")),
            _ratio(at.get("mean_length")),
        ]
        table.add_row(name, *cells)
    return table


def _change(fact: Mapping[str, Any] | None) -> str:
    if not fact or (fact["mean"] if "delta" not in fact else fact["delta"]) is None:
        return "–"
    return (
        f"{fact['delta']:+.3f}\n[{fact['low']:+.3f}, {fact['high']:+.3f}]"
        if "delta" in fact
        else f"{fact['mean']:.3f}"
    )


def _ratio(fact: Mapping[str, Any] | None) -> str:
    return f"{fact['ratio'] - 1:+.1%}" if fact and "ratio" in fact else "–"


def run_line(i: int, total: int, run: Run, took: Sequence[float]) -> str:
    """One line for a finished run: what it gained, at which KL, and how long the rest will take.

    `took` are the seconds of the runs that were made, not read.
    """
    left = f", about {fmean(took) * (total - i) / 60:.0f} min left" if took and i < total else ""
    facts = [f"{run.seconds:.0f} s{left}"]
    if run.points:
        last = run.points[-1]
        rewards = [v for v in last.evaluation["rewards"] if v is not None]
        reward = [f"reward {fmean(rewards):.2f}"] if rewards else []
        facts = [*reward, f"KL {last.kl:.3f}", *facts]
    mark = f"  COLLAPSED: {run.collapsed}" if run.collapsed else ""
    return f"[{i}/{total}] {run.method} ({run.strength}) seed {run.seed}: {', '.join(facts)}{mark}"
