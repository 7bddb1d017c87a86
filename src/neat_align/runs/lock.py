"""One writer a run directory: a lock that is let go of when its holder dies, however it dies.

The lock is filelock's. Where the system has locks (flock, LockFileEx on Windows) it is one on
`run.lock`. Where the file system refuses them it is the existence of a second file,
`run.lock.held`: a dead holder's is taken over by a process of the same host that sees that the
recorded process is gone; elsewhere nobody can see that, and a person has to delete it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from neat_align.errors import ConfigError

LOCK_FILE = "run.lock"
# Beside it, only while it is held and only where the file system has no locks.
HELD_FILE = "run.lock.held"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# What flock answers on such file systems: Lustre and FUSE mounted without it, NFS without lockd.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# What to do about other failures, by their number.
_ADVICE = {
    errno.EACCES: "you may not write there: change its permissions, or choose another output_dir",
    errno.EPERM: "you may not write there: change its permissions, or choose another output_dir",
    errno.EROFS: "it is mounted for reading only: choose another output_dir",
    errno.ENOTDIR: "a part of the path is a file: choose another output_dir",
    errno.ENOSPC: "the disk is full: make room, or choose another output_dir",
    errno.EDQUOT: "your quota is used up: make room, or choose another output_dir",
}
_OTHER_ADVICE = "look at the disk or the network mount, or choose an output_dir on another one"


@contextlib.contextmanager
def one_writer(run_dir: Path) -> Iterator[None]:
    """Hold the run directory's lock; `run.lock` says who does (process id, host, since when).

    The text is emptied when the block is left, by an exception too. What a killed process leaves
    in it holds nothing. Not re-entrant. Raises ConfigError when another process, or another
    trainer of this one, holds the lock, and when the directory cannot be written or locked.
    """
    with contextlib.ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock, descriptor = _take(run_dir, stack)
            stack.callback(_clear, lock, descriptor)
            _write(descriptor, _holder_text())
        except Timeout as refusal:
            raise ConfigError(_refused(run_dir, Path(refusal.lock_file))) from None
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0, _OTHER_ADVICE)
            raise ConfigError(
                f"{run_dir} cannot be locked for this run ({error}): {advice}"
            ) from error
        yield


def _holder_text() -> str:
    me = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    # The first byte is what Windows locks: a blank, so that nobody has to read it.
    return " " + json.dumps(me)


def _take(run_dir: Path, stack: contextlib.ExitStack) -> tuple[BaseFileLock, int]:
    """The lock, held until the stack is left, and a descriptor of `run.lock` to write through.

    Through a descriptor, because the file may be gone when the block ends, and because Windows lets
    nobody else write while it is locked. Raises filelock's Timeout when it is held by another.
    """
    path = run_dir / LOCK_FILE
    descriptors: list[int] = []
    native = FileLock(
        path,
        blocking=False,
        thread_local=False,
        preserve_lock_file=True,
        on_acquired=descriptors.append,
    )
    try:
        stack.enter_context(native)
    except OSError as error:  # Timeout is one, too, without a number
        if error.errno not in _NO_LOCKS:
            raise
    else:
        return native, descriptors[0]
    # Not of `run.lock` itself, which is there after a run and would count as held. Half a second,
    # because one attempt may end with a dead holder's file deleted and the next one takes the lock.
    soft = SoftFileLock(run_dir / HELD_FILE, timeout=0.5, thread_local=False)
    stack.enter_context(soft)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    stack.callback(os.close, descriptor)
    return soft, descriptor


def _clear(lock: BaseFileLock, descriptor: int) -> None:
    if lock.is_locked:  # not in a forked child, which holds nothing and has the descriptor closed
        _write(descriptor, "")


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text.encode())


def _refused(run_dir: Path, lock_path: Path) -> str:
    refusal = (
        f"{run_dir} is being written by {_holder(run_dir)}: wait until it ends, stop it, or choose "
        "another output_dir"
    )
    if lock_path.name != HELD_FILE:
        return refusal
    return (
        f"{refusal}. The file system has no locks, so {lock_path} alone says so: delete it if that "
        "process is gone"
    )


def _holder(run_dir: Path) -> str:
    try:
        with (run_dir / LOCK_FILE).open("rb", buffering=0) as file:
            file.seek(1 if sys.platform == "win32" else 0)
            holder = json.loads(file.read(4096).decode("utf-8", "replace"))
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # taken at this very moment
        return "another process"
