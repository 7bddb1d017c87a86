"""A data set file of other trainers' rows, written in a stream: a few groups in memory at a time.

What is counted on the way is what is said of the file afterwards.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import IO, TYPE_CHECKING

from neat_align.errors import DataError
from neat_align.rounds.completions import MIXED_PROMPTS, CompletionGroup, Origin
from neat_align.rounds.exports import Row, RowForm, RowRules, rows_of, why_none
from neat_align.rounds.trainer_rows import RowShape, TrainerName, row_shape

if TYPE_CHECKING:
    import pyarrow as pa

# Groups whose rows are made and written together.
_CHUNK = 256


@dataclass
class OriginScores:
    """Rewards of one origin's completions: how many completions, and a sum a reward function."""

    completions: int = 0
    rewarded: int = 0
    total: float = 0.0
    parts: Counter[int] = field(default_factory=Counter)
    part_totals: dict[int, float] = field(default_factory=dict)


@dataclass
class ExportCounts:
    """What went into a file, counted while it was written.

    `left_out` counts groups without a row by the reason, and, under "turns", rows whose turns the
    trainer does not read. `used` counts origins by the column of the row that names them.
    """

    columns: tuple[str, ...] = ()
    conversational: bool = False
    groups: int = 0
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    origins: dict[Origin, OriginScores] = field(default_factory=dict)
    instructions: Counter[tuple[Origin, str]] = field(default_factory=Counter)
    used: Counter[tuple[str, str]] = field(default_factory=Counter)
    labels: Counter[bool] = field(default_factory=Counter)

    def add_group(self, group: CompletionGroup) -> None:
        """Count a group's completions."""
        self.groups += 1
        for c in group.completions:
            scores = self.origins.setdefault(c.origin, OriginScores())
            scores.completions += 1
            if c.instruction is not None:
                self.instructions[c.origin, c.instruction] += 1
            if c.reward is not None:
                scores.rewarded += 1
                scores.total += c.reward
            for i, part in enumerate(c.reward_components):
                if part is not None:
                    scores.parts[i] += 1
                    scores.part_totals[i] = scores.part_totals.get(i, 0.0) + part

    def add_row(self, row: Row) -> None:
        """Count a row."""
        self.rows += 1
        for column in ("origin_chosen", "origin_rejected", "origin"):
            if column in row:
                self.used[column, row[column]] += 1
        if "label" in row:
            self.labels[row["label"]] += 1


def write_rows(
    file: IO[bytes],
    groups: Iterable[CompletionGroup],
    form: RowForm,
    rules: RowRules | None = None,
    *,
    trainer: TrainerName = "trl",
    as_lines: bool = False,
) -> ExportCounts:
    """Write the rows of one form to a file as the groups come.

    Parquet, or JSON lines with `as_lines`. The groups' prompts are all text or all conversations.

    Raises DataError where they are mixed, ConfigError where the trainer reads no such rows.
    """
    rules = rules if rules is not None else RowRules()
    stream = iter(groups)
    first = next(stream, None)
    conversational = first is not None and not isinstance(first.prompt, str)
    shape = row_shape(form, trainer, conversational=conversational)
    counts = ExportCounts(tuple(shape.columns), conversational)
    all_groups = () if first is None else chain([first], stream)
    chunks = _chunks(all_groups, shape, rules, counts, conversational=conversational)
    if as_lines:
        for rows in chunks:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.write(text.encode("utf-8", "backslashreplace"))
    else:
        _write_parquet(file, chunks, shape.schema(conversational=conversational))
    return counts


def _chunks(
    groups: Iterable[CompletionGroup],
    shape: RowShape,
    rules: RowRules,
    counts: ExportCounts,
    *,
    conversational: bool,
) -> Iterator[list[Row]]:
    stream = iter(groups)
    while chunk := list(islice(stream, _CHUNK)):
        made: list[list[Row]] = []
        for group in chunk:
            if isinstance(group.prompt, str) == conversational:
                raise DataError(MIXED_PROMPTS)
            counts.add_group(group)
            rows = rows_of(group, shape.made_from, rules)
            if not rows:
                counts.left_out[why_none(group, shape.made_from, rules)] += 1
            converted = [row for row in map(shape.convert, rows) if row is not None]
            counts.left_out["turns"] += len(rows) - len(converted)
            for row in converted:
                counts.add_row(row)
            made.append(converted)
        counts.left_out = +counts.left_out
        yield dealt(made) if shape.made_from == "kto" else list(chain.from_iterable(made))


def dealt(groups: Sequence[Sequence[Row]]) -> list[Row]:
    """One row of each group, then the next of each, every group beginning at another of its own.

    TRL's KTOTrainer reads the file in order and pairs a prompt with the answer of the row before to
    estimate the KL: that has to be another prompt's, and a batch needs both labels.
    """
    most = max(map(len, groups), default=0)
    return [
        rows[(turn + place) % len(rows)]
        for turn in range(most)
        for place, rows in enumerate(groups)
        if turn < len(rows)
    ]


def _write_parquet(file: IO[bytes], chunks: Iterable[list[Row]], schema: pa.Schema) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        for rows in chunks:
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema))
