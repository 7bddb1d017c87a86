"""Prompts and human preference pairs: read, told apart, validated before anything is sampled.

Forms understood (TRL's, plus HH-RLHF's transcripts): `prompt` as text or messages, with or without
`chosen` and `rejected`; `chosen` and `rejected` alone, which share the prompt as their beginning;
whole Human/Assistant transcripts. Every message names where the row is: `file.jsonl:17` is a line
(from 1), `row 17` an index (from 0).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from neat_align.errors import DataError
from neat_align.prompts.row_forms import oddities_of, read_pair, shown
from neat_align.prompts.rows import PromptRow

MAX_ERRORS_SHOWN = 5
_Record: TypeAlias = tuple[
    str, object
]  # where a row is, and the row, or the DataError that came in reading it


def load_rows(
    source: str | Path, *, split: str | None = None, limit: int | None = None
) -> list[PromptRow]:
    """Rows of a .jsonl, .json, .parquet or .csv file, of a folder written by `save_to_disk`, or of
    a data set on the hub.

    Without `split`, a data set with several gives `train`. With `limit`, only the first this many
    rows are read.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be 1 or more, or unset for every row")
    path = Path(source).expanduser()
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(
                f"{source}: files of type {path.suffix or '(none)'} are not read; use one of "
                f"{', '.join(_READERS)}"
            )
        if split is not None:
            raise DataError(
                f"split is {split!r}, but {source} is a file and has no splits: remove split"
            )
        return _collect(reader(path), str(source), limit)
    hub_name = (
        isinstance(source, str)
        and path.suffix.lower() not in _READERS
        and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)
    )
    if not path.exists() and not hub_name:
        raise DataError(
            f"{source}: there is no such file or folder: check the path (the current folder is "
            f"{Path.cwd()})"
        )
    return _collect(
        _numbered(_load_dataset(str(source), path, split), f"dataset '{source}'"),
        str(source),
        limit,
    )


def rows_from_dataset(dataset: Iterable[Any], *, name: str = "train_dataset") -> list[PromptRow]:
    """Rows of a `datasets.Dataset` (one split), or of any iterable of mappings.

    `name` is what messages call it.
    """
    if isinstance(dataset, Mapping | str | Path):
        what = (
            f"a dict of {', '.join(map(str, dataset))}"
            if isinstance(dataset, Mapping)
            else shown(str(dataset))
        )
        raise DataError(
            f"{name} is {what}; it must be one data set or list of rows: pass one split, or read "
            "a file with load_rows"
        )
    return _collect(_numbered(dataset, f"dataset '{name}'"), name, None)


def _jsonl(path: Path) -> Iterator[_Record]:
    with path.open(
        "rb"
    ) as file:  # bytes: only \n ends a line, whatever line separators the text holds
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                if line.strip():
                    yield f"{path}:{number}", json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield f"{path}:{number}", _unreadable(error)


def _json(path: Path) -> Iterator[_Record]:
    text = _decode(path)
    if not text.lstrip().startswith("["):  # one object a line, as many files with this ending are
        yield from _jsonl(path)
        return
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{getattr(error, 'lineno', 1)}: {_unreadable(error)}") from None
    yield from _numbered(items, str(path))


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {_unreadable(error)}") from None


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


def _parquet(path: Path) -> Iterator[_Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        read_table: Any = pq.read_table
        items = read_table(path).to_pylist()
    except (
        pa.ArrowException,
        ValueError,
        OSError,
        ArithmeticError,
        TypeError,
        MemoryError,
    ) as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: cannot be read as Parquet ({said}): write the file again"
        ) from None
    yield from _numbered(items, str(path))


def _csv(path: Path) -> Iterator[_Record]:
    reader = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or (
            "prompt" not in header and not {"chosen", "rejected"} <= set(header)
        ):
            raise DataError(
                f"{path}:1: the header is {shown(header)}; it must name prompt, or chosen and "
                "rejected, and no column twice"
            )
        line = reader.line_num + 1
        for fields in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if len(fields) not in (0, len(header)):
                yield (
                    where,
                    DataError(
                        f"{len(fields)} fields where the header has {len(header)}: quote fields "
                        "that hold commas"
                    ),
                )
            elif fields:  # an empty field is how CSV says that there is none
                pairs = zip(header, fields, strict=True)
                yield (
                    where,
                    {
                        k: None if v == "" and k in ("id", "prompt_id", "chosen", "rejected") else v
                        for k, v in pairs
                    },
                )
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: not valid CSV ({error}): quote the field, or use .jsonl"
        ) from None


_READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}


def _load_dataset(source: str, path: Path, split: str | None) -> Any:
    from datasets.exceptions import DatasetsError
    from datasets.load import load_dataset, load_from_disk

    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    try:
        loaded: Any = (
            load_from_disk(path)
            if saved
            else load_dataset(str(path) if path.is_dir() else source, split=split)
        )
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        raise DataError(
            f"{source}: there is no such file, and it cannot be loaded as a data set: {error}"
        ) from error
    if isinstance(loaded, dict):
        name = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
        if name not in loaded:
            raise DataError(
                f"{source}: there is no split {name!r}; set split to one of "
                f"{', '.join(map(str, loaded))}"
            )
        return loaded[name]
    if saved and split is not None:
        raise DataError(
            f"split is {split!r}, but {source} holds one data set without splits: remove split"
        )
    return loaded


