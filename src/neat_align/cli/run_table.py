"""A run's result in the terminal: before and after, and where everything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def print_result(result: dict[str, Any], run: Path) -> None:
    """The before/after table of a run, and where everything is."""
    from rich.console import Console

    console = Console()
    if "reward_before" in result:
        console.print(result_table(result))
    print_closing(console, result, run)


def print_closing(console: Any, result: dict[str, Any], run: Path) -> None:
    """What a run took, where everything is, and the next command; the last lines of every run."""
    if result["stopped_because"]:
        console.print(f"stopped early: {result['stopped_because']}", markup=False, style="yellow")
    minutes, gib = result["wall_seconds"] / 60, result["peak_rss_bytes"] / 2**30
    lines = [
        f"{result['rounds']} rounds, {result['steps']} steps, {minutes:.1f} minutes, {gib:.1f} "
        "GiB at most",
        f"model   {run / 'model'}",
        f"report  {run / 'report.html'}",
        f"numbers {run / 'result.json'}",
        "",
        f"look at what it wrote:  neat-align inspect {run} --sort gap",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def result_table(result: dict[str, Any]) -> Any:
    """Before and after, side by side; a rich renderable."""
    from rich.table import Table

    table = Table(
        title=f"{result['held_out_prompts']} held-out prompts, plain, the same seeds before and "
        "after",
        title_justify="left",
    )
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)

    def row(name: str, key: str, change: str = "") -> None:
        before, after = result.get(f"{key}_before"), result.get(f"{key}_after")
        if before is not None and after is not None:
            table.add_row(
                name, f"{before:.3g}", f"{after:.3g}", change or f"{after / before - 1:+.1%}"
            )

    row("reward", "reward", _interval(result, "reward_delta"))
    row(
        f"second judge ({result['second_judge']})",
        "second_judge",
        _interval(result, "second_judge_delta"),
    )
    row("perplexity of reference answers", "perplexity")
    row("distinct-2", "distinct2")
    row("mean length, tokens", "mean_length")
    if result["kl_per_token"] is not None:
        table.add_row("KL to the start, nats per token", "0", f"{result['kl_per_token']:.3f}", "")
    return table


def _interval(result: dict[str, Any], key: str) -> str:
    if result.get(key) is None:
        return ""
    low, high = result[f"{key}_ci95"]
    return f"{result[key]:+.3f} [{low:+.3f}, {high:+.3f}]"
