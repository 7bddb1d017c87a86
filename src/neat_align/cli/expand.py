"""`neat-align expand`: one round over the data, written as a data set."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, cast

import typer

from neat_align.cli.console import ConfigOption, quiet
from neat_align.errors import ConfigError
from neat_align.prompts.rows import has_more_fields

if TYPE_CHECKING:
    from neat_align.config import NEATConfig
    from neat_align.prompts.rows import PromptRow
    from neat_align.rounds.exports import RowForm
    from neat_align.rounds.round_files import FinishedRound
    from neat_align.script_arguments import ScriptArguments
    from neat_align.trainer import NEATTrainer

logger = logging.getLogger(__name__)
FORMS = ("ranked", "preference", "groups")


def expand(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option(help="A .parquet or .jsonl file for the data set.")],
    config: ConfigOption = None,
    form: Annotated[
        str,
        typer.Option(
            help="Rows of the data set: ranked, preference, or groups (.parquet, everything)."
        ),
    ] = "ranked",
) -> None:
    """Only the data stage: prompts in, ranked completions out. Takes every option of `train`."""
    quiet()
    from neat_align.cli.options import parse_options

    given = ["--output_dir", str(output.with_suffix("")) + "-run", *ctx.args]
    script, args = parse_options(given, config)
    write_expansion(script, args, output, form)


def write_expansion(script: ScriptArguments, config: NEATConfig, output: Path, form: str) -> None:
    """Sample, score and rank one round over the data, and write it as a data set."""
    from neat_align.cli.progress import terminal_callbacks
    from neat_align.pipeline import build_trainer
    from neat_align.runs.signals import listening

    _check_output(output, form)
    if config.data_passes is not None:
        raise ConfigError(
            f"data_passes is {config.data_passes:g} and expand makes one round: leave it out, and "
            "set prompts_per_round (a number of all rows or more takes every prompt)"
        )
    callbacks = terminal_callbacks(config)
    trainer = build_trainer(replace(script, holdout=0), config, callbacks, trains=False)
    goes_on = script.resume or script.auto_resume
    if (trainer.parts.directory.round_folder(0) / "manifest.json").is_file() and not goes_on:
        raise ConfigError(
            f"{trainer.output_dir} holds a finished expansion: delete it, choose another "
            "--output, or pass --resume true to write the same groups out again"
        )
    _warn_of_what_is_left_out(trainer.parts.data.rows)
    plan = replace(trainer.parts.plan, rounds=1, prompt_tokens=None, optimizer_steps=0)
    print("\n".join(plan.lines(more=f"prompts_per_round: {plan.rows} is all of it")), flush=True)
    with listening(trainer.parts.ranks.stop), trainer.writing():
        made = trainer.make_round(0)
    written = _write(made, trainer, output, form)
    print(f"{written} rows ({form}) in {output}; they hold text written to be harmful, on purpose")
    print(f"look at the groups: neat-align inspect {trainer.output_dir}")


def _check_output(output: Path, form: str) -> None:
    if form not in FORMS:
        raise ConfigError(f"form is {form!r}; it must be ranked, preference or groups")
    if output.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"{output} must end in .parquet or .jsonl")
    if form == "groups" and output.suffix != ".parquet":
        raise ConfigError(
            f"groups keep token ids and log-probabilities and go to .parquet, not {output.suffix}"
        )


def _warn_of_what_is_left_out(rows: list[PromptRow]) -> None:
    """Rows that are written hold a message's role and content alone."""
    given = [row for row in rows if row.template_inputs or has_more_fields(row.prompt)]
    if given:
        logger.warning(
            "%d prompts have tools, chat_template_kwargs, calls of tools or thoughts, which the "
            "rows that are written do not hold: add them from the data, by the prompt, before "
            "training on those rows",
            len(given),
        )


def _write(made: FinishedRound, trainer: NEATTrainer, output: Path, form: str) -> int:
    """Write the round in this form, a few groups at a time; gives the number of rows."""
    from neat_align.files.atomic import write_atomic
    from neat_align.rounds.exports import write_rows
    from neat_align.rounds.group_file import write_groups
    from neat_align.trainer.round_maker import round_params

    written = 0

    def write(file: IO[bytes]) -> None:
        nonlocal written
        if form == "groups":
            names = [reward.name for reward in trainer.parts.scored_by.rewards]
            written = write_groups(file, made.groups, names)
        else:
            rank_by = round_params(trainer.args).rank_by
            as_lines = output.suffix == ".jsonl"
            written = write_rows(
                file, made.groups, cast("RowForm", form), rank_by=rank_by, as_lines=as_lines
            )

    write_atomic(output, write)
    return written
