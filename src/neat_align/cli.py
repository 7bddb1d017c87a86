"""The command line. Heavy imports happen inside commands, so that `--help` answers at once."""

from __future__ import annotations

import errno
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from neat_align import __version__
from neat_align.errors import NEATError, RewardUnavailableError
from neat_align.redaction import scrubbed

app = typer.Typer(
    name="neat-align",
    help="Align a language model with NEAT: it writes good and bad answers itself, and learns to rank them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# EX_TEMPFAIL of sysexits.h: schedulers know it as "try again later".
PAUSED = 75
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}
# --dataset_name, as the training options are written, or --dataset-name, as command lines are.
_EITHER_DASH = {"token_normalize_func": lambda name: name.replace("-", "_")}
ConfigOption = Annotated[Path | None, typer.Option("--config", help="A YAML recipe; options after it win over it.")]


class Sort(StrEnum):
    """How `inspect` orders groups."""

    order = "order"
    gap = "gap"
    reward = "reward"


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"neat-align {__version__}")
        raise typer.Exit


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of sampling, data order and the adapter's start.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier demo run in output_dir.")] = True,
) -> None:
    """Align SmolLM2-135M on this machine in a few minutes, and show that it got better."""
    _quiet()
    from neat_align.demo_command import run_demo

    run_demo(output_dir, seed=seed, overwrite=overwrite)


@app.command(context_settings=_ANY_OPTION, add_help_option=False)
def train(
    ctx: typer.Context,
    config: ConfigOption = None,
    show_help: Annotated[bool, typer.Option("--help", help="List every option.")] = False,
) -> None:
    """Train a model: neat-align train --config recipes/NAME.yaml [--any_option value]."""
    _quiet()
    from neat_align.commands import print_result, train
    from neat_align.settings import parse, print_help

    if show_help:
        print_help()
        return
    settings, args = parse(ctx.args, config)
    print_result(train(settings, args), Path(str(args.output_dir)))


@app.command(context_settings=_ANY_OPTION)
def expand(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option(help="A .parquet or .jsonl file for the data set.")],
    config: ConfigOption = None,
    form: Annotated[str, typer.Option(help="Rows of the data set: ranked, preference, or groups (.parquet, everything).")] = "ranked",
) -> None:
    """Only the data stage: prompts in, ranked completions out. Takes every option of `train`."""
    _quiet()
    from neat_align.commands import expand
    from neat_align.settings import parse

    settings, args = parse(["--output_dir", str(output.with_suffix("")) + "-run", *ctx.args], config)
    expand(settings, args, output, form)


@app.command(context_settings=_ANY_OPTION)
def evaluate(ctx: typer.Context, config: ConfigOption = None) -> None:
    """Sample and judge a model on held-out prompts without training. Takes every option of `train`."""
    _quiet()
    from neat_align.commands import evaluate
    from neat_align.settings import parse

    settings, args = parse(ctx.args, config)
    evaluate(settings, args)


@app.command(context_settings={**_ANY_OPTION, **_EITHER_DASH})
def compare(
    ctx: typer.Context,
    config: Annotated[Path, typer.Option("--config", help="A YAML comparison: recipes/compare-*.yaml.")],
    output_dir: Annotated[Path | None, typer.Option(help="Where runs, table and page go; runs/compare-NAME by default.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result file here.")] = None,
) -> None:
    """Compare methods at equal budget and at equal KL: methods x seeds on one model and one data set.

    Takes --methods NAME …, --seeds N …, and every option of `train` that all methods then share.
    """
    _quiet()
    import shutil

    from rich.console import Console

    from neat_align.compare_command import compare, comparison_table
    from neat_align.comparison_source import read_spec

    spec = read_spec(config, ctx.args)
    out = output_dir or Path("runs") / f"compare-{spec.name}"
    console = Console()
    console.print(comparison_table(compare(spec, out, console)))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / "comparison.json", json_file)
    closing = f"page    {out / 'comparison.html'}\nnumbers {json_file or out / 'comparison.json'}"
    console.print(closing, markup=False, highlight=False, soft_wrap=True)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A run, one of its rounds, or a groups file.")],
    limit: Annotated[int, typer.Option(help="Groups to show.")] = 5,
    origin: Annotated[str | None, typer.Option(help="Show only completions of this origin.")] = None,
    sort: Annotated[Sort, typer.Option(help="order of the file, largest reward gap first, or best reward first")] = Sort.order,
    search: Annotated[str | None, typer.Option(help="Only groups whose text contains this.")] = None,
) -> None:
    """Browse groups in the terminal: prompt, completions by origin, rewards, order."""
    from rich.console import Console

    from neat_align.browse import browse

    browse(path, limit=limit, origin=origin, sort=sort.value, search=search, console=Console())


