"""`neat-align expand --dataset_streaming`: data that does not fit in memory, round by round.

A round is the next `prompts_per_round` rows of the data, in the data's order. What is in memory is
one round's rows; finished rounds lie on the disk, and are taken up where an expansion was
interrupted: the rows before are read again, and nothing is sampled twice.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, overload

from neat_align.cli.expand import (
    ORIGIN,
    origin_of,
    refuse_finished,
    set_aside_other_work,
    warn_of_what_is_left_out,
    work_key,
    write_made,
)
from neat_align.cli.progress import terminal_callbacks
from neat_align.config import NEATConfig
from neat_align.errors import CollapseError, ConfigError, DataError
from neat_align.files.atomic import read_json, write_json
from neat_align.pipeline import build_trainer
from neat_align.prompts.loading import stream_rows
from neat_align.prompts.row_forms import to_conversation
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.skipped_rows import BadRows, SkippedRows
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.group_file import GroupFile
from neat_align.rounds.round_files import FinishedRound
from neat_align.runs.run_key import fingerprint, key_changes
from neat_align.runs.signals import listening
from neat_align.script_arguments import ScriptArguments
from neat_align.trainer import NEATTrainer
from neat_align.trainer.reward_setup import scorable_places
from neat_align.trainer.setup import read_rows, usable_rows

logger = logging.getLogger(__name__)


def expand_stream(
    script: ScriptArguments, config: NEATConfig, output: Path, form: str, *, is_local: bool
) -> None:
    """Sample, score and rank all rows of the data, round by round, and write them as a data set.

    Raises ConfigError, DataError, and CollapseError where too few prompts so far gave a pair.
    """
    if not is_local:
        raise ConfigError(
            "dataset_streaming is true and engine is ray: its workers are given all of the data; "
            "expand parts of it (dataset_train_split: train[:100000]), or leave one of them out"
        )
    skipped = SkippedRows()
    parts = _row_parts(script, config, skipped)
    first = next(parts)
    trainer = build_trainer(
        replace(script, holdout=0, dataset_streaming=False, eval_dataset_name=None),
        config,
        terminal_callbacks(config),
        trains=False,
        data=(first, []),
    )
    del first
    trainer.parts.data.skipped.take(skipped)
    # Written once every row of the data has been taken.
    refuse_finished(trainer, script, is_finished=(trainer.output_dir / ORIGIN).is_file())
    print(f"plan: rounds of {config.prompts_per_round:,} prompts until the data ends", flush=True)
    with trainer.writing(), listening(trainer.parts.ranks.stop):
        rounds = _make_rounds(trainer, parts, skipped, origin_of(trainer, script))
    files = [trainer.parts.directory.round_folder(i) / "groups.parquet" for i in range(rounds)]
    write_made(FinishedRound(0, _InOrder(files), {}, 0), trainer, output, form)


def _row_parts(
    script: ScriptArguments, config: NEATConfig, skipped: SkippedRows
) -> Iterator[list[PromptRow]]:
    sources = script.training_sources
    if not sources or script.dataset_name == "demo":
        raise ConfigError(
            "dataset_streaming is true and no data that can be streamed is named: name files or a "
            "hub data set (dataset_name, datasets)"
        )
    parts = stream_rows(
        sources,
        config.prompts_per_round,
        limit=script.dataset_limit,
        on_bad_row=config.on_bad_row,
        skipped=skipped,
        mixed_forms=script.as_conversations,
    )
    for rows in parts:
        yield [to_conversation(row) for row in rows] if script.as_conversations else rows


def _make_rounds(
    trainer: NEATTrainer,
    others: Iterator[list[PromptRow]],
    skipped: SkippedRows,
    origin: dict[str, Any],
) -> int:
    """Make a round of the trainer's own rows and of each of the others; gives their number."""
    parts, prompts, kept, count = trainer.parts, 0, 0, 0
    key = work_key(trainer)
    usable = (_usable(trainer, rows) for rows in others)
    for index, rows in enumerate(filter(None, chain([parts.data.rows], usable))):
        count = index + 1
        parts.ranks.raise_if_stop_requested(f"after round {index}; run the same command again")
        parts.data.skipped.take(skipped)
        parts.record_skipped()
        warn_of_what_is_left_out(rows)
        folder = parts.directory.round_folder(index)
        made_from = {**key, "training data": fingerprint(rows)}
        parts.ranks.run_on_rank_zero(
            functools.partial(_check_made_from, folder, made_from), "before a round was sampled"
        )
        parts.round_maker.make(
            index,
            is_start=True,
            start_is_current=not parts.setup.reference_given,
            callbacks=trainer.callback_handler.callbacks,
            rows=rows,
        )
        facts = read_json(folder / "manifest.json")
        prompts, kept = prompts + facts["prompts"], kept + facts["groups"]
        _refuse_too_few(kept, prompts, trainer.args)
    if not kept:
        raise CollapseError(f"none of {prompts} prompts gave something to learn from")
    origin = {**origin, "rounds": count, "prompts": prompts}
    parts.ranks.run_on_rank_zero(
        lambda: write_json(trainer.output_dir / ORIGIN, origin),
        "while it noted the end",
    )
    return count


def _usable(trainer: NEATTrainer, rows: list[PromptRow]) -> list[PromptRow]:
    """The rows that can be sampled from and scored; none where the part has none."""
    parts, args, name = trainer.parts, trainer.args, "training prompts"
    skipped = parts.data.skipped
    try:
        found = usable_rows(
            args,
            parts.data,
            read_rows(args, rows, name, skipped),
            parts.setup.tokenizer,
            name,
            skipped=skipped,
            instructed=parts.setup.instructed.training,
        )
        bad = BadRows(name, args.on_bad_row, skipped)
        places = scorable_places(found.rows, parts.scored_by.rewards, bad)
    except DataError as error:
        if args.on_bad_row != "skip":
            raise
        logger.warning("a whole round of rows is left out: %s", error)
        return []
    return [found.rows[i] for i in places]


def _check_made_from(folder: Path, key: dict[str, Any]) -> None:
    """Refuse a finished round of other rows or options; unfinished work of others is deleted."""
    path = folder / "made-from.json"
    if (folder / "manifest.json").is_file():
        was = read_json(path) if path.is_file() else {}
        changes = key_changes(was, key) if was else ["it is not of a streamed expansion"]
        if changes:
            raise ConfigError(
                f"{folder} holds a finished round of something else ({'; '.join(changes)}): delete "
                f"{folder.parent.parent}, or choose another --output"
            )
        return
    set_aside_other_work(folder / "work", key)
    write_json(path, key)


def _refuse_too_few(kept: int, prompts: int, args: NEATConfig) -> None:
    if kept < args.min_pair_fraction * prompts:
        raise CollapseError(
            f"{kept} of {prompts} prompts so far gave something to learn from, under "
            f"min_pair_fraction={args.min_pair_fraction:g}: either the reward does not tell these "
            "answers apart (try another reward, or a smaller reward_margin), or the model does not "
            "obey the instructions (another bank or placement; `neat-align probe` measures it)"
        )


class _InOrder(Sequence[CompletionGroup]):
    """The groups of many files, one file open at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return sum(len(GroupFile(path)) for path in self.files)

    @overload
    def __getitem__(self, index: int) -> CompletionGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[CompletionGroup]: ...
    def __getitem__(self, index: int | slice) -> CompletionGroup | list[CompletionGroup]:
        if isinstance(index, slice):
            return list(self)[index]
        return next(group for i, group in enumerate(self) if i == index)

    def __iter__(self) -> Iterator[CompletionGroup]:
        for path in self.files:
            yield from GroupFile(path)
