"""Checkpoints that are complete or absent: a marker, written last, names every file with its size and hash."""

from __future__ import annotations

import re
from pathlib import Path

from neat_align.errors import ConfigError
from neat_align.storage import read_json, sha256_of, write_json

MARKER = "COMPLETE.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


def mark_complete(checkpoint: Path) -> None:
    """Write the marker of a checkpoint whose files are all written."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MARKER)
    facts = {p.relative_to(checkpoint).as_posix(): {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in files}
    write_json(checkpoint / MARKER, {"files": facts})


def is_complete(checkpoint: Path) -> bool:
    """Whether the marker is there and every file it names is as it says."""
    marker = checkpoint / MARKER
    if not marker.is_file():
        return False
    try:
        files = read_json(marker)["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError):  # a damaged marker is no marker
        return False
    for name, facts in files:
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != facts["size"] or sha256_of(path) != facts["sha256"]:
            return False
    return True


def newest_complete(output_dir: Path) -> Path:
    """The newest complete checkpoint of a run. Raises ConfigError when there is none."""
    found = [(int(m.group(1)), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.search(p.name))]
    for _, path in sorted(found, reverse=True):
        if is_complete(path):
            return path
    raise ConfigError(
        f"{output_dir} has no complete checkpoint to resume from ({len(found)} incomplete): start again in a new output_dir, "
        "or without resuming"
    )