@app.command()
def report(path: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write a run's report.html again."""
    from neat_align.report import write_report

    typer.echo(f"report: {write_report(path)}")


@app.command()
def capability(
    model: Annotated[str, typer.Option(help="After: a run, a model's or an adapter's folder, or a model name.")],
    base: Annotated[str, typer.Option(help="Before: the model that the training started from.")],
    tasks: Annotated[str, typer.Option(help="Tasks of the lm-evaluation-harness, with commas between them.")],
    limit: Annotated[int | None, typer.Option(help="Only the first this many documents of each task.")] = None,
    include_path: Annotated[Path | None, typer.Option("--include_path", help="A folder with task files of your own.")] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Requests per forward pass.")] = 8,
    output: Annotated[Path | None, typer.Option(help="Where the JSON goes; capability.json in the run by default.")] = None,
) -> None:
    """Measure what the model lost or kept: benchmark tasks before and after. Needs neat-align[capability]."""
    _quiet()
    from neat_align.capability import CapabilityParams, run_capability

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    run_capability(model, base, CapabilityParams(names, limit, include_path, batch_size), output)


@app.command(context_settings=_EITHER_DASH)
def probe(
    bank: Annotated[str, typer.Option(help="Name of a shipped bank, or path of a YAML file with pairs.")],
    model: Annotated[str, typer.Option(help="A hub name, a folder, or demo.")],
    dataset_name: Annotated[str, typer.Option(help="Prompts: a file, a saved data set, a hub name, or demo.")] = "demo",
    as_conversations: Annotated[bool, typer.Option("--as-conversations", help="Turn text prompts into chat messages.")] = False,
    reward: Annotated[str, typer.Option(help="vader, minilm_tone, contrast, module:function, or a model.")] = "vader",
    placement: Annotated[str, typer.Option(help="system, user_suffix, affix, or all to compare them.")] = "user_suffix",
    prompts: Annotated[int, typer.Option(help="Prompts to answer.")] = 24,
    samples: Annotated[int, typer.Option(help="Answers to a prompt under each instruction.")] = 2,
    max_completion_length: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 48,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; above 0.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the prompts' choice, the sampling and the intervals.")] = 0,
    generation_batch_size: Annotated[int, typer.Option(help="Answers sampled at once.")] = 64,
    output: Annotated[Path | None, typer.Option(help="A .json file for the numbers.")] = None,
) -> None:
    """Measure how strongly each instruction pair of a bank moves a model's reward, before training."""
    _quiet()
    from rich.console import Console

    from neat_align.probe_command import ProbeSettings, run_probe

    given = ProbeSettings(
        bank=bank,
        model=model,
        dataset_name=dataset_name,
        as_conversations=as_conversations,
        reward=reward,
        placement=placement,
        prompts=prompts,
        samples=samples,
        max_completion_length=max_completion_length,
        temperature=temperature,
        seed=seed,
        generation_batch_size=generation_batch_size,
    )
    run_probe(given, output, Console())


def _quiet() -> None:
    """Keep libraries' chatter off the terminal; warnings that matter come through logging."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; an error meant for the user is one line on stderr and exit code 2.

    A reward server that stays down is exit code 75: nothing is wrong with the run, and the same command goes on with it later.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        return app(arguments, standalone_mode=True)
    except RewardUnavailableError as error:
        typer.echo(f"paused: {scrubbed(str(error))}", err=True)
        typer.echo(_how_to_resume(given, "when the server is up"), err=True)
        sys.exit(PAUSED)
    except NEATError as error:
        typer.echo(f"error: {scrubbed(str(error))}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = f" ({error.filename})" if error.filename else ""
        typer.echo(f"error: the disk is full: {scrubbed(f'{error.strerror}{where}')}", err=True)
        typer.echo(_how_to_resume(given, "when there is room"), err=True)
        sys.exit(2)


def _how_to_resume(arguments: list[str], when: str) -> str:
    command = arguments[0] if arguments else ""
    if command in ("train", "expand"):
        return f"what is sampled and scored is kept; {when}, go on with the same command and --resume true"
    if command == "compare":
        return f"what is sampled and scored is kept; {when}, go on with the same command"
    return f"{when}, run the same command again"


if __name__ == "__main__":
    main()
