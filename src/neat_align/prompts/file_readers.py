"""Readers of data files: records one by one, each with the place where it is.

Every message names the place: `file.jsonl:17` is a line (from 1), `row 17` an index (from 0).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from neat_align.errors import DataError, one_line
from neat_align.prompts.columns import ColumnNames
from neat_align.prompts.compressed import is_compressed, opened
from neat_align.prompts.conversation_forms import names_a_form
from neat_align.prompts.row_forms import short_repr

# Where a row is, and the row, or the DataError that came in reading it.
Record: TypeAlias = tuple[str, object]
# What pyarrow has been seen to raise on broken files, besides errors of its own.
_PARQUET_ERRORS = (ValueError, OSError, ArithmeticError, TypeError, MemoryError)
# Rows of a Parquet file that are Python objects before they are read.
_ROWS_AT_ONCE = 1024
# Columns in which an empty CSV field means that there is none.
_OPTIONAL_COLUMNS = ("id", "prompt_id", "chosen", "rejected")


def numbered(rows: Any, name: str) -> Iterator[Record]:
    """The rows of a data set or of any iterable, each with its index; `name` is for messages."""
    for index, row in enumerate(_as_python(rows)):
        yield f"{name}, row {index}", row


def _as_python(rows: Any) -> Iterable[Any]:
    """The rows as plain Python, also where a data set was given another format (numpy, torch)."""
    if isinstance(rows, list | tuple):
        return rows
    from datasets import Dataset, IterableDataset

    return rows.with_format(None) if isinstance(rows, Dataset | IterableDataset) else rows


def _jsonl(path: Path, _: ColumnNames) -> Iterator[Record]:
    # Bytes: only \n ends a line, whatever line separators the text holds.
    with opened(path) as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                if line.strip():
                    yield f"{path}:{number}", json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield f"{path}:{number}", _unreadable(error)


def _json(path: Path, names: ColumnNames) -> Iterator[Record]:
    if not _is_list(path):  # one object a line, as many files with this ending are
        yield from _jsonl(path, names)
        return
    text = _decode(path)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{getattr(error, 'lineno', 1)}: {_unreadable(error)}") from None
    yield from numbered(items, str(path))


def _is_list(path: Path) -> bool:
    with opened(path) as file:
        start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
        while not start and (more := file.read(1 << 16)):
            start = more.lstrip()
    return start.startswith(b"[")


def _decode(path: Path) -> str:
    with opened(path) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {_unreadable(error)}") from None


def _no_utf8(text: str) -> DataError | None:
    """What is wrong with a text in which undecodable bytes are lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return _unreadable(
            UnicodeDecodeError("utf-8", bytes([ord(text[error.start]) - 0xDC00]), 0, 1, "")
        )
    return None


def _unreadable(error: Exception) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        return DataError(
            f"not valid UTF-8 (byte 0x{error.object[error.start]:02x}): save the file as UTF-8"
        )
    where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    return DataError(
        f"not valid JSON{where} ({getattr(error, 'msg', error)}): write one object a line, or one "
        "list in a .json file"
    )


def _parquet(path: Path, _: ColumnNames) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if is_compressed(path):
        raise DataError(f"{path}: Parquet is compressed inside: unpack the file first")
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            batches: Any = file.iter_batches(batch_size=_ROWS_AT_ONCE)
            for batch in batches:
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (pa.ArrowException, *_PARQUET_ERRORS) as error:
        said = one_line(error, 200)
        raise DataError(
            f"{path}: cannot be read as Parquet ({said}): write the file again"
        ) from None


def _csv(path: Path, names: ColumnNames) -> Iterator[Record]:
    # Bytes that are no UTF-8 become lone surrogates, so that only their own rows are bad.
    with (
        opened(path) as raw,
        io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        yield from _csv_rows(path, file, names)


def _csv_rows(path: Path, file: Iterable[str], names: ColumnNames) -> Iterator[Record]:
    reader = csv.reader(file, strict=True)
    line = 1
    try:
        header = next(reader, [])
        if (unreadable := _no_utf8("".join(header))) is not None:
            raise DataError(f"{path}:1: {unreadable}")
        known = {name: names.renamed(name) for name in header}
        if not names_a_form(known.values()) or len(known) < len(header):
            raise DataError(
                f"{path}:1: the header is {short_repr(header)}; it must name prompt, or chosen and "
                "rejected, and no column twice (columns: {prompt: …} says which one is the prompt)"
            )
        line = reader.line_num + 1
        for fields in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if (unreadable := _no_utf8("".join(fields))) is not None:
                yield where, unreadable
            elif len(fields) not in (0, len(header)):
                error = DataError(
                    f"{len(fields)} fields where the header has {len(header)}: quote fields that "
                    "hold commas"
                )
                yield where, error
            elif fields:
                row: dict[str, str | None] = dict(zip(header, fields, strict=True))
                for name, is_called in known.items():
                    if is_called in _OPTIONAL_COLUMNS and row[name] == "":
                        row[name] = None
                yield where, row
    except csv.Error as csv_error:
        raise DataError(
            f"{path}:{line}: not valid CSV ({csv_error}): quote the field, or use .jsonl"
        ) from None


# By the ending of the file's name.
READERS: dict[str, Callable[[Path, ColumnNames], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}
