"""`neat-align expand`: one round over the data, written as a data set."""

from __future__ import annotations

import contextlib
import logging
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from neat_align.cli.console import ConfigOption, importing, quiet
from neat_align.cli.expand_ray import (
    RayOptions,
    check_engine,
    check_ray_run,
    cluster_address,
    connected,
    import_ray,
    make_round_on_ray,
    on_the_cpu,
)
from neat_align.errors import ConfigError, DataError
from neat_align.prompts.rows import has_more_fields

if TYPE_CHECKING:
    from neat_align.config import NEATConfig
    from neat_align.prompts.rows import PromptRow
    from neat_align.rounds.exports import RowForm
    from neat_align.rounds.round_files import FinishedRound
    from neat_align.script_arguments import ScriptArguments
    from neat_align.trainer import NEATTrainer

logger = logging.getLogger(__name__)
# A panel of the help.
RAY = "On Ray (--engine ray)"
# In the run directory: what the groups were made from.
ORIGIN = "expansion.json"
FORMS = ("preference", "ranked", "kto", "sft", "reward", "groups")
# Options of transformers' own that decide what is sampled.
_DECIDING = frozenset({"seed", "bf16", "fp16", "tf32", "full_determinism", "use_cpu"})

NumWorkers = Annotated[
    int | None,
    typer.Option(rich_help_panel=RAY, help="Workers that hold the policy, each a process."),
]
GpusPerWorker = Annotated[
    float | None, typer.Option(rich_help_panel=RAY, help="GPUs of each, 0 to 1; 0 when left out.")
]
NumRewardWorkers = Annotated[
    int | None, typer.Option(rich_help_panel=RAY, help="Workers that reward; 1 when left out.")
]
GpusPerRewardWorker = Annotated[
    float | None, typer.Option(rich_help_panel=RAY, help="GPUs of each, 0 to 1; 0 when left out.")
]
ShardPrompts = Annotated[
    int | None,
    typer.Option(rich_help_panel=RAY, help="Prompts of one piece of work; 512 when left out."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=RAY,
        help="A cluster; else RAY_ADDRESS, else Ray runs on this machine alone.",
    ),
]
_Form = Annotated[
    str,
    typer.Option(
        "--format",
        "--form",
        help="Rows of the data set: preference, ranked, kto, sft, reward, or groups (.parquet, "
        "everything). `export` writes the others later.",
    ),
]


def expand(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option(help="A .parquet or .jsonl file for the data set.")],
    config: ConfigOption = None,
    form: _Form = "preference",
    engine: Annotated[
        str, typer.Option(help="local: this process makes all of it; ray: workers of Ray Data do.")
    ] = "local",
    num_workers: NumWorkers = None,
    gpus_per_worker: GpusPerWorker = None,
    num_reward_workers: NumRewardWorkers = None,
    gpus_per_reward_worker: GpusPerRewardWorker = None,
    shard_prompts: ShardPrompts = None,
    ray_address: RayAddress = None,
) -> None:
    """Only the data stage: prompts in, data for trainers out. Takes every option of `train`."""
    ray = RayOptions(
        num_workers,
        gpus_per_worker,
        num_reward_workers,
        gpus_per_reward_worker,
        shard_prompts,
        ray_address,
    )
    check_engine(engine, ray)
    with importing():
        quiet()
        from neat_align.cli.options import parse_options

    given = ["--output_dir", str(output.with_suffix("")) + "-run", *ctx.args]
    script, args = parse_options(given, config)
    write_expansion(script, args, output, form, ray if engine == "ray" else None)


def write_expansion(
    script: ScriptArguments,
    config: NEATConfig,
    output: Path,
    form: str,
    ray: RayOptions | None = None,
) -> None:
    """Sample, score and rank one round over the data, and write it as a data set.

    With `ray`, Ray's workers make it; without, this process does. The groups are the same.
    """
    from neat_align.cli.progress import terminal_callbacks
    from neat_align.files.atomic import write_json
    from neat_align.pipeline import build_trainer

    _check_output(output, form)
    if config.data_passes is not None:
        raise ConfigError(
            f"data_passes is {config.data_passes:g} and expand makes one round: leave it out, and "
            "set prompts_per_round (a number of all rows or more takes every prompt)"
        )
    if ray is not None:
        check_ray_run(script, config, ray)
        import_ray(address=cluster_address(ray))  # before anything is loaded
        config = on_the_cpu(config)  # the model here is looked at, and samples nothing
    if script.dataset_streaming:
        from neat_align.cli.expand_stream import expand_stream

        expand_stream(script, config, output, form, is_local=ray is None)
        return
    callbacks = terminal_callbacks(config)
    trainer = build_trainer(replace(script, holdout=0), config, callbacks, trains=False)
    is_finished = (trainer.parts.directory.round_folder(0) / "manifest.json").is_file()
    refuse_finished(trainer, script, is_finished=is_finished)
    warn_of_what_is_left_out(trainer.parts.data.rows)
    plan = replace(trainer.parts.plan, rounds=1, prompt_tokens=None, optimizer_steps=0)
    print("\n".join(plan.lines(more=f"prompts_per_round: {plan.rows} is all of it")), flush=True)
    made = _make(trainer, script, ray)
    write_json(trainer.output_dir / ORIGIN, origin_of(trainer, script))
    write_made(made, trainer, output, form)