def _numbered(rows: Any, name: str) -> Iterator[_Record]:
    for index, row in enumerate(rows.with_format(None) if hasattr(rows, "with_format") else rows):
        yield f"{name}, row {index}", row


def _collect(records: Iterable[_Record], source: str, limit: int | None) -> list[PromptRow]:
    checker, rows, errors = _Checker(), [], []
    for where, record in islice(records, limit):
        try:
            rows.append(checker.row(where, record))
        except DataError as error:
            errors.append(f"{where}: {error}")
    if errors:
        more = (
            [f"… and {len(errors) - MAX_ERRORS_SHOWN} more"]
            if len(errors) > MAX_ERRORS_SHOWN
            else []
        )
        count = (
            [f"{source}: {len(errors)} of {len(errors) + len(rows)} rows cannot be used:"]
            if len(errors) > 1
            else []
        )
        raise DataError("\n  ".join([*count, *errors[:MAX_ERRORS_SHOWN], *more]))
    if not rows:
        raise DataError(f"{source}: no rows: it is empty; a row with a prompt is needed")
    for oddity, places in checker.oddities.items():
        warnings.warn(
            f"{source}: {len(places)} of {len(rows)} rows {oddity} (the first: {places[0]})",
            stacklevel=3,
        )
    return rows


class _Checker:
    """What must hold between rows: one form for all, no id twice. Gathers what is worth a
    warning.
    """

    def __init__(self) -> None:
        self.oddities: defaultdict[str, list[str]] = defaultdict(list)
        self._forms: dict[str, tuple[str, str]] = {}
        self._id_places: dict[str, str] = {}
        self._hashes: Counter[str] = Counter()
        self._prompts: Counter[str] = Counter()

    def row(self, where: str, record: object) -> PromptRow:
        if isinstance(record, DataError):
            raise record
        if not isinstance(record, Mapping) or not all(isinstance(name, str) for name in record):
            raise DataError(
                f"the row is {shown(record)}, not an object with named fields: write it as "
                f'{{"prompt": …}}'
            )
        _check_text(record)
        prompt, chosen, rejected = read_pair(record)
        for field, value in (
            ("prompt", prompt),
            ("chosen", record.get("chosen")),
            ("rejected", record.get("rejected")),
        ):
            form = "text" if isinstance(value, str) else "messages"
            first, place = (
                self._forms.setdefault(field, (form, where)) if value is not None else (form, where)
            )
            if form != first:
                raise DataError(
                    f"{field} is {form}, but {first} at {place}: use one form in all rows"
                )
        oddities, pair_is_usable = oddities_of(record, prompt, chosen, rejected)
        if not pair_is_usable:
            chosen = rejected = None
        row_id, id_field = self._identify(record, [prompt, chosen, rejected], where)
        self._prompts[key := json.dumps(prompt)] += 1
        if self._prompts[key] > 1:
            oddities.append(
                "repeat an earlier prompt; they are kept and weigh more: drop them if that is not "
                "meant"
            )
        for oddity in oddities:
            self.oddities[oddity].append(where)
        columns = {
            k: v for k, v in record.items() if k not in ("prompt", "chosen", "rejected", id_field)
        }
        return PromptRow(row_id, prompt, chosen, rejected, columns, where)

    def _identify(self, row: Mapping[str, Any], content: list[Any], where: str) -> tuple[str, str]:
        field = next((name for name in ("id", "prompt_id") if row.get(name) is not None), "")
        if field:
            value = row[field]
            if (
                isinstance(value, bool)
                or not isinstance(value, str | int)
                or not str(value).strip()
            ):
                raise DataError(
                    f"{field} is {shown(value)}; it must be text or a whole number: correct it, "
                    "or leave the field out"
                )
            row_id = str(value)
        else:
            digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
            self._hashes[digest] += 1
            row_id = digest if self._hashes[digest] == 1 else f"{digest}-{self._hashes[digest]}"
        first = self._id_places.setdefault(row_id, where)
        if first != where:
            raise DataError(
                f"{field or 'id'} {row_id!r} is also that of {first}: make ids unique, or leave "
                "the field out"
            )
        return row_id, field


def _check_text(row: Mapping[str, Any]) -> None:
    """Refuse what UTF-8 cannot hold, in any column: it would fail at the first write,
    hours later.
    """
    for field, value in row.items():
        try:
            json.dumps([field, value], ensure_ascii=False, skipkeys=True, default=str).encode(
                "utf-8"
            )
        except UnicodeEncodeError as error:
            code = f"U+{ord(error.object[error.start]):04X}"
            raise DataError(
                f"{field!a} holds the lone surrogate {code}, half of a character: replace it in "
                "the text"
            ) from None
        except RecursionError:
            raise DataError(
                f"{field!a} is nested too deeply: flatten it, or leave the column out"
            ) from None
