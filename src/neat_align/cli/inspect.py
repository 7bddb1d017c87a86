"""`neat-align inspect`: browse what was written, in the terminal."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Sort(StrEnum):
    """How `inspect` orders groups."""

    order = "order"
    gap = "gap"
    reward = "reward"


def inspect(
    path: Annotated[Path, typer.Argument(help="A run, one of its rounds, or a groups file.")],
    limit: Annotated[int, typer.Option(help="Groups to show.")] = 5,
    origin: Annotated[
        str | None, typer.Option(help="Show only completions of this origin.")
    ] = None,
    sort: Annotated[
        Sort,
        typer.Option(help="As sampled, widest reward gap first, or best reward first."),
    ] = Sort.order,
    search: Annotated[
        str | None, typer.Option(help="Only groups whose text contains this.")
    ] = None,
) -> None:
    """Browse groups in the terminal: prompt, completions by origin, rewards, order."""
    from rich.console import Console

    from neat_align.reporting.terminal import browse

    browse(path, limit=limit, origin=origin, sort=sort.value, search=search, console=Console())
