"""`neat-align demo`: a few rounds of NEAT on a small real model, on prompts that ship with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neat_align.cli.console import quiet

if TYPE_CHECKING:
    from rich.panel import Panel

    from neat_align.config import NEATConfig
    from neat_align.script_arguments import ScriptArguments


def demo(
    output_dir: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs/demo"),
    seed: Annotated[
        int, typer.Option(help="Seed of sampling, data order and the adapter's start.")
    ] = 0,
    overwrite: Annotated[
        bool, typer.Option(help="Replace an earlier demo run in output_dir.")
    ] = True,
) -> None:
    """Align SmolLM2-135M on this machine in a few minutes, and show that it got better."""
    quiet()
    run_demo(output_dir, seed=seed, overwrite=overwrite)


def run_demo(output_dir: Path, *, seed: int, overwrite: bool) -> None:
    """Run recipes/demo.yaml, then show the numbers, three answers before and after, and what to try
    next.
    """
    from rich.console import Console
    from rich.panel import Panel

    from neat_align.cli.progress import terminal_callbacks
    from neat_align.cli.run_table import print_closing, result_table
    from neat_align.pipeline import run_training

    console = Console()
    make_room(output_dir, overwrite=overwrite)
    script, config = demo_settings(output_dir, seed)
    console.print(
        Panel(
            "NEAT on SmolLM2-135M-Instruct. Each round the model answers every prompt kindly and, "
            "told to, rudely; VADER scores "
            "the answers' tone; the model learns on the plain prompt to prefer the better ones. A "
            "second judge that is never "
            "trained on (MiniLM) checks the result. About four minutes on two CPU cores.",
            title="neat-align demo",
            title_align="left",
        )
    )
    result = run_training(script, config, callbacks=terminal_callbacks(config))
    console.print(result_table(result))
    for panel in samples(output_dir):
        console.print(panel)
    print_closing(console, result, output_dir)
    next_command = (
        "your own model and data: neat-align train --config recipes/quickstart.yaml \\\n"
        "    --model_name_or_path MODEL --dataset_name prompts.jsonl"
    )
    console.print(next_command, markup=False, highlight=False, soft_wrap=True)


def make_room(output_dir: Path, *, overwrite: bool) -> None:
    """Remove an earlier run where that is allowed; anything else there is an error and stays."""
    from neat_align.errors import ConfigError
    from neat_align.runs.lock import LOCK_FILE, one_writer

    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    # The lock and run-key.json are the first files of a run: one interrupted while it evaluated has
    # nothing else yet.
    if not overwrite or not any(
        (output_dir / name).is_file() for name in ("run-key.json", "run.json", LOCK_FILE)
    ):
        raise ConfigError(f"{output_dir} is not empty: choose another --output-dir")
    with one_writer(output_dir):  # refused while that run is going on
        shutil.rmtree(output_dir)


def demo_settings(output_dir: Path, seed: int) -> tuple[ScriptArguments, NEATConfig]:
    """The demo's recipe, for an output folder and a seed."""
    import yaml

    from neat_align.cli.options import recipe_path
    from neat_align.config import NEATConfig
    from neat_align.script_arguments import ScriptArguments

    values: dict[str, Any] = yaml.safe_load(recipe_path("demo").read_text(encoding="utf-8"))
    names = set(ScriptArguments.__dataclass_fields__)
    script = ScriptArguments(**{k: v for k, v in values.items() if k in names})
    config = {k: v for k, v in values.items() if k not in names}
    return script, NEATConfig(**{**config, "output_dir": str(output_dir), "seed": seed})


def samples(output_dir: Path, count: int = 3) -> list[Panel]:
    """Side-by-side answers to held-out prompts: the median gain, the third quartile, and the
    largest loss, so not only wins.
    """
    from rich.panel import Panel
    from rich.text import Text

    from neat_align.files.atomic import read_json

    before, after = (
        read_json(output_dir / f"evaluation-{when}.json") for when in ("before", "after")
    )
    gains = [(a or 0) - (b or 0) for b, a in zip(before["rewards"], after["rewards"], strict=True)]
    order = sorted(range(len(gains)), key=lambda i: gains[i])
    picked = list(dict.fromkeys([order[len(order) * 3 // 4], order[len(order) // 2], order[0]]))[
        :count
    ]
    panels = []
    for i in picked:
        text = Text()
        for label, side in (("before", before), ("after", after)):
            text.append(f"{label} ({side['rewards'][i]:+.2f})  ", style="bold")
            text.append(" ".join(side["completions"][i][0].split()) + "\n")
        text.rstrip()
        panels.append(
            Panel(text, title=Text(before["prompts"][i][-1]["content"][:70]), title_align="left")
        )
    return panels
