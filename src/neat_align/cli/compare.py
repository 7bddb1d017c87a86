"""`neat-align compare`: methods x seeds, a table, a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neat_align.cli import completion
from neat_align.cli.console import importing, quiet
from neat_align.cli.option_names import flags

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import TrainerCallback

    from neat_align.comparison.spec import CompareSpec
    from neat_align.config import NEATConfig


def compare(
    ctx: typer.Context,
    config: Annotated[
        Path,
        typer.Option(
            "--config",
            metavar="FILE",
            help="A YAML comparison, or the name of one that ships.",
            autocompletion=completion.comparisons,
        ),
    ],
    output_dir: Annotated[
        Path | None,
        typer.Option(
            *flags("output_dir"),
            help="Where runs, table and page go; runs/compare-NAME by default.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result file here.")
    ] = None,
) -> None:
    """Compare methods at equal budget and at equal KL: methods x seeds, one model, one data set."""
    import shutil

    from rich.console import Console

    with importing():
        quiet()
        from neat_align.cli.compare_file import read_spec

    spec = read_spec(config, ctx.args)
    out = output_dir or Path("runs") / f"compare-{spec.name}"
    console = Console()
    show_comparison(spec, out, console)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / "comparison.json", json_file)
    closing = f"page    {out / 'comparison.html'}\nnumbers {json_file or out / 'comparison.json'}"
    console.print(closing, markup=False, highlight=False, soft_wrap=True)


def show_comparison(spec: CompareSpec, out: Path, console: Console) -> None:
    """Run a comparison, with a line for every run and the table at the end."""
    from neat_align.cli.options import options_from
    from neat_align.cli.progress import PrintPlan, terminal_callbacks
    from neat_align.cli.tables import comparison_table, run_line
    from neat_align.comparison.runner import Caller, number_of_runs, run_comparison

    def say(words: str) -> None:
        console.print(words, markup=False, highlight=False, soft_wrap=True)

    say(f"{spec.name}: {len(spec.methods) - 1} methods, {number_of_runs(spec)} runs into {out}")
    plan = PrintPlan()  # all runs have one budget

    def callbacks(config: NEATConfig) -> list[TrainerCallback]:
        return [plan, *(c for c in terminal_callbacks(config) if not isinstance(c, PrintPlan))]

    caller = Caller(options_from, callbacks, lambda *run: say(run_line(*run)))
    result = run_comparison(spec, out, caller)
    console.print(comparison_table(result))
