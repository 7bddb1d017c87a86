"""Prompts and human preference pairs: read, told apart, validated before anything is sampled.

Forms understood (TRL's, plus HH-RLHF's transcripts): `prompt` as text or messages, with or without
`chosen` and `rejected`; `chosen` and `rejected` alone, which share the prompt as their beginning;
whole Human/Assistant transcripts. Every message names where the row is: `file.jsonl:17` is a line
(from 1), `row 17` an index (from 0).
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from neat_align.errors import DataError
from neat_align.prompts.file_readers import READERS, Record, numbered, open_dataset
from neat_align.prompts.row_forms import answer_warnings, read_pair, short_repr
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.template_inputs import read_template_inputs

MAX_ERRORS_SHOWN = 5
# The name of a data set on the hub: "name" or "owner/name".
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_rows(
    source: str | Path, *, split: str | None = None, limit: int | None = None
) -> list[PromptRow]:
    """Rows of a file, of a folder written by `save_to_disk`, or of a data set on the hub.

    Files are .jsonl, .json, .parquet or .csv. Without `split`, a data set with several gives
    `train`. With `limit`, only the first this many rows are read. Raises DataError that names the
    place of every row that is refused (the first five), and warns of what is odd but usable.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be 1 or more, or unset for every row")
    path = Path(source).expanduser()
    if path.is_file():
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(
                f"{source}: files of type {path.suffix or '(none)'} are not read; use one of "
                f"{', '.join(READERS)}"
            )
        if split is not None:
            raise DataError(
                f"split is {split!r}, but {source} is a file and has no splits: remove split"
            )
        return _collect(reader(path), str(source), limit)
    may_be_on_hub = (
        isinstance(source, str)
        and path.suffix.lower() not in READERS
        and _HUB_NAME.fullmatch(source) is not None
    )
    if not path.exists() and not may_be_on_hub:
        raise DataError(
            f"{source}: there is no such file or folder: check the path (the current folder is "
            f"{Path.cwd()})"
        )
    dataset = open_dataset(str(source), path, split)
    return _collect(numbered(dataset, f"dataset '{source}'"), str(source), limit)


def rows_from_dataset(dataset: Iterable[Any], *, name: str = "train_dataset") -> list[PromptRow]:
    """Rows of a `datasets.Dataset` (one split), or of any iterable of mappings.

    `name` is what messages call it.
    """
    if isinstance(dataset, Mapping | str | Path):
        what = short_repr(str(dataset))
        if isinstance(dataset, Mapping):
            what = f"a dict of {', '.join(map(str, dataset))}"
        raise DataError(
            f"{name} is {what}; it must be one data set or list of rows: pass one split, or read "
            "a file with load_rows"
        )
    return _collect(numbered(dataset, f"dataset '{name}'"), name, None)


def _collect(records: Iterable[Record], source: str, limit: int | None) -> list[PromptRow]:
    checker, rows, errors = _Checker(), [], []
    for where, record in islice(records, limit):
        try:
            rows.append(checker.row(where, record))
        except DataError as error:
            errors.append(f"{where}: {error}")
    if errors:
        lines = errors[:MAX_ERRORS_SHOWN]
        if len(errors) > 1:
            total = len(errors) + len(rows)
            lines.insert(0, f"{source}: {len(errors)} of {total} rows cannot be used:")
        if len(errors) > MAX_ERRORS_SHOWN:
            lines.append(f"… and {len(errors) - MAX_ERRORS_SHOWN} more")
        raise DataError("\n  ".join(lines))
    if not rows:
        raise DataError(f"{source}: no rows: it is empty; a row with a prompt is needed")
    for warning, places in checker.warnings.items():
        warnings.warn(
            f"{source}: {len(places)} of {len(rows)} rows {warning} (the first: {places[0]})",
            stacklevel=3,
        )
    return rows


class _Checker:
    """What must hold between rows: one form for all, no id twice.

    `warnings` gathers what is worth a warning, and the places of the rows.
    """

    def __init__(self) -> None:
        self.warnings: defaultdict[str, list[str]] = defaultdict(list)
        self._forms: dict[str, tuple[str, str]] = {}
        self._id_places: dict[str, str] = {}
        self._hashes: Counter[str] = Counter()
        self._prompts: Counter[str] = Counter()

    def row(self, where: str, record: object) -> PromptRow:
        if isinstance(record, DataError):
            raise record
        if not isinstance(record, Mapping) or not all(isinstance(name, str) for name in record):
            raise DataError(
                f"the row is {short_repr(record)}, not an object with named fields: write it as "
                f'{{"prompt": …}}'
            )
        _check_text(record)
        prompt, chosen, rejected = read_pair(record)
        self._check_form("prompt", prompt, where)
        self._check_form("chosen", record.get("chosen"), where)
        self._check_form("rejected", record.get("rejected"), where)
        row_warnings, answers_are_usable = answer_warnings(record, prompt, chosen, rejected)
        if not answers_are_usable:
            chosen = rejected = None
        inputs = read_template_inputs(record)
        given = [[inputs.tools, inputs.kwargs]] if inputs else []
        row_id, id_field = self._identify(record, [prompt, chosen, rejected, *given], where)
        key = json.dumps([prompt, *given])
        self._prompts[key] += 1
        if self._prompts[key] > 1:
            row_warnings.append(
                "repeat an earlier prompt; they are kept and weigh more: drop them if that is not "
                "meant"
            )
        for warning in row_warnings:
            self.warnings[warning].append(where)
        read = ("prompt", "chosen", "rejected", id_field)
        columns = {name: value for name, value in record.items() if name not in read}
        return PromptRow(row_id, prompt, chosen, rejected, columns, where, inputs)

    def _check_form(self, field: str, value: object, where: str) -> None:
        if value is None:
            return
        form = "text" if isinstance(value, str) else "messages"
        first, place = self._forms.setdefault(field, (form, where))
        if form != first:
            raise DataError(f"{field} is {form}, but {first} at {place}: use one form in all rows")

    def _identify(self, row: Mapping[str, Any], content: list[Any], where: str) -> tuple[str, str]:
        """The row's id, and the field that it is from ("" for a hash of the row's content)."""
        field = next((name for name in ("id", "prompt_id") if row.get(name) is not None), "")
        if field:
            value = row[field]
            is_an_id = isinstance(value, str | int) and not isinstance(value, bool)
            if not is_an_id or not str(value).strip():
                raise DataError(
                    f"{field} is {short_repr(value)}; it must be text or a whole number: "
                    "correct it, or leave the field out"
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
    """Refuse what UTF-8 cannot hold, in any column: the first write would fail, hours later."""
    for field, value in row.items():
        try:
            text = json.dumps([field, value], ensure_ascii=False, skipkeys=True, default=str)
            text.encode("utf-8")
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
