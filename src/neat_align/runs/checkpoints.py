"""Checkpoints that are complete or absent.

A marker, `COMPLETE.json`, names every file with its size and its checksums, and is written after
all of them are on the disk. What has none was interrupted while it was written; what has one that
no longer agrees with its files was damaged later. Neither is ever resumed from: both are set aside
as `checkpoint-N.incomplete`.

The checksums are CRC-32, a block of 256 MiB each: they find every flipped bit and every burst of
damage up to 32 bits, and miss other damage once in 4 billion. They are no guard against somebody
who changes a file on purpose, and neither was SHA-256 in a file beside it, which took two to three
times as long. (safetensors files carry no checksum of their own.)
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neat_align.errors import ConfigError, SaveError
from neat_align.files.atomic import (
    checksums_of,
    free_name,
    read_json,
    sha256_of,
    sync,
    sync_tree,
    write_json,
)

logger = logging.getLogger(__name__)
MARKER = "COMPLETE.json"
SET_ASIDE = ".incomplete"
# Fewer than two, and a checkpoint that goes bad on the disk would take the run with it.
KEPT_AT_LEAST = 2
_NAME = re.compile(r"checkpoint-(\d+)$")


def mark_complete(
    checkpoint: Path, *, required: Sequence[str] = (), resumable: bool = True
) -> None:
    """Write the marker of a checkpoint whose files are all written, after syncing them to the disk.

    `required` are files without which training would go on from a wrong state, by name or pattern;
    `resumable: False` marks a checkpoint that holds weights alone. Raises SaveError when a required
    file is missing.
    """
    missing = [name for name in required if not any(checkpoint.glob(name))]
    if missing:
        raise SaveError(
            f"{checkpoint} was saved without {', '.join(missing)}: training could not go on from "
            "it exactly"
        )
    sync_tree(checkpoint)
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MARKER)
    facts = {
        p.relative_to(checkpoint).as_posix(): {"size": p.stat().st_size, "crc32": checksums_of(p)}
        for p in files
    }
    write_json(checkpoint / MARKER, {"files": facts, "resumable": resumable})


def unmark(checkpoint: Path) -> None:
    """Take the marker away before the checkpoint's files are written again."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    sync(checkpoint)


def is_complete(checkpoint: Path) -> bool:
    """Whether the marker is there and every file it names is as it says."""
    return damage_of(checkpoint) is None


def damage_of(checkpoint: Path) -> str | None:
    """Why a checkpoint is not complete, in words; None when it is."""
    marker = checkpoint / MARKER
    if not marker.is_file():
        return f"it has no {MARKER}: it was interrupted while it was written"
    try:
        said = read_json(marker)
        if not set(said) <= {"files", "resumable"}:
            return f"its {MARKER} cannot be read"
        files = said["files"].items()
        for name, facts in files:  # all sizes before the first byte is read
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["size"]:
                return (
                    f"{name} has {path.stat().st_size} bytes and was written with {facts['size']}"
                )
        for name, facts in files:
            if not _is_as_written(checkpoint / name, facts):
                return f"{name} is not the file that was written: its bytes changed on the disk"
    except (ValueError, KeyError, TypeError, AttributeError):  # a damaged marker is no marker
        return f"its {MARKER} cannot be read"
    return None


def _is_as_written(path: Path, facts: Mapping[str, Any]) -> bool:
    if "sha256" in facts:  # written by an earlier version
        return bool(sha256_of(path) == facts["sha256"])
    return bool(checksums_of(path) == facts["crc32"])


def numbered_checkpoints(output_dir: Path) -> list[Path]:
    """A run's checkpoints, newest (highest step) first, whether complete or not."""
    folders = [p for p in output_dir.glob("checkpoint-*") if _NAME.search(p.name) and p.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def checkpoint_to_resume(output_dir: Path) -> Path | None:
    """The newest complete checkpoint, after what is newer and incomplete was set aside with a
    warning.

    None when no checkpoint was ever finished: the run starts from its first step, with the rounds
    that are on the disk.
    Raises ConfigError when finished checkpoints are there and none is as it was written, or can be
    resumed from.
    """
    for path in numbered_checkpoints(output_dir):
        why = damage_of(path)
        if why is None:
            if not read_json(path / MARKER).get("resumable", True):
                raise ConfigError(
                    f"{path} holds weights alone (save_only_model: true): training cannot go on "
                    "from it. Start again in a new output_dir, with it as the model"
                )
            return path
        _set_aside(path, why)
    damaged = sorted(
        p.name for p in output_dir.glob(f"checkpoint-*{SET_ASIDE}*") if (p / MARKER).is_file()
    )
    if damaged:
        raise ConfigError(
            f"{output_dir} has no complete checkpoint to resume from: {', '.join(damaged)} were "
            "finished and then damaged. Delete these folders to start again from the first round "
            "(finished rounds are kept), or restore them from a copy"
        )
    return None


def _set_aside(path: Path, why: str) -> None:
    aside = free_name(path, SET_ASIDE)
    path.replace(aside)
    sync(path.parent)
    logger.warning(
        "%s is incomplete (%s): it is now %s, and an older one is looked for", path, why, aside.name
    )


def rotate(output_dir: Path, limit: int | None, keep: str | None = None) -> None:
    """Delete the oldest marked checkpoints over `limit` (None: keep all), but never the newest two,
    nor `keep`.

    A checkpoint is renamed before it is deleted, so that half of one is never found under its name.
    """
    for left_over in output_dir.glob(".checkpoint-*.deleted"):
        shutil.rmtree(left_over, ignore_errors=True)
    if limit is None or limit <= 0:
        return
    marked = [p for p in numbered_checkpoints(output_dir) if (p / MARKER).is_file()]
    kept = None if keep is None else Path(keep).name
    for path in marked[max(limit, KEPT_AT_LEAST) :]:
        if path.name != kept:
            gone = path.with_name(f".{path.name}.deleted")
            path.replace(gone)
            sync(output_dir)
            shutil.rmtree(gone, ignore_errors=True)


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step of a checkpoint, by its name; 0 without one."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
