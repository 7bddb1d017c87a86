"""Records of data sets: of files, of folders, of the hub; one after the other, or mixed.

Nothing is held in memory but what a reader needs: a JSON list is read whole, and so is a data set
of the hub that is not streamed, from its cache on the disk.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from neat_align.errors import DataError
from neat_align.files.paths import no_such_path
from neat_align.prompts.columns import ColumnNames
from neat_align.prompts.compressed import COMPRESSED, inner_suffix
from neat_align.prompts.dataset_config import DatasetConfig, Split, read_split
from neat_align.prompts.file_readers import READERS, Record, numbered

# The name of a data set on the hub: "name" or "owner/name".
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# `path: json` beside data_files, as TRL and axolotl have it.
_BUILDERS = {"json": ".jsonl", "csv": ".csv", "parquet": ".parquet"}
# A record, and which of the data sets it is from.
Drawn: TypeAlias = tuple[int, Record]


def mixed_records(sources: Sequence[DatasetConfig], *, streaming: bool = False) -> Iterator[Drawn]:
    """The records of all data sets.

    Without fractions, one data set after the other. With fractions, in turns (by Sainte-Laguë's
    rule), so that every stretch of the mixture has each data set's share to about one record. The
    mixture ends where the next record would be that of a data set that has run out: no record comes
    twice, and what is left of the others is not used. Nothing is drawn at random: the same data
    sets give the same mixture. Raises DataError.
    """
    readers = [records_of(source, streaming=streaming) for source in sources]
    fractions = [s.fraction for s in sources if s.fraction is not None]
    if len(sources) == 1 or not fractions:
        for index, reader in enumerate(readers):
            for record in reader:
                yield index, record
        return
    taken = [0] * len(sources)
    while True:
        due = min(range(len(sources)), key=lambda i: ((2 * taken[i] + 1) / fractions[i], i))
        drawn = next(readers[due], None)
        if drawn is None:
            return
        taken[due] += 1
        yield due, drawn


def records_of(source: DatasetConfig, *, streaming: bool = False) -> Iterator[Record]:
    """The records of one data set, its columns under the names that are read here."""
    names = ColumnNames(source.columns)
    files = _files(source)
    records = _of_dataset(source, streaming) if files is None else _of_files(source, files, names)
    yield from names.applied(records)
    names.settle(source.path)


# ---- files ---------------------------------------------------------------------------------------


def _files(source: DatasetConfig) -> list[Path] | None:
    """The files that are named; None for a folder that `datasets` loads, and for the hub."""
    path = Path(source.path).expanduser()
    patterns = source.data_files
    if patterns is not None:
        listed = [patterns] if isinstance(patterns, str) else list(patterns)
        if path.is_dir():
            return [f for p in listed for f in _matching(str(path / p), source.path)]
        is_remote = any("://" in p for p in listed)
        if source.path in _BUILDERS and not is_remote:
            return [f for p in listed for f in _matching(str(Path(p).expanduser()), source.path)]
        return None
    if path.is_file():
        return [path]
    if not path.exists() and any(c in source.path for c in "*?["):
        return _matching(str(path), source.path)
    return None


def _matching(pattern: str, source: str) -> list[Path]:
    """The files that a pattern means, in order of their names; `**` means any folder."""
    path = Path(pattern)
    if path.is_file():
        return [path]
    plain = list(itertools.takewhile(lambda p: not set("*?[") & set(p), path.parts))
    root = Path(*plain) if plain else Path()
    rest = path.parts[len(plain) :]
    found = sorted(p for p in root.glob("/".join(rest)) if p.is_file()) if rest else []
    if not found:
        raise DataError(
            f"{source}: no file is at {pattern}: check the path (the current folder is "
            f"{Path.cwd()})"
        )
    return found


def _of_files(source: DatasetConfig, files: list[Path], names: ColumnNames) -> Iterator[Record]:
    if source.name is not None or source.data_dir is not None:
        given = "name" if source.name is not None else "data_dir"
        raise DataError(
            f"{given} is {getattr(source, given)!r}, but {source.path} is files, which have none: "
            f"remove {given}"
        )
    default = _BUILDERS.get(source.path, "")

    def records() -> Iterator[Record]:
        for file in files:
            suffix = inner_suffix(file)
            reader = READERS.get(suffix) or READERS.get(default)
            if reader is None:
                raise DataError(
                    f"{file}: files of type {suffix or '(none)'} are not read; use one of "
                    f"{', '.join(READERS)}, as it is or packed ({', '.join(COMPRESSED)})"
                )
            yield from reader(file, names)

    if source.split is None:
        return records()
    split = read_split(source.split)
    if split is None or split.name != "train":
        raise DataError(
            f"split is {source.split!r}, but {source.path} is a file and has no splits: remove "
            "split, or take a part of the file: train[:1000]"
        )
    total = sum(1 for _ in records()) if split.needs_total else None
    return _part(records(), split, total)


def _part(records: Iterator[Record], split: Split, total: int | None) -> Iterator[Record]:
    part = split.part(total)
    return itertools.islice(records, part.start, part.stop)


# ---- folders and the hub -------------------------------------------------------------------------


def _of_dataset(source: DatasetConfig, streaming: bool) -> Iterator[Record]:
    path = Path(source.path).expanduser()
    may_be_on_hub = (
        inner_suffix(path) not in READERS and _HUB_NAME.fullmatch(source.path) is not None
    )
    if not path.exists() and not may_be_on_hub:
        raise DataError(no_such_path(source.path))
    name = f"dataset '{source.path}'"
    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    if not saved and not streaming:
        return numbered(_loaded(source, split=source.split), name)
    split = None if source.split is None else read_split(source.split)
    if source.split is not None and split is None:
        raise DataError(
            f"split is {source.split!r}, and of a data set that is {'saved' if saved else 'read'} "
            "as it comes, one split or a part of one is read: correct it"
        )
    wanted = None if split is None else split.name
    if saved:
        dataset = _saved(source, path, wanted)
    else:
        dataset = _one_split(source, _loaded(source, streaming=True), wanted)
    if split is None or split.is_whole:
        return numbered(dataset, name)
    return _part(numbered(dataset, name), split, _total(source, dataset, split))


def _loaded(source: DatasetConfig, *, split: str | None = None, streaming: bool = False) -> Any:
    """What `datasets` loads. Raises DataError."""
    from datasets.exceptions import DatasetsError
    from datasets.load import load_dataset

    path = Path(source.path).expanduser()
    options: dict[str, Any] = {
        "name": source.name,
        "data_dir": source.data_dir,
        "data_files": source.data_files,
        "streaming": streaming,
    }
    given = {name: value for name, value in options.items() if value}
    try:
        loaded = load_dataset(str(path) if path.is_dir() else source.path, split=split, **given)
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        raise DataError(
            f"{source.path}: there is no such file, and it cannot be loaded as a data set: {error}"
        ) from error
    return loaded if streaming or split is not None else _one_split(source, loaded, None)


def _saved(source: DatasetConfig, path: Path, split: str | None) -> Any:
    """A folder written by `save_to_disk`. Raises DataError."""
    from datasets.exceptions import DatasetsError
    from datasets.load import load_from_disk

    try:
        loaded: Any = load_from_disk(path)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(f"{source.path}: cannot be loaded as a data set: {error}") from error
    if split is not None and not isinstance(loaded, dict):
        raise DataError(
            f"split is {split!r}, but {source.path} holds one data set without splits: remove split"
        )
    return _one_split(source, loaded, split)


def _one_split(source: DatasetConfig, loaded: Any, split: str | None) -> Any:
    """One split of what was loaded: the one of that name, else `train` or the only one."""
    if not isinstance(loaded, dict):
        return loaded
    name = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if name not in loaded:
        raise DataError(
            f"{source.path}: there is no split {name!r}; set split to one of "
            f"{', '.join(map(str, loaded))}"
        )
    return loaded[name]


def _total(source: DatasetConfig, dataset: Any, split: Split) -> int | None:
    """How many rows a split has, where that is needed. Raises DataError."""
    from datasets import Dataset

    if not split.needs_total:
        return None
    if isinstance(dataset, Dataset):
        return len(dataset)
    told = (dataset.info.splits or {}).get(split.name)
    if told is None or not told.num_examples:
        raise DataError(
            f"split is {source.split!r}, and how many rows {source.path} has is not known while "
            "it is streamed: name rows, as in train[:1000], or set dataset_streaming: false"
        )
    return int(told.num_examples)
