"""Names that a user wrote: a path on this machine, or something on the hub?"""

from __future__ import annotations

import os
from pathlib import Path

# How the names of files of models and data end; no hub name does.
_ENDINGS = frozenset(
    {
        *(".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip"),
        *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".yaml", ".yml"),
    }
)


def is_surely_path(name: str) -> bool:
    """Whether a name is written as only paths are: `./x`, `~/x`, `/x`, `a/b/c`, `x.jsonl`."""
    return (
        name.startswith((".", "~", "/"))
        or Path(name).is_absolute()
        or name.rstrip("/").count("/") > 1
        or name.endswith("/")
        or (os.sep != "/" and os.sep in name)
        or Path(name).suffix.lower() in _ENDINGS
    )


def is_likely_path(name: str) -> bool:
    """Whether a name is written so, or as `owner/name` where there is a folder `owner` here."""
    return is_surely_path(name) or ("/" in name and Path(name).parent.is_dir())


def no_such_path(name: str) -> str:
    """What to say of a path at which there is nothing."""
    path = Path(name).expanduser()
    there = next(p for p in (path, *path.absolute().parents) if p.is_dir() or p == Path(p.anchor))
    near = "" if there == path.absolute().parent else f" (there is {there})"
    return (
        f"{name}: there is no such file or folder{near}: check the path (the current folder is "
        f"{Path.cwd()})"
    )
