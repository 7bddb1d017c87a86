"""One writer a run directory: a lock that the system lets go of when its holder dies, however it
dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from neat_align.errors import ConfigError

LOCK_FILE = "run.lock"


@contextlib.contextmanager
def one_writer(run_dir: Path) -> Iterator[None]:
    """Hold the run directory's lock; the file says who holds it (process id, host, since when).

    The lock is the system's (flock), not the file: a dead process holds none, whatever the file
    still says. Not re-entrant. Raises ConfigError when another process, or another trainer of this
    one, holds it.
    """
    if sys.platform == "win32":  # there is no flock: the second writer is not noticed
        yield
        return
    import fcntl

    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0).decode("utf-8", "replace")
            raise ConfigError(
                f"{run_dir} is being written by {_described(holder)}: wait until it ends, stop "
                "it, or choose another output_dir"
            ) from None
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        _write(descriptor, json.dumps(me))
        yield
        _write(descriptor, "")
    finally:
        os.close(descriptor)


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _described(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (ValueError, KeyError, TypeError):  # taken at this very moment
        return "another process"
