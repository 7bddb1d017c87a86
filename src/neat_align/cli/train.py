"""`neat-align train`: a run from a recipe and options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neat_align.cli.console import ConfigOption, importing, quiet


def train(
    ctx: typer.Context,
    config: ConfigOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only say what the run would do, and how much memory it takes."
        ),
    ] = False,
) -> None:
    """Train a model: sample good and bad answers, rank them, learn from them; with a report."""
    with importing():
        quiet()
        from neat_align.cli.options import parse_options
        from neat_align.cli.progress import terminal_callbacks
        from neat_align.cli.tables import print_result
        from neat_align.pipeline import run_training

    script, args = parse_options(ctx.args, config)
    if dry_run:
        from neat_align.cli.dry_run import planned, tried

        plan = planned(script, args)
        print("\n".join(plan.lines), flush=True)
        if plan.untried is not None:
            print(f"not tried, {plan.untried}")
            return
        for line in tried(script, args, plan.read):
            print(line, flush=True)
        return
    result = run_training(script, args, callbacks=terminal_callbacks(args))
    if args.process_index == 0:
        print_result(result, Path(str(args.output_dir)))
