"""Which rows are read from where: one data set, or several that are mixed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from neat_align.errors import ConfigError, did_you_mean

# What users of other trainers write, and what it is called here.
_ELSEWHERE = {
    "weight": "it is called fraction here, as in TRL",
    "weights": "each data set has its own fraction",
    "probability": "it is called fraction here, as in TRL",
    "ratio": "it is called fraction here, as in TRL",
    "subset": "it is called name here, as in TRL",
    "config": "it is called name here, as in TRL",
    "dataset_name": "it is called path here, as in TRL",
    "type": "the form of the rows is told from their columns: leave it out",
    "chat_template": "the tokenizer's is used: leave it out",
    "ds_type": "the type of a file is told from its name: leave it out",
    "num_samples": "write split: train[:1000]",
    "shards": "write split: train[:10%]",
    "field_messages": "write columns: {messages: …}",
    "field": "write columns: {prompt: …}",
}
_SPLIT = re.compile(r"(?P<name>[\w.\-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class DatasetConfig:
    """One data set, with TRL's names.

    Attributes:
        path: a file, several (`data/*.jsonl`), a folder, or a name on the hub; or `json`, `csv` or
            `parquet` beside `data_files`.
        name: the data set's configuration on the hub.
        data_dir: a folder inside of a data set on the hub.
        data_files: files of a folder, of a data set on the hub, or of `path: json`; patterns, too.
        split: such as `test`, or a part: `train[:1000]`, `train[80%:]`. None: `train`, or the only
            one there is.
        columns: names that are read here, each with the data's own (`{prompt: question}`); or a
            list of the columns that are kept.
        fraction: this data set's share of a mixture; the shares are made to sum to 1. All data sets
            of a mixture have one, or none has.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | Sequence[str] | None = None
    split: str | None = None
    columns: Mapping[str, str] | Sequence[str] | None = None
    fraction: float | None = None


def as_dataset_config(value: Any, at: str) -> DatasetConfig:
    """One entry of `datasets`: a path, a mapping, the same as JSON text, or a DatasetConfig.

    `at` is what messages call it. Raises ConfigError.
    """
    if isinstance(value, DatasetConfig):
        # argparse makes one of each word on a command line, which may be JSON.
        only_path = all(getattr(value, f.name) is None for f in fields(value) if f.name != "path")
        if not (isinstance(value.path, str) and only_path):
            return _checked(value, at)
        value = value.path
    if isinstance(value, str):
        value = _parsed(value, at) if value.lstrip().startswith("{") else {"path": value}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{at} is {value!r}; it must be a data set's path, or a mapping with path, split, "
            "columns, fraction: correct it"
        )
    known = [f.name for f in fields(DatasetConfig)]
    for key in value:
        if key not in known:
            hint = _ELSEWHERE.get(str(key)) or did_you_mean(key, known)
            hint = hint or f"it may have {', '.join(known)}"
            raise ConfigError(f"{at} has {key!r}, which is not read; {hint}")
    if not value.get("path"):
        raise ConfigError(f"{at} has no path: name a file, a folder or a data set on the hub")
    return _checked(DatasetConfig(**value), at)


def _parsed(text: str, at: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{at} is {text!r}, which is no JSON ({getattr(error, 'msg', error)}): write it as "
            'in {"path": "pairs.jsonl", "fraction": 0.7}'
        ) from None


def _checked(source: DatasetConfig, at: str) -> DatasetConfig:
    for name in ("path", "name", "data_dir", "split"):
        value = getattr(source, name)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{at}.{name} is {value!r}; it must be text: correct it")
    files = source.data_files
    if files is not None and not (isinstance(files, str) or _are_texts(files)):
        raise ConfigError(
            f"{at}.data_files is {files!r}; it must be a file's name or pattern, or a list of "
            "them: correct it (with split names, give each split an entry of its own)"
        )
    fraction: Any = source.fraction
    is_share = isinstance(fraction, Real) and not isinstance(fraction, bool)
    if fraction is not None and not (is_share and fraction > 0 and math.isfinite(fraction)):
        raise ConfigError(
            f"{at}.fraction is {fraction!r}; it must be a number above 0, the data set's share of "
            "the mixture: correct it, or take the data set out"
        )
    if source.split is not None:
        check_split(source.split, f"{at}.split")
    check_columns(source.columns, f"{at}.columns")
    return source


def check_mixture(sources: Sequence[DatasetConfig]) -> None:
    """Raise ConfigError for data sets of which some have a fraction and some have not."""
    without = [s.path for s in sources if s.fraction is None]
    if without and len(without) < len(sources):
        raise ConfigError(
            f"datasets: {without[0]} has no fraction and others have: give one to each of them, or "
            "to none, which takes all rows of all"
        )


def check_columns(columns: Any, at: str) -> None:
    """Raise ConfigError for what is neither a mapping of texts to texts nor a list of texts."""
    if columns is None:
        return
    is_map = isinstance(columns, Mapping) and _are_texts([*columns, *columns.values()])
    if not columns or not (is_map or (not isinstance(columns, Mapping) and _are_texts(columns))):
        raise ConfigError(
            f"{at} is {columns!r}; it must map names that are read here to the data's own, such as "
            "{prompt: question, chosen: good}, or list the columns that are kept: correct it"
        )
    if isinstance(columns, Mapping):
        twice = [c for c in set(columns.values()) if list(columns.values()).count(c) > 1]
        if twice:
            names = ", ".join(name for name, column in columns.items() if column == twice[0])
            raise ConfigError(
                f"{at} gives the column {twice[0]!r} to {names}: a column has one meaning; "
                "correct it"
            )


def _are_texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, str) and v for v in values)


# ---- splits --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A split's name, and the part of it that is read: both ends as they are written."""

    name: str
    start: str | None = None
    stop: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all of the split is read."""
        return self.start is None and self.stop is None

    @property
    def needs_total(self) -> bool:
        """Whether the part depends on how many rows there are."""
        ends = [end for end in (self.start, self.stop) if end is not None]
        return any(end.startswith("-") or end.endswith("%") for end in ends)

    def part(self, total: int | None) -> slice:
        """The rows that are read; `total` is needed where `needs_total`.

        Percents are rounded to the nearest row, as `datasets` does.
        """
        return slice(self._row(self.start, total), self._row(self.stop, total))

    @staticmethod
    def _row(end: str | None, total: int | None) -> int | None:
        if end is None:
            return None
        number = int(end.removesuffix("%"))
        if end.endswith("%"):
            assert total is not None
            number = round(abs(number) * total / 100) * (1 if number >= 0 else -1)
        if end.startswith("-"):
            assert total is not None
            return max(0, total + number)
        return number


def read_split(text: str) -> Split | None:
    """`train`, `train[:1000]`, `train[10%:20%]`; None for what only `datasets` understands."""
    found = _SPLIT.fullmatch(text)
    return Split(found["name"], found["start"], found["stop"]) if found else None


def check_split(text: str, at: str) -> None:
    """Raise ConfigError for a split in which something is written that nobody reads."""
    parts = text.split("+")
    if not all(read_split(part.strip()) for part in parts):
        raise ConfigError(
            f"{at} is {text!r}; it must be a split's name, or a part of one, such as train[:1000] "
            "or train[80%:]: correct it"
        )
