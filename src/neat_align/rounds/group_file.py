"""A file of groups that is larger than memory: written in a stream, read a few groups at a time.

A group is about 100 KB as Python objects and 7 KB in its file, so a round of 100,000 groups is held
as its file. Groups are stored in row groups of `ROW_GROUP`; what is read is one of them at a time.
"""

from __future__ import annotations

import contextlib
import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, overload

from neat_align.errors import DataError
from neat_align.rounds.completions import (
    MIXED_PROMPTS,
    CompletionGroup,
    arrow_schema,
    check_columns,
    groups_from_table,
    groups_to_table,
    reward_names_in,
)

if TYPE_CHECKING:
    import pyarrow as pa

# Groups that are stored, and read, together. Of 16 to 256, 64 costs least: one group out of the
# middle takes about 2 ms, and 100,000 groups have a table of contents of 2.5 MB.
ROW_GROUP = 64
# Row groups that are kept as they were read (Arrow's form, 10 KB a group of 8 answers of 64
# tokens): small rounds are read from the disk once.
_KEPT_ROW_GROUPS = 8
# What ranks and counts completions, without their tokens; with the texts beside it.
_REWARD_COLUMNS = ("origins", "indices", "instructions", "rewards")
_TEXT_COLUMNS = (
    *("prompt_id", "prompt", "completions", *_REWARD_COLUMNS),
    *("finish_reasons", "seeds", "reward_components"),
)


class GroupFile(Sequence[CompletionGroup]):
    """The groups of a Parquet file, read when they are asked for.

    It holds a path and the file's table of contents, so it can be pickled and used after a fork.
    `groups[i]` reads the row group that has it, unless that was read lately; iterating reads the
    file once, in order, and holds `ROW_GROUP` groups at a time. It is equal to any sequence of the
    same groups.

    Raises OSError or ValueError where the file is not Parquet, DataError for one without the
    columns of groups, and, later, DataError where groups cannot be read (a page does not match its
    checksum, the file is gone).
    """

    def __init__(self, path: str | Path) -> None:
        import pyarrow.parquet as pq

        self.path = Path(path).absolute()
        self._contents = pq.read_metadata(self.path)
        check_columns(self._contents.schema.to_arrow_schema().names)
        row_groups = range(self._contents.num_row_groups)
        sizes = (self._contents.row_group(i).num_rows for i in row_groups)
        self._ends = tuple(accumulate(sizes))
        self._read: dict[int, pa.Table] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads the table of contents itself."""
        return GroupFile, (str(self.path),)

    @property
    def reward_names(self) -> list[str]:
        """Names of the reward functions behind `reward_components`, in order."""
        return reward_names_in(self._contents.schema.to_arrow_schema().metadata)

    def __len__(self) -> int:
        """Groups in the file."""
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> CompletionGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[CompletionGroup]: ...
    def __getitem__(self, index: int | slice) -> CompletionGroup | list[CompletionGroup]:
        """One group, or a list of some."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        row_group = bisect_right(self._ends, position)
        first = self._ends[row_group - 1] if row_group else 0
        with _named(self.path):
            table = self._row_group(row_group)
            return groups_from_table(table.slice(position - first, 1))[0]

    def _row_group(self, number: int) -> pa.Table:
        table = self._read.pop(number, None)
        if table is None:
            with self._open() as file:
                table = file.read_row_group(number, use_threads=False)
            _check_count(table.num_rows, self._contents.row_group(number).num_rows)
        self._read[number] = table  # the last one in is the last to go
        for oldest in list(self._read)[:-_KEPT_ROW_GROUPS]:
            self._read.pop(oldest, None)
        return table

    def _open(self) -> Any:
        import pyarrow.parquet as pq

        # Opened for every read: nothing is shared with a forked process, and no thread is needed.
        return pq.ParquetFile(
            self.path, metadata=self._contents, page_checksum_verification=True, pre_buffer=False
        )

    def __iter__(self) -> Iterator[CompletionGroup]:
        """All groups in order."""
        return self._scan(None)

    def without_tokens(self, *, texts: bool = False) -> Iterator[CompletionGroup]:
        """All groups in order with their origins, instructions and rewards only, each of the single
        rewards where there are several.

        With `texts` also prompts, texts, seeds, how they ended and what each reward function said.
        Other fields are empty and are not read: this takes a tenth of the time.
        """
        if texts:
            return self._scan(_TEXT_COLUMNS)
        single = ("reward_components",) if len(self.reward_names) > 1 else ()
        return self._scan((*_REWARD_COLUMNS, *single))

    def _scan(self, columns: Sequence[str] | None) -> Iterator[CompletionGroup]:
        import pyarrow as pa

        with _named(self.path):
            file = self._open()
        with file:
            batches = file.iter_batches(batch_size=ROW_GROUP, columns=columns, use_threads=False)
            count = 0
            while True:
                with _named(self.path):
                    batch = next(batches, None)
                    if batch is None:
                        _check_count(count, len(self))
                        return
                    count += batch.num_rows
                    groups = groups_from_table(pa.Table.from_batches([batch]), columns)
                yield from groups

    def __eq__(self, other: object) -> bool:
        """Whether another sequence holds the same groups in the same order."""
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        if len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """The path and the number of groups."""
        return f"GroupFile({str(self.path)!r}, {len(self)} groups)"


def _check_count(read: int, written: int) -> None:
    """A damaged page header, which no checksum covers, can end a column early without an error."""
    if read != written:
        raise ValueError(f"{read} groups were read of {written}")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what goes wrong while groups are read into a DataError with the file's path."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is gone: the groups of a round are read from it as they are needed"
        ) from error
    # pyarrow's errors are OSErrors and ValueErrors
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    """What is said of a file that cannot be read as groups."""
    return DataError(
        f"{path} could not be read as groups ({type(error).__name__}: {error}): it is damaged, or "
        "not a group file"
    )


def without_tokens(
    groups: Iterable[CompletionGroup], *, texts: bool = False
) -> Iterator[CompletionGroup]:
    """Groups in order, for who reads origins, instructions and rewards only.

    With `texts` also what a data set of them needs. Of a file nothing else is read (`GroupFile`).
    """
    return groups.without_tokens(texts=texts) if isinstance(groups, GroupFile) else iter(groups)


def write_groups(
    file: IO[bytes] | io.RawIOBase,
    groups: Iterable[CompletionGroup],
    reward_names: Sequence[str] = (),
) -> int:
    """Write groups to a file as they come, `ROW_GROUP` in memory at a time; gives their number.

    Raises DataError where some prompts are text and others conversations.
    """
    import pyarrow.parquet as pq

    stream = iter(groups)
    chunk = list(islice(stream, ROW_GROUP))
    conversational = bool(chunk) and not isinstance(chunk[0].prompt, str)
    schema = arrow_schema(conversational=conversational, reward_names=reward_names)
    count = 0
    # Token ids and log-probabilities hardly repeat: a dictionary of them makes a file a third
    # larger, and smallest and largest values help nobody. zstd finds the texts that do repeat.
    with pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        write_page_checksum=True,
        use_dictionary=False,
        write_statistics=False,
    ) as writer:
        while chunk:
            if isinstance(chunk[0].prompt, str) == conversational:
                raise DataError(MIXED_PROMPTS)
            writer.write_table(groups_to_table(chunk, reward_names), row_group_size=ROW_GROUP)
            count += len(chunk)
            chunk = list(islice(stream, ROW_GROUP))
    return count
