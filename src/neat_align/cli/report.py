"""`neat-align report`: write a run's page again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(path: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write a run's report.html again."""
    from neat_align.reporting.run_report import write_report

    typer.echo(f"report: {write_report(path)}")
