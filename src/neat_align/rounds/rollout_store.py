"""Finished pieces of a round's work, kept in its folder until the round is whole: nothing is
sampled or rewarded twice.

A piece is a file named after its first member. Pieces are found by what they hold, not by how many
there are, so a run that goes on with another `generation_batch_size` takes them up as well; with
the same one the missing pieces are those that an uninterrupted run would have made, to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from neat_align.errors import CollapseError
from neat_align.files.atomic import write_table
from neat_align.rounds.completions import CompletionGroup, groups_to_table, read_groups
from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, SamplingParams

logger = logging.getLogger(__name__)
T = TypeVar("T")


def even_shards(items: Sequence[T], size: int) -> Iterator[tuple[int, Sequence[T]]]:
    """(position of the first, members) of as few shards as `size` allows, and alike."""
    count = max(1, -(-len(items) // max(1, size)))
    step = max(1, -(-len(items) // count))
    for start in range(0, len(items), step):
        yield start, items[start : start + step]


def group_shards(
    groups: Sequence[CompletionGroup], size: int
) -> Iterator[tuple[int, Sequence[CompletionGroup]]]:
    """(position of the first, members) of runs of groups with at most `size` completions; a larger
    group is alone.
    """
    start, held = 0, 0
    for i, group in enumerate(groups):
        n = len(group.completions)
        if i > start and held + n > size:
            yield start, groups[start:i]
            start, held = i, 0
        held += n
    if start < len(groups):
        yield start, groups[start:]


@dataclass(frozen=True)
class RolloutStore:
    """Samples of one slice of prompts, by the number of their request."""

    folder: Path
    size: int

    def draw(
        self,
        sampler: Sampler,
        numbered: Sequence[tuple[int, SampleRequest]],
        params: SamplingParams,
        *,
        check: Callable[[Sequence[int], Sequence[Sample]], None],
        names: Callable[[Sequence[int]], str],
        between: Callable[[], None],
        progress: Callable[[int], None],
    ) -> dict[int, Sample]:
        """A sample for each numbered request: read where it is there, else drawn, checked and
        written a shard at a time.

        `between` is called before every shard; what it raises ends the work with all finished
        shards kept. `names` says whose requests those are, for messages.
        """
        found = self.read({number for number, _ in numbered})
        progress(len(found))
        # Prompts of a length stand together, and equal ones meet in a batch; within a shard the
        # sampler orders them itself.
        order = sorted(numbered, key=lambda n: (-len(n[1].prompt_ids), n[1].prompt_ids))
        for _, shard in even_shards(order, self.size):
            missing = sorted(
                (item for item in shard if item[0] not in found), key=lambda item: item[0]
            )
            if not missing:
                continue
            between()
            numbers = [number for number, _ in missing]
            try:
                samples = sampler.sample(
                    [request for _, request in missing], params, progress=progress
                )
            except CollapseError as error:
                raise CollapseError(f"{error}; prompts {names(numbers)}") from error
            check(numbers, samples)
            self.write(numbers, samples)
            found.update(zip(numbers, samples, strict=True))
        return found

    def read(self, wanted: set[int]) -> dict[int, Sample]:
        """What earlier attempts finished."""
        import pyarrow.parquet as pq

        found: dict[int, Sample] = {}
        for path in sorted(self.folder.glob("samples-*.parquet")):
            for row in _undamaged(
                path, lambda p: pq.read_table(p, page_checksum_verification=True).to_pylist()
            ):
                if row["request"] in wanted:
                    found[row["request"]] = Sample(
                        tuple(row["token_ids"]), row["finish_reason"], row["logprob"]
                    )
        return found

    def write(self, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        """Keep a finished shard."""
        import pyarrow as pa

        columns: dict[str, Any] = {
            "request": pa.array(numbers, pa.int64()),
            "token_ids": pa.array([list(s.token_ids) for s in samples], pa.list_(pa.int32())),
            "finish_reason": pa.array([s.finish_reason for s in samples], pa.string()),
            "logprob": pa.array([s.logprob for s in samples], pa.float64()),
        }
        write_table(self.folder / f"samples-{numbers[0]:06d}.parquet", pa.table(columns))


def _undamaged(path: Path, read: Callable[[Path], list[T]]) -> list[T]:
    """What a kept shard holds; a damaged one holds nothing, and what it held is made again."""
    try:
        return read(path)
    except (
        OSError,
        ValueError,
    ) as error:  # pyarrow's errors and DataError are ValueErrors or OSErrors
        logger.warning(
            "%s is damaged and is made again (%s)", path, " ".join(str(error).split())[:200]
        )
        return []


def _texts(group: CompletionGroup) -> list[tuple[str, int, str]]:
    return [(c.origin, c.index, c.text) for c in group.completions]


def scored_in_shards(
    groups: Sequence[CompletionGroup],
    score: Callable[[Sequence[int]], list[CompletionGroup]],
    *,
    folder: Path,
    size: int,
    reward_names: Sequence[str],
    between: Callable[[], None],
    progress: Callable[[int], None],
) -> list[CompletionGroup]:
    """The groups with their scores: read where they are there, else made by `score` (given
    positions) and written, a shard of at most `size` completions at a time. Groups have unique
    prompt ids.
    """
    found: dict[str, CompletionGroup] = {}
    texts = {g.prompt_id: _texts(g) for g in groups}
    for path in sorted(folder.glob("scored-*.parquet")):
        # Scores of other completions (samples that were lost and drawn again) are not these groups'
        # scores.
        found.update(
            (g.prompt_id, g)
            for g in _undamaged(path, read_groups)
            if texts.get(g.prompt_id) == _texts(g)
        )
    progress(sum(g.prompt_id in found for g in groups))
    for start, shard in group_shards(groups, size):
        missing = [start + i for i, g in enumerate(shard) if g.prompt_id not in found]
        if not missing:
            continue
        between()
        made = score(missing)
        write_table(
            folder / f"scored-{missing[0]:06d}.parquet", groups_to_table(made, reward_names)
        )
        found.update((g.prompt_id, g) for g in made)
        progress(len(missing))
    return [found[g.prompt_id] for g in groups]
