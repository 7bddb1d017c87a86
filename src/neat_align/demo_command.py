"""`neat-align demo`: a few rounds of NEAT on a small real model, on prompts that ship with the package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from neat_align.commands import print_closing, result_table, train
from neat_align.config import NEATConfig
from neat_align.errors import ConfigError
from neat_align.run_lock import LOCK, one_writer
from neat_align.settings import RunSettings, recipe_path
from neat_align.storage import read_json


def run_demo(output_dir: Path, *, seed: int, overwrite: bool) -> None:
    """Run recipes/demo.yaml, then show the numbers, three answers before and after, and what to try next."""
    console = Console()
    make_room(output_dir, overwrite=overwrite)
    settings, config = demo_settings(output_dir, seed)
    console.print(
        Panel(
            "NEAT on SmolLM2-135M-Instruct. Each round the model answers every prompt kindly and, told to, rudely; VADER scores "
            "the answers' tone; the model learns on the plain prompt to prefer the better ones. A second judge that is never "
            "trained on (MiniLM) checks the result. About four minutes on two CPU cores.",
            title="neat-align demo",
            title_align="left",
        )
    )
    result = train(settings, config)
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
    """Remove an earlier run where that is allowed; anything else in the folder is an error and stays."""
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    # The lock and run-key.json are the first files of a run: one interrupted while it evaluated has nothing else yet.
    if not overwrite or not any((output_dir / name).is_file() for name in ("run-key.json", "run.json", LOCK)):
        raise ConfigError(f"{output_dir} is not empty: choose another --output-dir")
    with one_writer(output_dir):  # refused while that run is going on
        shutil.rmtree(output_dir)


def demo_settings(output_dir: Path, seed: int) -> tuple[RunSettings, NEATConfig]:
    """The demo's recipe, for an output folder and a seed."""
    values: dict[str, Any] = yaml.safe_load(recipe_path("demo").read_text(encoding="utf-8"))
    names = set(RunSettings.__dataclass_fields__)
    settings = RunSettings(**{k: v for k, v in values.items() if k in names})
    config = {k: v for k, v in values.items() if k not in names}
    return settings, NEATConfig(**{**config, "output_dir": str(output_dir), "seed": seed})


def samples(output_dir: Path, count: int = 3) -> list[Panel]:
    """Side-by-side answers to held-out prompts: the median gain, the third quartile, and the largest loss, so not only wins."""
    before, after = (read_json(output_dir / f"evaluation-{when}.json") for when in ("before", "after"))
    gains = [(a or 0) - (b or 0) for b, a in zip(before["rewards"], after["rewards"], strict=True)]
    order = sorted(range(len(gains)), key=lambda i: gains[i])
    picked = list(dict.fromkeys([order[len(order) * 3 // 4], order[len(order) // 2], order[0]]))[:count]
    panels = []
    for i in picked:
        text = Text()
        for label, side in (("before", before), ("after", after)):
            text.append(f"{label} ({side['rewards'][i]:+.2f})  ", style="bold")
            text.append(" ".join(side["completions"][i][0].split()) + "\n")
        text.rstrip()
        panels.append(Panel(text, title=Text(before["prompts"][i][-1]["content"][:70]), title_align="left"))
    return panels
