"""`neat-align init`: a look at a model and its data, and a commented recipe that fits both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neat_align.cli.console import quiet
from neat_align.cli.option_names import flags

if TYPE_CHECKING:
    from neat_align.cli.init_look import DataFacts, ModelFacts
    from neat_align.cli.init_recipe import Asked, Recipe
    from neat_align.runs.plan import RunPlan
    from neat_align.trainer.memory_plan import MemoryPlan

GIB = 2**30


def init(
    model: Annotated[
        str,
        typer.Option(*flags("model_name_or_path"), help="A hub name, a folder, or demo."),
    ],
    data: Annotated[
        str,
        typer.Option(*flags("dataset_name"), help="A file, a saved data set, a hub name, or demo."),
    ],
    output: Annotated[Path, typer.Option(help="Where the recipe goes.")] = Path("recipe.yaml"),
    bank: Annotated[
        str,
        typer.Option(
            *flags("instruction_bank"),
            help="What answers should be more of: harmlessness, helpfulness, honesty, politeness, "
            "sentiment, or a YAML file.",
        ),
    ] = "helpfulness",
    reward: Annotated[
        str,
        typer.Option(*flags("reward_funcs"), help="What scores answers; it may be left out."),
    ] = "",
    split: Annotated[
        str | None,
        typer.Option("--dataset_train_split", help="Split of a hub data set."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Answer a few prompts, to see where instructions work best (probe)."
        ),
    ] = False,
) -> None:
    """Look at a model and its data, and write a commented recipe for both."""
    quiet()
    write_recipe(model, data, output, bank=bank, reward=reward, split=split, measure=measure)


def write_recipe(
    model_name: str,
    data_name: str,
    output: Path,
    *,
    bank: str,
    reward: str,
    split: str | None,
    measure: bool,
) -> None:
    """Look, choose, check the choice as a run would, write it, and say what was found."""
    from neat_align.errors import ConfigError

    if output.exists():
        raise ConfigError(f"{output} is there already: choose another --output, or delete it")
    if measure and split is not None:
        raise ConfigError(
            "measure probes the train split only: leave out dataset_train_split, or measure"
        )
    from neat_align.cli.init_look import look, short_name
    from neat_align.cli.init_recipe import Asked, recipe_for
    from neat_align.modeling.device import compute_device
    from neat_align.script_arguments import ScriptArguments

    script = ScriptArguments(
        model_name_or_path=model_name, dataset_name=data_name, dataset_train_split=split
    )
    model, data = look(script, bank)
    say_found(model_name, data_name, model, data)
    asked = Asked(
        model=model_name,
        data=data_name,
        split=split,
        bank=bank,
        reward=reward,
        output_dir=_free_folder(short_name(data_name)),
        device=compute_device().type,
    )
    placement, why = _placement(asked, model, data, measure=measure)
    recipe = recipe_for(asked, model, data, placement, why)
    plan, memory = _fitted(recipe)
    _write(output, recipe.text(_head(asked, output, plan, memory)))
    _say_chosen(plan, memory, output)


def _free_folder(name: str) -> str:
    """A folder for the run in which none is yet."""
    from neat_align.runs.leftovers import is_free

    folder, n = Path("runs") / name, 1
    while not is_free(folder):
        n += 1
        folder = Path("runs") / f"{name}-{n}"
    return folder.as_posix()


# ---- what is chosen by trying --------------------------------------------------------------------


def _placement(
    asked: Asked, model: ModelFacts, data: DataFacts, *, measure: bool
) -> tuple[str, str]:
    """Where instructions go, and why there: measured, or where they work with most models."""
    if measure:
        return _measured_placement(asked, model, data)
    chosen = "user_suffix" if "user_suffix" in model.placements else model.placements[0]
    others = [name for name in model.placements if name != chosen]
    refused = list(model.refused)
    why = "Not measured"
    if others:
        why += f"; {' and '.join(others)} can be had, too"
    if refused:
        why += f"; the chat template does not take {' and '.join(refused)}"
    why += ". `neat-align init --measure`, or `neat-align probe --placement all`, compares them."
    return chosen, why


def _measured_placement(asked: Asked, model: ModelFacts, data: DataFacts) -> tuple[str, str]:
    import io

    from rich.console import Console

    from neat_align.cli.probe_options import ProbeSettings
    from neat_align.cli.probe_run import run_probe
    from neat_align.cli.probe_table import WORKING

    settings = ProbeSettings(
        bank=asked.bank,
        model=asked.model,
        dataset_name=asked.data,
        as_conversations=data.form == "text" and model.has_template,
        as_texts=data.form == "messages" and not model.has_template,
        reward=asked.reward or "contrast",
        placement="all",
        on_bad_row="skip",
        chat_template_kwargs='{"enable_thinking": false}' if model.thinks else None,
    )
    probe = run_probe(settings, None, Console(file=io.StringIO()))
    found = []
    for one in probe.placements:
        pairs = [p for p in probe.pairs if p.placement == one.placement]
        working = sum(p.verdict in WORKING for p in pairs)
        gap = "no gap" if one.gap is None else f"gap {one.gap.delta:+.2f}"
        found.append(f"{one.placement}: {gap}, {working} of {len(pairs)} pairs work")
    best = probe.placements[0].placement
    why = (
        f"Measured on {len(probe.prompt_ids)} prompts by {settings.reward}, positive minus "
        f"negative: {'; '.join(found)}."
    )
    typer.echo(f"probe   {why}")
    return best, why


def _fitted(recipe: Recipe) -> tuple[RunPlan, MemoryPlan]:
    """The recipe's plan and memory, after what makes it smaller where it does not fit."""
    from neat_align.cli.dry_run import plans_of
    from neat_align.cli.options import options_from

    settings = recipe.settings
    plan, memory = plans_of(*options_from(settings))
    smaller = (
        ("dtype", "bfloat16", "The frozen weights in half the memory: there is not enough."),
        ("activation_checkpointing", True, "Computed again in the backward pass, for the memory."),
        ("generation_batch_size", 16, "Answers sampled at once: few, for the memory."),
        ("max_tokens_per_micro_batch", 1024, "Tokens of a pass: few, for the memory."),
    )
    for name, value, why in smaller:
        if memory.fits:
            break
        if settings.get(name) == value:
            continue
        tried = plans_of(*options_from({**recipe.settings, name: value}))
        if tried[1].estimate.total < memory.estimate.total:
            recipe.add(name, value, why)
            plan, memory = tried
    return plan, memory