def _make(trainer: NEATTrainer, script: ScriptArguments, ray: RayOptions | None) -> FinishedRound:
    """The round, made by this process or by Ray's workers, or read where it is finished."""
    from neat_align.rounds.round_files import finished_round
    from neat_align.runs.signals import listening

    parts = trainer.parts
    with contextlib.ExitStack() as during:
        during.enter_context(trainer.writing())
        made = finished_round(parts.directory.round_folder(0)) if ray is not None else None
        if made is not None:
            return made
        if ray is not None:  # before the signals' handlers: Ray has one of its own
            during.enter_context(connected(ray, has_rewards=bool(script.reward_funcs)))
        during.enter_context(listening(parts.ranks.stop))
        key = work_key(trainer)
        set_aside_other_work(parts.directory.round_folder(0) / "work", key)
        if ray is None:
            return trainer.make_round(0)
        parts.record_skipped()
        return make_round_on_ray(trainer, script, ray, key)


def work_key(trainer: NEATTrainer) -> dict[str, Any]:
    """What tells work on another model, data or NEAT option from this one's.

    Most of Trainer's own options say how to learn, which nothing is made of here.
    """
    from transformers import TrainingArguments

    key: dict[str, Any] = dict(trainer.parts.made_from())
    theirs = {f.name for f in fields(TrainingArguments)} - _DECIDING
    key["options"] = {k: v for k, v in key["options"].items() if k not in theirs}
    return key


def set_aside_other_work(work: Path, key: dict[str, Any]) -> None:
    """Delete what an interrupted expansion of another model or with other options has left.

    What samples were asked for is compared with each of them (`RolloutStore`); who answered is not.
    """
    from neat_align.files.atomic import read_json, write_json
    from neat_align.runs.run_key import key_changes

    path = work / "made-from.json"
    changes = key_changes(read_json(path), key) if path.is_file() else []
    if changes:
        logger.warning(
            "unfinished work in %s is not taken up, and made again: %s", work, "; ".join(changes)
        )
        shutil.rmtree(work)
    write_json(path, key)


def refuse_finished(trainer: NEATTrainer, script: ScriptArguments, *, is_finished: bool) -> None:
    """Raise ConfigError for a finished expansion that is not to be written out again."""
    if is_finished and not (script.resume or script.auto_resume):
        raise ConfigError(
            f"{trainer.output_dir} holds a finished expansion: delete it, choose another "
            "--output, or pass --resume true to write the same groups out again"
        )


def _check_output(output: Path, form: str) -> None:
    if form not in FORMS:
        raise ConfigError(f"format is {form!r}; it must be one of {', '.join(FORMS)}")
    if output.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"{output} must end in .parquet or .jsonl")
    if form == "groups" and output.suffix != ".parquet":
        raise ConfigError(
            f"groups keep token ids and log-probabilities and go to .parquet, not {output.suffix}"
        )


def warn_of_what_is_left_out(rows: list[PromptRow]) -> None:
    """Rows that are written hold a message's role and content alone."""
    given = [row for row in rows if row.template_inputs or has_more_fields(row.prompt)]
    if given:
        logger.warning(
            "%d prompts have tools, chat_template_kwargs, calls of tools or thoughts, which the "
            "rows that are written do not hold: add them from the data, by the prompt, before "
            "training on those rows",
            len(given),
        )


def origin_of(trainer: NEATTrainer, script: ScriptArguments) -> dict[str, Any]:
    """What the groups were made from, which is kept with them for who exports them (`ORIGIN`)."""
    from neat_align.files.provenance import versions
    from neat_align.files.secrets import redacted
    from neat_align.reporting.data_card import public_name

    return {
        "config": redacted(cast("Any", trainer.args).to_dict()),
        "versions": versions(),
        "rewards": [reward.name for reward in trainer.parts.scored_by.rewards],
        "model": public_name(script.model_name_or_path),
        "dataset": public_name(script.dataset_name),
    }


def write_made(made: FinishedRound, trainer: NEATTrainer, output: Path, form: str) -> None:
    """Write the round in this form, a few groups at a time, and say where everything is."""
    rows = _write(made, trainer, output, form)
    print(f"{rows} rows ({form}) in {output}; they hold text written to be harmful, on purpose")
    print(f"look at the groups: neat-align inspect {trainer.output_dir}")
    print(f"in other formats: neat-align export {trainer.output_dir} --format kto")


def _write(made: FinishedRound, trainer: NEATTrainer, output: Path, form: str) -> int:
    """Gives the number of rows."""
    from neat_align.cli.export import write_data
    from neat_align.files.atomic import write_atomic
    from neat_align.rounds.exports import RowRules
    from neat_align.rounds.group_file import without_tokens, write_groups
    from neat_align.trainer.round_maker import round_params

    if form == "groups":
        names = [reward.name for reward in trainer.parts.scored_by.rewards]
        write_atomic(output, lambda file: write_groups(file, made.groups, names))
        return len(made.groups)
    params = round_params(trainer.args)
    rules = RowRules(params.rank_by, params.reward_margin)
    groups = without_tokens(made.groups, texts=True)
    try:
        return write_data(output, groups, cast("RowForm", form), rules).rows
    except DataError as error:  # sampled and paid for
        raise DataError(
            f"{error}. The groups are kept: `neat-align export {trainer.output_dir} --format "
            f"{form}` writes them out, with these options"
        ) from error
