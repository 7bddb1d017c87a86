"""Rows that cannot be used: an error that names them, or left out and listed (`on_bad_row`).

What is left out is never silent: every row has a line in `skipped-rows.jsonl`, and the count of
every data set is said once. At a million rows the lines wait on the disk, not in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TypeAlias

from neat_align.errors import ConfigError, DataError
from neat_align.files.atomic import write_atomic

logger = logging.getLogger(__name__)

OnBadRow: TypeAlias = Literal["error", "skip"]
ON_BAD_ROW: tuple[OnBadRow, ...] = ("error", "skip")
# In the run directory.
SKIPPED_FILE = "skipped-rows.jsonl"
MAX_ERRORS_SHOWN = 5
ADVICE = "on_bad_row: skip leaves such rows out, counts them and lists them"
# Bytes of lines that are held in memory; more go to a temporary file.
_IN_MEMORY = 1 << 20


def check_on_bad_row(value: str) -> OnBadRow:
    """The value, if it is one of `error` and `skip`. Raises ConfigError."""
    for known in ON_BAD_ROW:
        if value == known:
            return known
    raise ConfigError(f"on_bad_row is {value!r}; it must be one of {', '.join(ON_BAD_ROW)}")


@dataclass(frozen=True)
class Tally:
    """How many rows of a data set were left out, of how many, and the first of them."""

    source: str
    skipped: int
    total: int
    first: str

    def said(self) -> str:
        """A sentence for the terminal; it is loud where most rows were left out."""
        rows = "row" if self.total == 1 else "rows"
        text = f"{self.source}: {self.skipped:,} of {self.total:,} {rows}"
        if 2 * self.skipped > self.total:
            text = (
                f"{self.source}: MOST ROWS WERE LEFT OUT: {self.skipped:,} of {self.total:,}. Is "
                "this the right data, and is max_prompt_length right for it?"
            )
        return f"{text}; the first: {self.first}"


class SkippedRows:
    """Rows that were left out, in the order in which they were met.

    `count` is how many; `tallies` says it for each data set.
    """

    def __init__(self) -> None:
        self.count = 0
        self.tallies: list[Tally] = []
        self._lines: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        weakref.finalize(self, self._lines.close)
        self._digest = hashlib.blake2b(digest_size=16)
        self._taken: set[bytes] = set()
        self._written = 0
        self._said = 0

    def add(
        self, where: str, row_id: str | int | None, reason: str, *, round_index: int | None = None
    ) -> None:
        """Note a row.

        `round_index` is for rows that turn out bad within a round: their lines stay in the file
        when the run is resumed, and are not repeated when the round is made again.
        """
        facts = {"where": where, "id": row_id, "reason": reason}
        if round_index is not None:
            facts["round"] = round_index
        self._append((json.dumps(facts, ensure_ascii=False) + "\n").encode("utf-8", _ESCAPED))
        self.count += 1

    def _append(self, line: bytes) -> None:
        self._lines.seek(0, 2)
        self._lines.write(line)
        self._digest.update(line)

    def take(self, other: SkippedRows) -> None:
        """Add what another one holds, unless the very same was taken before."""
        key = other._digest.digest()
        if not other.count or key in self._taken:
            return
        self._taken.add(key)
        other._lines.seek(0)
        for line in other._lines:
            self._append(line)
        self.count += other.count
        self.tallies += other.tallies

    def __iter__(self) -> Iterator[dict[str, object]]:
        self._lines.seek(0)
        return map(json.loads, self._lines.read().splitlines())

    def write(self, folder: Path, name: str = SKIPPED_FILE) -> None:
        """Write `skipped-rows.jsonl` into a folder, atomically, and say what is new in it.

        Does nothing while no row was left out since the last time.
        """
        if self.count == self._written:
            return
        path = folder / name
        earlier = list(_lines_of_rounds(path))

        def copy(file: IO[bytes]) -> None:
            self._lines.seek(0)
            shutil.copyfileobj(self._lines, file)
            if earlier:
                self._lines.seek(0)
                known = {line for line in self._lines if b'"round": ' in line}
                file.writelines(line for line in earlier if line not in known)

        write_atomic(path, copy)
        self._written = self.count
        news = [f"  {tally.said()}" for tally in self.tallies[self._said :]]
        self._said = len(self.tallies)
        rows = "row is" if self.count == 1 else "rows are"
        text = f"{self.count:,} {rows} left out and listed in {path}" + (":" if news else "")
        logger.warning("%s", "\n".join([text, *news]))


_ESCAPED = "backslashreplace"  # a lone surrogate in an id; JSON has the same escape


def _lines_of_rounds(path: Path) -> Iterator[bytes]:
    """Lines that an earlier part of the run wrote about its rounds."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError):  # a line that somebody broke
                if "round" in json.loads(line):
                    yield line


class BadRows:
    """The rows of one data set that cannot be used, as they turn up.

    Args:
        source: what messages call the data set.
        on_bad_row: `error` gathers them for one error; `skip` leaves them out.
        skipped: where rows that are left out are listed.
    """

    def __init__(self, source: str, on_bad_row: str, skipped: SkippedRows) -> None:
        self.source = source
        self.skips = check_on_bad_row(on_bad_row) == "skip"
        self.skipped = skipped
        self.count = 0
        self._first: list[str] = []

    def add(self, where: str, row_id: str | int | None, reason: str) -> None:
        """A row that cannot be used, and why."""
        self.count += 1
        if len(self._first) < MAX_ERRORS_SHOWN:
            self._first.append(f"{where}: {reason}")
        if self.skips:
            self.skipped.add(where, row_id, reason)

    def settle(self, kept: int) -> None:
        """Once all rows were looked at, `kept` of them good.

        Raises DataError where bad rows are errors, and where no row is left.
        """
        if not self.count:
            return
        if self.skips and kept:
            total = kept + self.count
            self.skipped.tallies.append(Tally(self.source, self.count, total, self._first[0]))
            return
        lines = list(self._first)
        if self.count > 1:
            total = self.count + kept
            lines.insert(0, f"{self.source}: {self.count} of {total} rows cannot be used:")
        if self.count > MAX_ERRORS_SHOWN:
            lines.append(f"… and {self.count - MAX_ERRORS_SHOWN} more")
        lines.append(f"({ADVICE})" if kept else "(no row is left, so on_bad_row: skip cannot help)")
        raise DataError("\n  ".join(lines))
