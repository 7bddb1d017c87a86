"""Calls that two processes share, run by test_distributed.py: torchrun two_ranks.py FOLDER.

Each scene writes what its process saw to FOLDER/RANK.json. The last one breaks the group: the
second process is stuck in its share for longer than the first waits.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from neat_align.errors import RewardError, RunInterrupted
from neat_align.runs.ranks import Ranks
from neat_align.runs.shared_calls import SharedCalls
from neat_align.runs.signals import StopRequest, listening

folder = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
RANK = accelerator.process_index
LIMIT = 20.0
ranks = Ranks(accelerator, StopRequest(), timeout=LIMIT, folder=folder)
seen: dict[str, Any] = {}


def double(numbers: list[int]) -> list[int]:
    return [2 * n for n in numbers]


def whose() -> int:
    return RANK


def fail(who: int, error: Exception) -> None:
    if who == RANK:
        raise error


def hear_a_signal(who: int) -> None:
    if who == RANK:
        os.kill(os.getpid(), signal.SIGTERM)
        while not ranks.stop.signal_number:
            time.sleep(0.01)


def sleep(who: int, seconds: float) -> None:
    if who == RANK:
        time.sleep(seconds)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "double": double,
    "whose": whose,
    "fail": fail,
    "hear": hear_a_signal,
    "sleep": sleep,
}


def scene(name: str, work: Callable[[SharedCalls], Any], on: Ranks = ranks) -> None:
    """What `work` gives on rank 0, or what either process raises."""
    calls = SharedCalls(on, FUNCTIONS)
    given: list[Any] = [None]

    def note() -> None:
        given[0] = work(calls)

    started = time.monotonic()
    try:
        calls.lead(note, f"in scene {name}")
        seen[name] = given[0]
    except (Exception, RunInterrupted) as error:  # noqa: BLE001 - it is what is looked at
        seen[name] = f"{type(error).__name__}: {error}"
    seen[f"{name} took"] = time.monotonic() - started


def refuse(_: SharedCalls) -> None:
    raise ValueError("rank 0 alone")


def until_stopped(calls: SharedCalls) -> None:
    for _ in range(3):
        ranks.raise_if_this_rank_must_stop("between two batches")
        calls.ask("hear", [(1,), (1,)])


scene("shares", lambda c: [c.ask("double", [([1, 2],), ([3],)]), c.ask("whose", [(), ()])])
scene("nobody", lambda c: c.ask("double", [None, ([4],)]))
scene("own", lambda c: c.ask("whose", [(), ()], lambda: "mine"))
scene("typed", lambda c: c.ask("fail", [(1, RewardError("no score for row 3"))] * 2))
scene("foreign", lambda c: c.ask("fail", [(1, KeyError("lost"))] * 2))
scene("rank zero", refuse)
scene("share of rank zero", lambda c: c.ask("fail", [(0, RewardError("here"))] * 2))
scene("still fine", lambda c: c.ask("double", [([5],), ([6],)]))
with listening(ranks.stop):
    scene("signal", until_stopped)
seen["scattered"] = ranks.from_rank_zero({"from": RANK})
seen["largest"] = ranks.max_over_ranks(RANK + 3)
impatient = Ranks(accelerator, StopRequest(), timeout=4.0, folder=folder)
scene("stuck", lambda c: c.ask("sleep", [(1, 9.0), (1, 9.0)]), impatient)
(folder / f"{RANK}.json").write_text(json.dumps(seen))
sys.stdout.flush()
os._exit(0)  # the broken group's threads would abort the interpreter's end
