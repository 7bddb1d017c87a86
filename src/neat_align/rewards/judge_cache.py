"""Judgements on the disk, so that none is paid for twice: one SQLite file for all runs.

A judgement is there whole or not at all, several processes of one machine may use the file at once
(SQLite's write-ahead log), and a look-up is one read of an index, whether there are ten or a
million. Keys are digests; values hold what the judge answered, neither prompt nor completion.
A failure is never kept.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neat_align.errors import RewardError

logger = logging.getLogger(__name__)
# Milliseconds that a process waits for another one's write.
_BUSY = 30_000
_TABLE = "CREATE TABLE IF NOT EXISTS judgements (key BLOB PRIMARY KEY, answer TEXT)"


def default_file() -> Path:
    """neat-align's own cache of judgements, in the user's cache folder."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("neat-align")) / "judgements.sqlite"


class JudgeCache:
    """Judgements by key, while it is open."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self._path, self._writes = connection, path, True

    def get(self, key: bytes) -> dict[str, Any] | None:
        """The judgement under a key; None where there is none."""
        query = "SELECT answer FROM judgements WHERE key = ?"
        try:
            found = self._connection.execute(query, (key,)).fetchone()
        except sqlite3.Error as error:
            self._warn("read", error)
            return None
        if found is None:
            return None
        answer: dict[str, Any] = json.loads(found[0])
        return answer

    def put(self, key: bytes, answer: dict[str, Any]) -> None:
        """Keep a judgement. A cache that cannot be written (a full disk) is warned of, once."""
        try:
            with self._connection:
                row = (key, json.dumps(answer))
                self._connection.execute("INSERT OR REPLACE INTO judgements VALUES (?, ?)", row)
        except sqlite3.Error as error:
            self._warn("written", error)

    def _warn(self, what: str, error: sqlite3.Error) -> None:
        if self._writes:
            logger.warning(
                "the cache of judgements %s cannot be %s (%s): judgements are paid for again",
                self._path,
                what,
                error,
            )
        self._writes = False


@contextlib.contextmanager
def open_cache(path: Path | None) -> Iterator[JudgeCache | None]:
    """The cache in a file, made where there is none; None without a path. Raises RewardError."""
    if path is None:
        yield None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=_BUSY / 1000)
    except (OSError, sqlite3.Error) as error:
        raise _unusable(path, error) from error
    with contextlib.closing(connection):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            # A write survives a crash of the process at once, and one of the machine soon after.
            connection.execute("PRAGMA synchronous = NORMAL")
            with connection:
                connection.execute(_TABLE)
        except sqlite3.Error as error:
            raise _unusable(path, error) from error
        yield JudgeCache(connection, path)


def _unusable(path: Path, error: Exception) -> RewardError:
    return RewardError(
        f"the cache of judgements {path} cannot be used ({error}): remove the file, give another "
        "one (cache: PATH in the judge's file), or set cache: false"
    )
