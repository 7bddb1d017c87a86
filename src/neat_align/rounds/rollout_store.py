"""The rollout store: what is finished of an unfinished round, so that nothing is made twice.

    work/000000/plan.json          what the samples and the scores are made from
                samples-*.parquet  finished batches of samples
                branches-*.parquet where finished batches of plain answers branch
                sampled.parquet    all groups, sampled and not yet filtered
                scored-*.parquet   finished batches of scored groups
                scored-*.json      what scoring them noted (`scoring_notes`)

A batch's file is named after its first member. What is finished is read from the files' contents,
not from their number, so a run that goes on with another `generation_batch_size` takes them up as
well; with the same one, the missing batches are those that an uninterrupted run would have made,
to the bit.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from neat_align.errors import one_line
from neat_align.files.atomic import read_json, write_json, write_table
from neat_align.rounds.branching import Branch
from neat_align.rounds.completions import CompletionGroup, groups_to_table, read_groups
from neat_align.sampling.protocol import Sample

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class RolloutStore:
    """Samples and scored groups of some prompts of a round, in a folder of their own."""

    folder: Path

    def open_for(self, plan: Mapping[str, Any]) -> None:
        """Keep what was made from this plan, drop the rest, and write the plan down.

        `plan` is JSON: under "sampling" what decides the samples, beside it what decides the
        scores. Other samples have other scores, so a change of the first drops both.
        """
        plan_file = self.folder / "plan.json"
        stored = read_json(plan_file) if plan_file.is_file() else None
        if stored is None or stored["sampling"] != plan["sampling"]:
            # Other rows or other settings: start again rather than mix two runs.
            shutil.rmtree(self.folder, ignore_errors=True)
        elif stored != plan:
            for path in self.folder.glob("scored-*.parquet"):
                path.unlink()
        write_json(plan_file, plan)

    def read_samples(self, numbers: set[int]) -> dict[int, Sample]:
        """The finished samples among these request numbers, by number."""
        samples: dict[int, Sample] = {}
        for path in sorted(self.folder.glob("samples-*.parquet")):
            for row in _read_or_skip(path, _table_rows):
                if row["request"] in numbers:
                    samples[row["request"]] = Sample(
                        tuple(row["token_ids"]), row["finish_reason"], row["logprob"]
                    )
        return samples

    def write_samples(self, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        """Store a finished batch: a sample a request number, in order."""
        import pyarrow as pa

        columns: dict[str, Any] = {
            "request": pa.array(numbers, pa.int64()),
            "token_ids": pa.array([list(s.token_ids) for s in samples], pa.list_(pa.int32())),
            "finish_reason": pa.array([s.finish_reason for s in samples], pa.string()),
            "logprob": pa.array([s.logprob for s in samples], pa.float64()),
        }
        write_table(self.folder / f"samples-{numbers[0]:06d}.parquet", pa.table(columns))

    def read_branches(self, answers: Mapping[int, tuple[int, ...]]) -> dict[int, Branch]:
        """Where these plain answers branch, of those for which it is known, by request number.

        `answers` are their tokens: where another answer to a request branches says nothing.
        """
        branches: dict[int, Branch] = {}
        for path in sorted(self.folder.glob("branches-*.parquet")):
            for row in _read_or_skip(path, _table_rows):
                answer = tuple(row["token_ids"])
                if answers.get(row["request"]) == answer:
                    branches[row["request"]] = Branch(
                        answer, row["kept"], row["positive"], row["negative"]
                    )
        return branches

    def write_branches(self, numbers: Sequence[int], branches: Sequence[Branch]) -> None:
        """Store where a finished batch branches: a branch a request number, in order."""
        import pyarrow as pa

        columns: dict[str, Any] = {
            "request": pa.array(numbers, pa.int64()),
            "token_ids": pa.array([list(b.answer) for b in branches], pa.list_(pa.int32())),
            "kept": pa.array([b.kept for b in branches], pa.int32()),
            "positive": pa.array([b.positive for b in branches], pa.float64()),
            "negative": pa.array([b.negative for b in branches], pa.float64()),
        }
        write_table(self.folder / f"branches-{numbers[0]:06d}.parquet", pa.table(columns))

    def read_sampled(self) -> list[CompletionGroup] | None:
        """All sampled groups, or None while sampling is not finished."""
        path = self.folder / "sampled.parquet"
        return read_groups(path) if path.is_file() else None

    def write_sampled(self, groups: Sequence[CompletionGroup]) -> None:
        """Store all sampled groups: sampling is finished."""
        write_table(self.folder / "sampled.parquet", groups_to_table(groups))

    def read_scored(self, groups: Sequence[CompletionGroup]) -> dict[str, CompletionGroup]:
        """The finished ones of these groups with their scores, by prompt id."""
        texts = {g.prompt_id: _texts(g) for g in groups}
        scored: dict[str, CompletionGroup] = {}
        for path in sorted(self.folder.glob("scored-*.parquet")):
            # Scores of other completions (samples that were lost and drawn again) are not these
            # groups' scores.
            for group in _read_or_skip(path, read_groups):
                if texts.get(group.prompt_id) == _texts(group):
                    scored[group.prompt_id] = group
        return scored

    def write_scored(
        self, first: int, groups: Sequence[CompletionGroup], reward_names: Sequence[str]
    ) -> None:
        """Store a finished batch of scored groups; `first` is the position of its first group."""
        write_table(
            self.folder / f"scored-{first:06d}.parquet", groups_to_table(groups, reward_names)
        )


def _table_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path, page_checksum_verification=True).to_pylist()
    return rows


def _read_or_skip(path: Path, read: Callable[[Path], list[T]]) -> list[T]:
    """What a stored batch holds; of a damaged one nothing, so that it is made again."""
    try:
        return read(path)
    except (OSError, ValueError) as error:  # pyarrow's errors and DataError are among these
        said = one_line(error, 200)
        logger.warning("%s is damaged and is made again (%s)", path, said)
        return []


def _texts(group: CompletionGroup) -> list[tuple[str, int, str]]:
    return [(c.origin, c.index, c.text) for c in group.completions]
