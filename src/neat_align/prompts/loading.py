"""Prompts and human preference pairs: read, told apart, validated before anything is sampled.

Forms understood (TRL's, HH-RLHF's transcripts, and those of `conversation_forms`): `prompt` as text
or messages, with or without `chosen` and `rejected`; `chosen` and `rejected` alone, which share the
prompt as their beginning; whole Human/Assistant transcripts. Every message names where the row is:
`file.jsonl:17` is a line (from 1), `row 17` an index (from 0).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from neat_align.errors import DataError
from neat_align.prompts.conversation_forms import as_pair_row
from neat_align.prompts.data_sources import Drawn, mixed_records
from neat_align.prompts.dataset_config import DatasetConfig
from neat_align.prompts.file_readers import numbered
from neat_align.prompts.row_forms import answer_warnings, read_pair, short_repr
from neat_align.prompts.rows import PromptRow, hashable
from neat_align.prompts.skipped_rows import BadRows, SkippedRows
from neat_align.prompts.template_inputs import read_template_inputs


def load_rows(
    source: str | Path | DatasetConfig | Sequence[DatasetConfig],
    *,
    split: str | None = None,
    limit: int | None = None,
    on_bad_row: str = "error",
    skipped: SkippedRows | None = None,
    mixed_forms: bool = False,
) -> list[PromptRow]:
    """Rows of a file, of a folder written by `save_to_disk`, of a data set on the hub, or of a
    mixture.

    Files are .jsonl, .json, .parquet or .csv, the text ones also packed (.gz, .zst, …), and several
    where the name is a pattern (`data/*.jsonl`). Without `split`, a data set with several gives
    `train`. A DatasetConfig says more of a data set: its columns, its configuration on the hub; of
    several, see `mixed_records`. With `limit`, only the first this many rows are read. Raises
    DataError that names the place of every row that is refused (the first five), and warns of what
    is odd but usable.

    With `on_bad_row="skip"`, rows that would be refused are left out, with a warning that counts
    them, and listed in `skipped` where one is given. A file that cannot be told apart into rows
    (broken CSV, JSON in one list, Parquet) stays an error, and so does data without a good row.
    With `mixed_forms`, some prompts may be text and others messages.
    """
    _check_limit(limit)
    sources = _as_sources(source, split)
    checker = _Checker(is_mixture=len(sources) > 1, mixed_forms=mixed_forms)
    return _collect(mixed_records(sources), title(sources), limit, on_bad_row, skipped, checker)


def stream_rows(
    sources: Sequence[DatasetConfig],
    size: int,
    *,
    limit: int | None = None,
    on_bad_row: str = "error",
    skipped: SkippedRows | None = None,
    mixed_forms: bool = False,
) -> Iterator[list[PromptRow]]:
    """The same rows, `size` records at a time, without the others in memory.

    What holds between rows is looked at within one such part only: that no id comes twice, and that
    prompts repeat. One form of prompts holds for all. Raises DataError at the first part with a row
    that is refused, and where there is no good row.
    """
    _check_limit(limit)
    bad = BadRows(title(sources), on_bad_row, SkippedRows() if skipped is None else skipped)
    checker = _Checker(is_mixture=len(sources) > 1, mixed_forms=mixed_forms)
    records, kept = islice(mixed_records(sources, streaming=True), limit), 0
    while part := list(islice(records, size)):
        checker = checker.without_rows()
        rows = _good_rows(part, checker, bad)
        if not bad.skips:
            bad.settle(kept + len(rows))
        kept += len(rows)
        if rows:
            yield rows
    bad.settle(kept)
    _warn(checker.said(title(sources), kept))
    if not kept:
        raise DataError(_empty(title(sources)))


def title(sources: Sequence[DatasetConfig]) -> str:
    """What messages call data sets that are read together."""
    return " + ".join(source.path for source in sources)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be 1 or more, or unset for every row")


def _as_sources(
    source: str | Path | DatasetConfig | Sequence[DatasetConfig], split: str | None
) -> list[DatasetConfig]:
    if isinstance(source, str | Path):
        return [DatasetConfig(str(source), split=split)]
    if split is not None:
        raise DataError(
            f"split is {split!r} beside a DatasetConfig, which has its own: set it there"
        )
    return [source] if isinstance(source, DatasetConfig) else list(source)


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
    records = ((0, record) for record in numbered(dataset, f"dataset '{name}'"))
    return _collect(records, name, None, on_bad_row, skipped, _Checker())


def _collect(
    records: Iterable[Drawn],
    source: str,
    limit: int | None,
    on_bad_row: str,
    skipped: SkippedRows | None,
    checker: _Checker,
) -> list[PromptRow]:
    said_by_caller = skipped is not None
    bad = BadRows(source, on_bad_row, SkippedRows() if skipped is None else skipped)
    rows = _good_rows(islice(records, limit), checker, bad)
    bad.settle(len(rows))
    if not rows:
        raise DataError(_empty(source))
    said = checker.said(source, len(rows))
    if bad.count and not said_by_caller:
        said += [tally.said() for tally in bad.skipped.tallies]
    _warn(said)
    return rows


def _good_rows(records: Iterable[Drawn], checker: _Checker, bad: BadRows) -> list[PromptRow]:
    rows = []
    for source, (where, record) in records:
        try:
            rows.append(checker.row(where, record, source))
        except DataError as error:
            bad.add(where, _given_id(record), str(error))
    return rows


def _empty(source: str) -> str:
    return f"{source}: no rows: it is empty; a row with a prompt is needed"


def _warn(said: Iterable[str]) -> None:
    for text in said:
        warnings.warn(text, stacklevel=4)


def _given_id(record: object) -> str | int | None:
    """The id that a bad row says it has."""
    if not isinstance(record, Mapping):
        return None
    values = (record.get("id"), record.get("prompt_id"))
    return next((v for v in values if isinstance(v, str | int)), None)


class _Checker:
    """What must hold between rows: one form for all, no id twice.

    A row that is refused leaves no trace. Of earlier rows only ids and hashes are kept. `warnings`
    says what is worth a warning: of how many rows, and the place of the first. Of a mixture, an id
    gets the number of its data set in front (`2:17`), and answers have one form in each; with
    `mixed_forms`, prompts may be text and messages.
    """

    def __init__(self, *, is_mixture: bool = False, mixed_forms: bool = False) -> None:
        self.is_mixture = is_mixture
        self.mixed_forms = mixed_forms
        self.warnings: dict[str, tuple[int, str]] = {}
        self._forms: dict[tuple[str, int], tuple[str, str]] = {}
        self._id_places: dict[str, str] = {}
        # How often a content's hash came, where that is more than once.
        self._repeats: Counter[str] = Counter()
        self._prompts: set[int] = set()

    def without_rows(self) -> _Checker:
        """One that knows the rows' form and what was odd so far, and none of the rows."""
        new = _Checker(is_mixture=self.is_mixture, mixed_forms=self.mixed_forms)
        new.warnings, new._forms = self.warnings, self._forms
        return new

    def said(self, source: str, rows: int) -> list[str]:
        """What is worth a warning, in sentences."""
        return [
            f"{source}: {count} of {rows} rows {warning} (the first: {first})"
            for warning, (count, first) in self.warnings.items()
        ]

    def row(self, where: str, record: object, source: int = 0) -> PromptRow:
        if isinstance(record, DataError):
            raise record
        if not isinstance(record, Mapping) or not all(isinstance(name, str) for name in record):
            raise DataError(
                f"the row is {short_repr(record)}, not an object with named fields: write it as "
                f'{{"prompt": …}}'
            )
        _check_text(record)
        record, note = as_pair_row(record)
        prompt, chosen, rejected = read_pair(record)
        forms = {
            ("chosen", source): _form(record.get("chosen")),
            ("rejected", source): _form(record.get("rejected")),
        }
        if not self.mixed_forms:
            forms = {("prompt", 0): _form(prompt), **forms}
        for key, form in forms.items():
            self._check_form(key, form)
        row_warnings, answers_are_usable = answer_warnings(record, prompt, chosen, rejected)
        if not answers_are_usable:
            chosen = rejected = None
        inputs = read_template_inputs(record)
        given = [[inputs.tools, inputs.kwargs]] if inputs else []
        content = [prompt, chosen, rejected, *given]
        row_id, id_field = self._identify(record, content, where, source)
        # The row is good; from here on it is one of those that later rows are compared with.
        self._id_places[row_id] = where
        for key, form in forms.items():
            if form:
                self._forms.setdefault(key, (form, where))
        if note:
            row_warnings.insert(0, note)
        prompt_hash = hash((hashable(prompt), json.dumps(given) if given else ""))
        if prompt_hash in self._prompts:
            row_warnings.append(
                "repeat an earlier prompt; they are kept and weigh more: drop them if that is not "
                "meant"
            )
        self._prompts.add(prompt_hash)
        for warning in row_warnings:
            count, first = self.warnings.get(warning, (0, where))
            self.warnings[warning] = (count + 1, first)
        read = ("prompt", "chosen", "rejected", id_field)
        columns = {name: value for name, value in record.items() if name not in read}
        return PromptRow(row_id, prompt, chosen, rejected, columns, where, inputs)

    def _check_form(self, key: tuple[str, int], form: str) -> None:
        first, place = self._forms.get(key, (form, ""))
        if form and form != first:
            more = " (as_conversations: true turns text into messages)" if self.is_mixture else ""
            raise DataError(
                f"{key[0]} is {form}, but {first} at {place}: use one form in all rows{more}"
            )

    def _identify(
        self, row: Mapping[str, Any], content: list[Any], where: str, source: int
    ) -> tuple[str, str]:
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
            row_id = f"{source + 1}:{value}" if self.is_mixture else str(value)
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
