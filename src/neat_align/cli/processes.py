"""The command line in several processes of one launch: each message once, and a clean end."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence

import typer

from neat_align.errors import ConfigError
from neat_align.runs import launch

# Commands that split their work over processes. The others would do all of it in each.
TOGETHER = ("train", "evaluate")
# How long a process waits before it leaves without a word, so that the one that has the word is
# not ended by the launcher before it spoke.
_LET_SPEAK_SECONDS = 0.5


def check_alone(arguments: Sequence[str]) -> None:
    """Refuse several processes for a command that works in one. Raises ConfigError."""
    command = next((a for a in arguments if not a.startswith("-")), None)
    if launch.processes() > 1 and command is not None and command not in TOGETHER:
        raise ConfigError(
            f"`neat-align {command}` works in one process and was launched in "
            f"{launch.processes()}, each of which would do all of it: start it without the "
            f"launcher ({' and '.join(TOGETHER)} take several processes)"
        )


def quiet_replicas() -> None:
    """Leave warnings, which every process has alike, to rank 0."""
    if launch.rank() > 0:
        logging.getLogger("neat_align").setLevel(logging.ERROR)


def say_once(lines: str) -> None:
    """Print to stderr unless another process of this launch has said the same."""
    if launch.processes() > 1 and not _is_first_to_say(lines):
        time.sleep(_LET_SPEAK_SECONDS)
        return
    typer.echo(lines, err=True)


def _is_first_to_say(text: str) -> bool:
    """Asks the launcher's key-value store; where there is none to ask, everybody speaks."""
    try:
        store = launch.store()
        said = "said/" + hashlib.sha256(text.encode()).hexdigest()
        return store is None or int(store.add(said, 1)) == 1
    except (ValueError, RuntimeError):  # the launcher is gone
        return True


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Leave the process group in order; after an error, leave without it.

    What is left of a process group has threads on which the interpreter's end may abort: the exit
    code would be theirs. So it is waited for only on rank 0 and only where all went well, since
    trackers send their last words then.
    """
    try:
        yield
    except SystemExit as end:
        if launch.processes() == 1:
            raise
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == 0:
            _close_group()
            if launch.rank() == 0:
                raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _close_group() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
