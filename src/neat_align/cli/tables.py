"""Results in the terminal: a run's before and after, and a comparison's methods, in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from neat_align.comparison.outcomes import Run
from neat_align.rewards.judge_totals import total_line

# ---- a run ---------------------------------------------------------------------------------------


def print_result(result: dict[str, Any], run: Path) -> None:
    """The before/after table of a run, what to be careful about, and where everything is."""
    console = Console()
    if "reward_before" in result:
        console.print(result_table(result))
    print_warnings(console, run)
    print_closing(console, result, run)


def print_closing(console: Console, result: dict[str, Any], run: Path) -> None:
    """What a run took, where everything is, and the next command; the last lines of every run."""
    if result["stopped_because"]:
        console.print(f"stopped early: {result['stopped_because']}", markup=False, style="yellow")
    took = f"{result['wall_seconds'] / 60:.1f} minutes"
    if result["peak_rss_bytes"] is not None:  # Windows does not say
        took += f", {result['peak_rss_bytes'] / 2**30:.1f} GiB at most"
    rounds, steps = _count(result["rounds"], "round"), _count(result["steps"], "step")
    lines = [
        f"{rounds}, {steps}, {took}",
        *(f"judge   {n}: {total_line(t)}" for n, t in result.get("judges_used", {}).items()),
        f"model   {run / 'model'}",
        f"report  {run / 'report.html'}",
        f"numbers {run / 'result.json'}",
        "",
        f"look at what it wrote:  neat-align inspect {run} --sort gap",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def print_warnings(console: Console, run: Path) -> None:
    """The warnings that the run's report begins with."""
    from neat_align.reporting.run_files import read_run
    from neat_align.reporting.run_warnings import warnings_of

    told = [text for key, text in warnings_of(read_run(run)) if key != "stopped"]  # said below
    if told:
        console.print("\nread with care", style="yellow")
    for text in told:
        item = Table.grid(padding=(0, 1))
        item.add_row(" -", Text(text.replace("\u00a0", " ")))
        console.print(item)
    if told:
        console.print()


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def result_table(result: dict[str, Any]) -> Table:
    """Before and after, side by side."""
    prompts = result["held_out_prompts"]
    table = Table(
        title=f"on {prompts} held-out prompts, plain, the same seeds before and after",
        title_justify="left",
    )
    table.add_column("", overflow="fold")  # names of rewards may be long
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)

    def line(name: str, before: float | None, after: float | None, change: str = "") -> None:
        if before is not None and after is not None:
            change = change or (f"{after / before - 1:+.1%}" if before else "")
            table.add_row(name, f"{before:.3g}", f"{after:.3g}", change)

    def row(name: str, key: str, change: str = "") -> None:
        line(name, result.get(f"{key}_before"), result.get(f"{key}_after"), change)

    rewards, judges = result.get("by_reward") or {}, result.get("by_judge") or {}
    judge = result["second_judge"]
    of_sum = f"reward, weighted sum of {len(rewards)}" if rewards else "reward"
    row(of_sum, "reward", _interval(result, "reward_delta"))
    for name, found in rewards.items():
        line(f"  {name}", found["before"], found["after"], _interval(found, "delta"))
    row(f"second judge ({judge})", "second_judge", _interval(result, "second_judge_delta"))
    for name, found in judges.items():
        if name != judge:
            line(f"judge ({name})", found["before"], found["after"], _interval(found, "delta"))
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


# ---- a comparison --------------------------------------------------------------------------------


def comparison_table(result: Mapping[str, Any]) -> Table:
    """The comparison as a table of at most 80 columns. Changes are against the start policy."""
    judge = next(iter(result["judges"]), None)
    judges = [] if judge is None else [judge]
    target = result["kl_target"]
    equal = f"at KL {target:.3g}" if target else "at equal KL"
    table = Table(
        title=f"{result['name']}: change over base, 95 % interval",
        title_justify="left",
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", overflow="fold")
    for heading in ("reward", *judges, f"{judge or 'reward'} {equal}", "KL", "ppl", "len"):
        table.add_column(heading, justify="right", overflow="fold")
    judged = f"judges/{judge}" if judge else "reward"
    for row in result["table"]:
        name = row["method"]
        if row["collapsed"]:
            name += f" (collapsed {row['collapsed']}/{row['runs']})"
        at_budget, at_equal_kl = row["at_budget"], row["at_equal_kl"] or {}
        table.add_row(
            name,
            _change(at_budget.get("reward")),
            *(_change(at_budget.get(judged)) for _ in judges),
            _change(at_equal_kl.get(judged)),
            f"{at_budget['kl']['mean']:.3f}" if at_budget else "",
            _ratio(at_budget.get("perplexity")),
            _ratio(at_budget.get("mean_length")),
        )
    return table


def _change(fact: Mapping[str, Any] | None) -> str:
    """A change with its interval, or a mean where there is nothing to compare it with."""
    if not fact:
        return "–"
    if "delta" not in fact:
        return "–" if fact["mean"] is None else f"{fact['mean']:.3f}"
    if fact["delta"] is None:
        return "–"
    return f"{fact['delta']:+.3f}\n[{fact['low']:+.3f}, {fact['high']:+.3f}]"


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
