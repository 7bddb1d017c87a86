"""`neat-align capability`: benchmark tasks before and after."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neat_align.cli.console import json_file, quiet
from neat_align.cli.option_names import flags

if TYPE_CHECKING:
    from neat_align.evaluation.benchmark_tasks import CapabilityParams

STDERR = "_stderr"
NUMBERS = "capability.json"


def capability(
    model: Annotated[
        str,
        typer.Option(
            *flags("model_name_or_path"),
            help="After: a run, a model's or an adapter's folder, or a model name.",
        ),
    ],
    base: Annotated[str, typer.Option(help="Before: the model that the training started from.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks of the lm-evaluation-harness, with commas between them.")
    ],
    limit: Annotated[
        int | None, typer.Option(help="Only the first this many documents of each task.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include_path", help="A folder with task files of your own.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Requests per forward pass.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--output_dir",
            help="A .json file for the numbers, or a folder: capability.json in it. By default "
            "in the run or the model's folder.",
        ),
    ] = None,
) -> None:
    """Measure what the model lost or kept on benchmark tasks. Needs the extra `capability`."""
    quiet()
    from neat_align.evaluation.benchmark_tasks import CapabilityParams

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    run_capability(model, base, CapabilityParams(names, limit, include_path, batch_size), output)


def run_capability(model: str, base: str, params: CapabilityParams, output: Path | None) -> None:
    """Measure, print the table, and write the JSON: to `output`, or as capability.json into the run
    or model folder.
    """
    named = json_file(output, NUMBERS)  # before anything is measured
    from rich.console import Console

    from neat_align.evaluation.benchmark_tasks import capability_change
    from neat_align.files.atomic import write_json

    # It warns of every default that it fills in.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    result = capability_change(model, base, params)
    path = named or (Path(model) if Path(model).is_dir() else Path()) / NUMBERS
    write_json(path, result)
    console = Console()
    console.print(capability_table(result))
    console.print(f"numbers {path}", markup=False, highlight=False, soft_wrap=True)


def capability_table(result: Mapping[str, Any]) -> Any:
    """Before and after, with standard errors; a rich renderable."""
    from rich.table import Table

    limit = result["limit"]
    documents = "all documents" if limit is None else f"the first {limit} documents"
    table = Table(
        title=f"capability, {documents} of each task, ± standard error", title_justify="left"
    )
    for heading in ("task", "metric"):
        table.add_column(heading, no_wrap=True)
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, metrics in result["after"].items():
        for name in (n for n in metrics if not n.endswith(STDERR)):
            sides = [
                _shown(result[side][task], name, sign)
                for side, sign in (("before", ""), ("after", ""), ("change", "+"))
            ]
            table.add_row(task, name, *sides)
    return table


def _shown(metrics: Mapping[str, float], name: str, sign: str) -> str:
    error = metrics.get(name + STDERR)
    return f"{metrics[name]:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")
