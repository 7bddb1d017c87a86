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
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from neat_align.errors import DataError
from neat_align.prompts.file_readers import READERS, Record, numbered, open_dataset
from neat_align.prompts.row_forms import answer_warnings, read_pair, short_repr
from neat_align.prompts.rows import PromptRow, hashable
from neat_align.prompts.skipped_rows import BadRows, SkippedRows
from neat_align.prompts.template_inputs import read_template_inputs

# The name of a data set on the hub: "name" or "owner/name".
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_rows(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    on_bad_row: str = "error",
    skipped: SkippedRows | None = None,
) -> list[PromptRow]:
    """Rows of a file, of a folder written by `save_to_disk`, or of a data set on the hub.

    Files are .jsonl, .json, .parquet or .csv. Without `split`, a data set with several gives
    `train`. With `limit`, only the first this many rows are read. Raises DataError that names the
    place of every row that is refused (the first five), and warns of what is odd but usable.

    With `on_bad_row="skip"`, rows that would be refused are left out, with a warning that counts
    them, and listed in `skipped` where one is given. A file that cannot be told apart into rows
    (broken CSV, JSON in one list, Parquet) stays an error, and so does data without a good row.
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
        return _collect(reader(path), str(source), limit, on_bad_row, skipped)
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
    records = numbered(dataset, f"dataset '{source}'")
    return _collect(records, str(source), limit, on_bad_row, skipped)


def rows_from_dataset(
    dataset: Iterable[Any],
    *,
    name: str = "train_dataset",
    on_bad_row: str = "error",
    skipped: SkippedRows | None = None,
) -> list[PromptRow]:
    """Rows of a `datasets.Dataset` (one split), or of any iterable of mappings.

    `name` is what messages call it; `on_bad_row` and `skipped` are those of `load_rows`.
    """
    if isinstance(dataset, Mapping | str | Path):
        what = short_repr(str(dataset))
        if isinstance(dataset, Mapping):
            what = f"a dict of {', '.join(map(str, dataset))}"
        raise DataError(
            f"{name} is {what}; it must be one data set or list of rows: pass one split, or read "
            "a file with load_rows"
        )
    return _collect(numbered(dataset, f"dataset '{name}'"), name, None, on_bad_row, skipped)


def _collect(
    records: Iterable[Record],
    source: str,
    limit: int | None,
    on_bad_row: str,
    skipped: SkippedRows | None,
) -> list[PromptRow]:
    said_by_caller = skipped is not None
    bad = BadRows(source, on_bad_row, SkippedRows() if skipped is None else skipped)
    checker, rows = _Checker(), []
    for where, record in islice(records, limit):
        try:
            rows.append(checker.row(where, record))
        except DataError as error:
            bad.add(where, _given_id(record), str(error))
    bad.settle(len(rows))
    if not rows:
        raise DataError(f"{source}: no rows: it is empty; a row with a prompt is needed")
    said = [
        f"{source}: {count} of {len(rows)} rows {warning} (the first: {first})"
        for warning, (count, first) in checker.warnings.items()
    ]
    if bad.count and not said_by_caller:
        said += [tally.said() for tally in bad.skipped.tallies]
    for text in said:
        warnings.warn(text, stacklevel=3)
    return rows


def _given_id(record: object) -> str | int | None:
    """The id that a bad row says it has."""
    if not isinstance(record, Mapping):
        return None
    values = (record.get("id"), record.get("prompt_id"))
    return next((v for v in values if isinstance(v, str | int)), None)


class _Checker:
    """What must hold between rows: one form for all, no id twice.

    A row that is refused leaves no trace. Of earlier rows only ids and hashes are kept. `warnings`
    says what is worth a warning: of how many rows, and the place of the first.
    """

    def __init__(self) -> None:
        self.warnings: dict[str, tuple[int, str]] = {}
        self._forms: dict[str, tuple[str, str]] = {}
        self._id_places: dict[str, str] = {}
        # How often a content's hash came, where that is more than once.
        self._repeats: Counter[str] = Counter()
        self._prompts: set[int] = set()

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
        forms = {
            "prompt": _form(prompt),
            "chosen": _form(record.get("chosen")),
            "rejected": _form(record.get("rejected")),
        }
        for field, form in forms.items():
            self._check_form(field, form)
        row_warnings, answers_are_usable = answer_warnings(record, prompt, chosen, rejected)
        if not answers_are_usable:
            chosen = rejected = None
        inputs = read_template_inputs(record)
        given = [[inputs.tools, inputs.kwargs]] if inputs else []
        row_id, id_field = self._identify(record, [prompt, chosen, rejected, *given], where)
        # The row is good; from here on it is one of those that later rows are compared with.
        self._id_places[row_id] = where
        for field, form in forms.items():
            if form:
                self._forms.setdefault(field, (form, where))
        key = hash((hashable(prompt), json.dumps(given) if given else ""))
        if key in self._prompts:
            row_warnings.append(
                "repeat an earlier prompt; they are kept and weigh more: drop them if that is not "
                "meant"
            )
        self._prompts.add(key)
        for warning in row_warnings:
            count, first = self.warnings.get(warning, (0, where))
            self.warnings[warning] = (count + 1, first)
        read = ("prompt", "chosen", "rejected", id_field)
        columns = {name: value for name, value in record.items() if name not in read}
        return PromptRow(row_id, prompt, chosen, rejected, columns, where, inputs)

    def _check_form(self, field: str, form: str) -> None:
        first, place = self._forms.get(field, (form, ""))
        if form and form != first:
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
            row_id = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
            if row_id in self._id_places:
                self._repeats[row_id] += 1
                row_id = f"{row_id}-{self._repeats[row_id] + 1}"
        first = self._id_places.get(row_id)
        if first is not None:
            raise DataError(
                f"{field or 'id'} {row_id!r} is also that of {first}: make ids unique, or leave "
                "the field out"
            )
        return row_id, field


def _form(value: object) -> str:
    """What messages call a value's form; nothing where there is no value."""
    if value is None:
        return ""
    return "text" if isinstance(value, str) else "messages"


def _check_text(row: Mapping[str, Any]) -> None:
    """Refuse what UTF-8 cannot hold, in any column: the first write would fail, hours later."""
    try:  # of nearly every row that is all
        _as_utf8(dict(row))
        return
    except (ValueError, RecursionError):
        pass
    for field, value in row.items():
        try:
            _as_utf8([field, value])
        except UnicodeEncodeError as error:
            code = f"U+{ord(error.object[error.start]):04X}"
            raise DataError(
                f"{field!a} holds the lone surrogate {code}, half of a character: replace it in "
                "the text"
            ) from None
        except (RecursionError, ValueError):  # ValueError: a list that holds itself
            raise DataError(
                f"{field!a} is nested too deeply: flatten it, or leave the column out"
            ) from None


def _as_utf8(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False, skipkeys=True, default=str)
    return text.encode("utf-8")
