"""What a run leaves that ended before its first finished work: nothing that is worth going on with.

Such files say what the run would have done. A folder that holds nothing else is free for another
run, and a run that fails so early takes its own away. Everything is told by name and by content: a
file that only has the name of one of ours stays, and keeps the folder from being free.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from neat_align.errors import (
    ConfigError,
    RewardUnavailableError,
    SamplerUnavailableError,
    SaveError,
)
from neat_align.prompts.skipped_rows import SKIPPED_FILE
from neat_align.runs.launch import LAUNCH_FILE
from neat_align.runs.lock import HELD_FILE, LOCK_FILE, NO_ROOM, one_writer

# Files that are JSON objects, with keys that ours have.
_KEYS: Mapping[str, Collection[str]] = {
    "run-key.json": ("options", "processes"),
    "run.json": ("config", "metrics_bytes"),
    LAUNCH_FILE: ("run_id", "launcher"),
    LOCK_FILE: ("pid", "host"),
    "plan.json": (),
}
# Files that are empty until there is something of worth in them.
_EMPTY = (LOCK_FILE, "metrics.jsonl", "groups.parquet.part")
# Where a round is made (`rollout_store`).
_FOLDERS = re.compile(r"rounds(/\d{5}(/work(/\d{6})?)?)?")
# What a killed process leaves of a file that is written whole or not at all (`write_atomic`).
_HALF_WRITTEN = re.compile(r"\.(run-key\.json|run\.json|launch\.json|plan\.json)-\w{8}")
# What says that the same command goes on with what is kept.
_GOES_ON = (RewardUnavailableError, SamplerUnavailableError, SaveError)


def is_free(folder: Path) -> bool:
    """Whether the folder holds nothing, or only what a run left before its first finished work."""
    return _leftovers(folder, folder) is not None


def remove_leftovers(folder: Path, keep: Collection[str] = ()) -> None:
    """Delete what such a run left, but for files of these names; nothing where there is more.

    The caller holds the run directory's lock. That file goes, too: filelock sees that a lock which
    it got is one of a file that is gone.
    """
    for path in reversed(_leftovers(folder, folder) or []):  # what is in a folder comes after it
        if path.name in (*keep, HELD_FILE):  # whose holder, the caller, deletes it
            continue
        with contextlib.suppress(OSError):  # open on Windows, or not empty
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)


def _leftovers(folder: Path, top: Path) -> list[Path] | None:
    """All below a folder; None where anything of it is finished work, or not a run's."""
    found: list[Path] = []
    if not folder.is_dir():
        return found
    for path in sorted(folder.iterdir()):
        found.append(path)
        if path.is_dir() and not path.is_symlink():
            is_ours = _FOLDERS.fullmatch(path.relative_to(top).as_posix()) is not None
            inside = _leftovers(path, top) if is_ours else None
            if inside is None:
                return None
            found += inside
        elif not _is_leftover(path):
            return None
    return found


def _is_leftover(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    if path.name in (HELD_FILE, SKIPPED_FILE) or _HALF_WRITTEN.fullmatch(path.name):
        return True
    if path.name in _EMPTY and path.stat().st_size == 0:
        return True
    if path.name not in _KEYS:
        return False
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and all(key in value for key in _KEYS[path.name])


@contextlib.contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """Take away what the block left in a run directory where it fails before its first work.

    A folder that was not there before goes, too. What was stopped by a server that is down, a full
    disk or a signal stays: it is gone on with by the same command.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except _GOES_ON:
        raise
    except Exception as error:
        if not (isinstance(error, OSError) and error.errno in NO_ROOM):
            _take_away(folder)
            for path in made:
                with contextlib.suppress(OSError):  # somebody else's is in it
                    path.rmdir()
        raise


def _take_away(folder: Path) -> None:
    with contextlib.suppress(ConfigError, OSError):  # another process writes there
        if folder.is_dir() and any(folder.iterdir()) and is_free(folder):
            with one_writer(folder):
                remove_leftovers(folder)
