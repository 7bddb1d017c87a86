"""The processes of a run acting together: one result on rank 0, one decision on all of them.

What ranks tell each other goes over a process group of its own, on the CPU, whose limit is
`ddp_timeout`: it waits neither for a GPU nor for the gradients of a step, and a process that is
gone or stuck is an error on all the others within that limit. A rank that works or waits nearly as
long writes where it is to `stacks-RANK.txt` in the run directory.
"""

from __future__ import annotations

import contextlib
import faulthandler
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator

from neat_align.errors import NEATError, OtherProcessError, RunInterrupted, one_line
from neat_align.runs.signals import StopRequest, interrupted

T = TypeVar("T")
# The status of a rank that failed; above every signal's number, so that it is what all ranks hear.
FAILED = 255
# Share of the limit after which stacks are written: before the ranks give up on each other.
_STUCK_AFTER = 0.8


class Ranks:
    """All ranks of a run. Every method has to be called on every rank, in the same order.

    A rank's status is 0 where all is well, a signal's number where it was asked to stop, and
    FAILED where its work raised. `timeout` is how long one of them waits for another, in seconds;
    `folder` is where stacks are written. What ranks cannot tell each other is a NEATError.
    """

    def __init__(
        self, accelerator: Accelerator, stop: StopRequest, *, timeout: float, folder: Path
    ) -> None:
        self.accelerator = accelerator
        self.stop = stop
        self.timeout = timeout
        self.folder = folder
        self.count = int(accelerator.num_processes)
        self.index = int(accelerator.process_index)
        self._group: Any = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that writes. (No other rank has to call this.)"""
        return self.index == 0

    def max_over_ranks(self, status: int) -> int:
        """The largest of all ranks' statuses, 0 to 255."""
        if self.count == 1:
            return status
        largest = torch.tensor([status])
        with self._talking("agree on how to go on"):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return int(largest)

    def run_on_all_ranks(self, work: Callable[[], None], what: str) -> int:
        """Run `work` on every rank; a failure or signal of one ends all.

        `what` says when it was, for messages ("while it saved …"). Gives the signal that another
        rank was stopped by, or 0. Raises OtherProcessError on the ranks that did not fail
        themselves.
        """
        status = 0
        failure: BaseException | None = None
        try:
            with self.watched():
                work()
        except RunInterrupted as stopped:
            status, failure = stopped.signal_number, stopped
        except BaseException as error:  # noqa: BLE001 - raised below, once the others know
            status, failure = FAILED, error
        try:
            worst = self.max_over_ranks(status)
        except NEATError:
            if failure is None:
                raise
            worst = status
        if failure is not None:
            raise failure
        if worst == FAILED:
            raise OtherProcessError(f"another process failed {what}: its own message says why")
        return worst

    def run_on_rank_zero(self, work: Callable[[], None], what: str) -> None:
        """Run `work` on rank 0 while the others wait; it ends all of them when it raises."""
        self.run_or_stop(work if self.is_rank_zero else _nothing, what)

    def run_or_stop(self, work: Callable[[], None], what: str) -> None:
        """`run_on_all_ranks`, after which a rank goes on only where none was stopped."""
        signal_number = self.run_on_all_ranks(work, what)
        if signal_number:
            raise interrupted(signal_number, what, show=False)

    def from_rank_zero(self, value: T) -> T:
        """Rank 0's value, on every rank.

        For numbers that every rank computed and by which the run is steered: on different hardware
        they need not agree to the last bit.
        """
        return self.scatter([value] * self.count if self.is_rank_zero else None)

    # ---- between rank 0 and the others ----

    def scatter(self, values: Sequence[T] | None) -> T:
        """Rank 0's `values`, one a rank; None on the others, which get theirs."""
        if self.count == 1:
            assert values is not None
            return values[0]
        received: list[Any] = [None]
        with self._talking("hear from process 0"):
            dist.scatter_object_list(
                received, list(values) if values is not None else None, src=0, group=self._group
            )
        return cast("T", received[0])

    def gather(self, value: T) -> list[T]:
        """Every rank's value on rank 0, in order; nothing on the others."""
        if self.count == 1:
            return [value]
        received: list[Any] | None = [None] * self.count if self.is_rank_zero else None
        with self._talking("hear from the others"):
            dist.gather_object(value, received, dst=0, group=self._group)
        return received or []

    @contextlib.contextmanager
    def _talking(self, purpose: str) -> Iterator[None]:
        """While open, ranks wait for each other. Raises NEATError for one that is gone or stuck."""
        with self.watched():
            try:
                yield
            except RuntimeError as error:  # gloo's, for what broke and what took too long
                raise NEATError(
                    f"process {self.index} of {self.count} could not {purpose}: another process is "
                    f"gone, or did not answer within ddp_timeout={self.timeout:g} seconds "
                    f"({one_line(error, 200)}). Its own message or {self.folder}/stacks-*.txt say "
                    "where it was; if it was only slow, raise ddp_timeout. Finished work is kept: "
                    "go on with --resume true (resume_from_checkpoint=True)"
                ) from error

    # ---- where a rank is ----

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Write this process's stacks when the block is open for nearly as long as others wait."""
        if self.count == 1:
            yield
            return
        timer = threading.Timer(self.timeout * _STUCK_AFTER, self.write_stacks)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def write_stacks(self) -> None:
        """Write where every thread of this process is to a file in the run directory."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"stacks-{self.index}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    # ---- being asked to stop ----

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop."""
        return self.max_over_ranks(self.stop.signal_number) > 0

    def raise_if_stop_requested(self, where: str) -> None:
        """Raise RunInterrupted on all ranks when one was asked to stop."""
        signal_number = self.max_over_ranks(self.stop.signal_number)
        if signal_number:
            raise interrupted(signal_number, where, show=self._tells())

    def raise_if_this_rank_must_stop(self, where: str) -> None:
        """Raise RunInterrupted when this rank was asked to stop, whatever the others do.

        For work that ranks do alone; no other rank has to call it.
        """
        if self.stop.signal_number:
            raise interrupted(self.stop.signal_number, where, show=self._tells())

    def _tells(self) -> bool:
        """Whether this rank says why the run stops: the first one does, once."""
        told, self.stop.told = self.stop.told, True
        return self.is_rank_zero and not told


def _nothing() -> None:
    return None
