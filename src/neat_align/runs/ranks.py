"""The processes of a run acting together: one result on rank 0, one decision on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from neat_align.errors import OtherProcessError, RunInterrupted
from neat_align.runs.signals import StopRequest, interrupted

T = TypeVar("T")
# The status of a rank that failed; above every signal's number, so that it is what all ranks hear.
FAILED = 255


class Ranks:
    """All ranks of a run. Every method has to be called on every rank, in the same order.

    A rank's status is 0 where all is well, a signal's number where it was asked to stop, and
    FAILED where its work raised.
    """

    def __init__(self, accelerator: Accelerator, stop: StopRequest) -> None:
        self.accelerator = accelerator
        self.stop = stop

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that writes. (No other rank has to call this.)"""
        return bool(self.accelerator.is_main_process)

    def max_over_ranks(self, status: int) -> int:
        """The largest of all ranks' statuses, 0 to 255."""
        if self.accelerator.num_processes == 1:
            return status
        statuses = torch.tensor([status], device=self.accelerator.device)
        return int(cast("Tensor", self.accelerator.gather(statuses)).max())

    def run_on_all_ranks(self, work: Callable[[], None], what: str) -> int:
        """Run `work` on every rank; a failure or signal of one ends all.

        `what` says when it was, for messages ("while it saved …"). Gives the signal that another
        rank was stopped by, or 0. Raises OtherProcessError on the ranks that did not fail
        themselves.
        """
        status = FAILED
        try:
            work()
            status = 0
        except RunInterrupted as stopped:
            status = stopped.signal_number
            raise
        finally:
            worst = self.max_over_ranks(status)
        if worst == FAILED:
            raise OtherProcessError(f"another process failed {what}: its own message says why")
        return worst

    def run_on_rank_zero(self, work: Callable[[], None], what: str) -> None:
        """Run `work` on rank 0 while the others wait; it ends all of them when it raises."""
        signal_number = self.run_on_all_ranks(work if self.is_rank_zero else _nothing, what)
        if signal_number:
            raise interrupted(signal_number, what, show=False)

    def from_rank_zero(self, value: T) -> T:
        """Rank 0's value, on every rank.

        For numbers that every rank computed and by which the run is steered: on different hardware
        they need not agree to the last bit.
        """
        if self.accelerator.num_processes == 1:
            return value
        values: list[T] = [value]
        return cast("T", broadcast_object_list(values)[0])

    # ---- being asked to stop ----

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop."""
        return self.max_over_ranks(self.stop.signal_number) > 0

    def raise_if_stop_requested(self, where: str) -> None:
        """Raise RunInterrupted on all ranks when one was asked to stop."""
        signal_number = self.max_over_ranks(self.stop.signal_number)
        if signal_number:
            raise interrupted(signal_number, where, show=self.is_rank_zero)

    def raise_if_this_rank_must_stop(self, where: str) -> None:
        """Raise RunInterrupted when this rank was asked to stop, whatever the others do.

        For work that ranks do alone; no other rank has to call it.
        """
        if self.stop.signal_number:
            raise interrupted(self.stop.signal_number, where, show=self.is_rank_zero)


def _nothing() -> None:
    return None