def _write(output: Path, text: str) -> None:
    from neat_align.errors import ConfigError

    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{output} is there already: choose another --output") from None


# ---- what is said --------------------------------------------------------------------------------


def _head(asked: Asked, output: Path, plan: RunPlan, memory: MemoryPlan) -> list[str]:
    from neat_align.files.provenance import versions

    return [
        f"Written by `neat-align init` {versions()['neat-align']}. To run it:",
        f"  neat-align train --config {output}",
        "Any option can be overruled on the command line (--name value). `--dry-run` says what the",
        "run would do and take.",
        f"{_amount(plan)}.",
        f"Memory, estimated: {_memory(memory)}.",
    ]


def _amount(plan: RunPlan) -> str:
    return (
        f"{plan.rounds} rounds of {plan.prompts_per_round} prompts, {plan.completions:,} sampled "
        f"answers, {plan.optimizer_steps} optimizer steps"
    )


def _memory(memory: MemoryPlan) -> str:
    took = f"{memory.estimate.total / GIB:.1f} GiB at most"
    if memory.room is None:
        return f"{took} ({memory.device})"
    free = f"{memory.room / GIB:.1f} GiB free ({memory.device}) when this was written"
    less = "" if memory.fits else f"; it does not fit: {memory.advice()}"
    return f"{took}, of {free}{less}"


def say_found(model_name: str, data_name: str, model: ModelFacts, data: DataFacts) -> None:
    """Model and data in a few lines."""
    context = "no limit" if model.context is None else f"{model.context:,} tokens"
    size = (
        f"{model.parameters / 1e6:,.0f} M" if model.parameters >= 1e6 else f"{model.parameters:,}"
    )
    template = "no chat template: a base model, as far as one can see"
    if model.has_template:
        turn = "no system turn" if "system" in model.refused else "a system turn"
        template = f"a chat template, with {turn}"
    what = {data.pairs > 0: "all" if data.pairs == data.rows else f"{data.pairs:,}"}.get(True)
    own = (
        "no answers of their own"
        if not data.answered
        else (f"{what} with chosen and rejected" if what else f"{data.answered:,} with an answer")
    )
    repeated = data.rows - data.prompts
    rest = [f"{data.median:,} tokens in the median, {data.longest:,} at most"]
    if repeated:
        rest.append(f"{repeated:,} repeat an earlier one")
    if data.with_system:
        rest.append(f"{data.with_system:,} with a system turn")
    if data.unreadable:
        rest.append(f"{data.unreadable:,} more cannot be used")
    for line in (
        f"model   {model_name}: {model.kind}, {size} parameters, context {context}",
        f"        {template}",
        f"data    {data_name}: {data.rows:,} rows of {data.form}, {own}",
        f"        prompts: {', '.join(rest)}",
    ):
        typer.echo(line)


def _say_chosen(plan: RunPlan, memory: MemoryPlan, output: Path) -> None:
    for line in (
        f"plan    {_amount(plan)}",
        f"memory  {_memory(memory)}",
        f"wrote   {output}",
        f"next    neat-align train --config {output}",
    ):
        typer.echo(line)
