"""SIGINT and SIGTERM as a request to stop.

What is being done is finished and kept, and then the process leaves. A handler only notes the
signal; a run looks at the note where it can leave without losing anything: between the batches of a
round (`trainer/round_maker.py`), after an optimizer step and a save (`trainer/round_callback.py`).
A second signal does not wait.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from neat_align.errors import RunInterrupted

STOPPING = (signal.SIGINT, signal.SIGTERM)
# Ctrl-C reaches a worker twice, from the terminal and from the launcher that forwards it: that is
# one request.
SAME_REQUEST_SECONDS = 0.5


@dataclass
class StopRequest:
    """Whether this process was asked to stop.

    `signal_number` is 0 until then; `heard` says whether handlers are in place, `told` whether it
    was said why the run stops: on its way out a call may be stopped more than once.
    """

    signal_number: int = 0
    at: float = 0.0
    heard: bool = False
    told: bool = False


@contextlib.contextmanager
def listening(stop: StopRequest) -> Iterator[None]:
    """Note SIGINT and SIGTERM in `stop` while the block runs, and put the handlers that were there
    back after it.

    Outside of the main thread, where Python allows no handlers, and inside of another such block
    nothing is changed.
    """
    if stop.heard or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _: FrameType | None) -> None:
        # os.write: print could be what the signal interrupted.
        name = signal.Signals(number).name
        if stop.signal_number and time.monotonic() - stop.at > SAME_REQUEST_SECONDS:
            os.write(2, f"\n{name} again: leaving at once\n".encode())
            os._exit(128 + number)
        if not stop.signal_number:
            stop.signal_number, stop.at = number, time.monotonic()
            os.write(
                2,
                f"\n{name}: what is being done is finished and kept, then the run stops; once "
                "more to leave at once\n".encode(),
            )

    stop.signal_number, stop.heard, stop.told = 0, True, False
    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield
    finally:
        stop.heard = False
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def interrupted(signal_number: int, where: str, *, show: bool = True) -> RunInterrupted:
    """The exception to raise, after its message is on stderr (`show`: on one process of
    several).
    """
    message = (
        f"stopped by {signal.Signals(signal_number).name} {where}. To go on: the same command with "
        "--resume true (neat-align train … --resume true), or train(resume_from_checkpoint=True)"
    )
    if show:
        print(message, file=sys.stderr, flush=True)
    return RunInterrupted(signal_number, message)
