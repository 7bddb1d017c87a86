"""Columns of the data under the names that are read here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neat_align.errors import DataError

Columns = Mapping[str, str] | Sequence[str] | None


class ColumnNames:
    """Renames the columns of records, and remembers which were there.

    `{prompt: question}` reads the column `question` as the prompt; every other column keeps its
    name, save one whose name the mapping gives away, which is left out. A list keeps the columns
    that it names. A record may lack columns; `settle` refuses one that no record had.
    """

    def __init__(self, columns: Columns) -> None:
        self._of: dict[str, str] | None = None
        self._kept: frozenset[str] | None = None
        if isinstance(columns, Mapping):
            self._of = {column: name for name, column in columns.items()}
        elif columns is not None:
            self._kept = frozenset(columns)
        self._wanted = set(self._of or self._kept or ())
        self._seen: dict[str, None] = {}

    def renamed(self, name: str) -> str:
        """What a column is called here."""
        return (self._of or {}).get(name, name)

    def apply(self, record: object) -> object:
        """The record with its columns renamed; what is no record as it is."""
        if (self._of is None and self._kept is None) or not isinstance(record, Mapping):
            return record
        if self._wanted:
            self._seen |= dict.fromkeys(map(str, record))
            self._wanted -= record.keys()
        if self._kept is not None:
            return {name: value for name, value in record.items() if name in self._kept}
        of = self._of or {}
        given = {of[name]: value for name, value in record.items() if name in of}
        others = {
            name: value for name, value in record.items() if name not in of and name not in given
        }
        return {**given, **others}

    def applied(self, records: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, object]]:
        """All records with their places."""
        for where, record in records:
            yield where, self.apply(record)

    def settle(self, source: str) -> None:
        """Once the records were read: DataError for a column that none of them had."""
        if self._wanted and self._seen:
            missing = min(self._wanted)
            what = (
                f"columns reads {self.renamed(missing)} from {missing!r}"
                if self._of
                else (f"columns keeps {missing!r}")
            )
            raise DataError(
                f"{source}: {what}, and no row has that column; there are "
                f"{', '.join(self._seen)}: correct columns"
            )
