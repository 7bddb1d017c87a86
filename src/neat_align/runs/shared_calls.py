"""Calls that all ranks make a share of: rank 0 leads, the others serve.

Rank 0 alone plans, keeps what is finished and decides, as in a run of one process. What costs time
(to draw completions, to compute their log-probabilities, to reward them) it hands out in shares,
one a rank, and the results come back to it. So no decision is taken twice, and none can differ. A
failure, or a signal, comes back with the results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

from neat_align.errors import NEATError, one_line
from neat_align.runs.ranks import Ranks

logger = logging.getLogger(__name__)

# The arguments of one rank's share; None: it has none.
Share: TypeAlias = tuple[Any, ...] | None
Functions: TypeAlias = Mapping[str, Callable[..., Any]]
# Opens what keeps ranks in step that share one model.
Together: TypeAlias = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class _Request:
    """What rank 0 asks another rank to do."""

    name: str
    share: Share


@dataclass(frozen=True)
class _Outcome:
    """What a rank's share came to; `error` is in a form that every process can read."""

    value: Any = None
    error: BaseException | None = None
    signal_number: int = 0


class SharedCalls:
    """The calls of one stretch of work.

    `functions` are what can be asked for, by name: every rank has its own, which do the same.
    `together` is open on every rank during a call: it keeps ranks in step that share one model.
    """

    def __init__(
        self,
        ranks: Ranks,
        functions: Functions,
        together: Together = nullcontext,
    ) -> None:
        self.ranks = ranks
        self.functions = functions
        self.together = together

    def lead(self, work: Callable[[], None], what: str) -> None:
        """Run `work` on rank 0, which may `ask`, while the others serve. Every rank calls this.

        What `work`, or a share of it, raises ends all of them: rank 0 and the rank where it was
        raise it, the others NEATError. `what` says when it was.
        """
        own = self._lead if self.ranks.is_rank_zero else self._serve
        self.ranks.run_or_stop(lambda: own(work), what)

    def ask(
        self,
        name: str,
        shares: Sequence[Share],
        own: Callable[..., Any] | None = None,
        heard: Callable[[int, Any], None] = lambda rank, value: None,
    ) -> list[Any]:
        """What the function `name` gives for each rank's share, in order. On rank 0 alone.

        `own` runs in the function's place for rank 0's share. `heard` is told what each of the
        others gave, also where one of them, or rank 0, failed, or `heard` raised for another.
        Raises the first of what was raised, rank 0's own before `heard`'s and the others'.
        """
        self.ranks.scatter([_Request(name, share) for share in shares])
        mine, failure = self._done(own or self.functions[name], shares[0])
        outcomes = self.ranks.gather(mine)
        for rank, outcome in enumerate(outcomes):
            if rank and outcome.value is not None:
                try:
                    heard(rank, outcome.value)
                except BaseException as error:  # noqa: BLE001 - raised once all were heard
                    failure = failure or error
        if failure is not None:
            raise failure
        for rank, outcome in enumerate(outcomes):
            if outcome.error is not None:
                logger.error("process %d failed: %s", rank, one_line(outcome.error, 300))
                raise outcome.error
        # Where another process was asked to stop, so is the run: rank 0 looks between batches.
        signal_number = max(outcome.signal_number for outcome in outcomes)
        self.ranks.stop.signal_number = self.ranks.stop.signal_number or signal_number
        return [outcome.value for outcome in outcomes]

    def _lead(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            self._dismiss(failed=True)
            raise
        self._dismiss(failed=False)

    def _dismiss(self, *, failed: bool) -> None:
        """Tell the others that there is no more to do."""
        if self.ranks.count == 1:
            return
        try:
            self.ranks.scatter([None] * self.ranks.count)
        except NEATError:
            if not failed:  # else what failed says more
                raise

    def _serve(self, work: Callable[[], None]) -> None:
        failure: BaseException | None = None
        while True:
            request: _Request | None = self.ranks.scatter(None)
            if request is None:
                break
            outcome, error = self._done(self.functions[request.name], request.share)
            self.ranks.gather(outcome)
            failure = failure or error
        if failure is not None:
            raise failure

    def _done(
        self, function: Callable[..., Any], share: Share
    ) -> tuple[_Outcome, BaseException | None]:
        """What a share came to, for rank 0 and for this process."""
        try:
            with self.ranks.watched(), self.together():
                value = None if share is None else function(*share)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - every rank has to hear of it
            return _Outcome(error=_readable(error)), error
        return _Outcome(value, signal_number=self.ranks.stop.signal_number), None


def _readable(error: BaseException) -> BaseException:
    """The error, or one that says the same, for another process to read.

    Only our own are sent as they are: who knows what another class needs to be made.
    """
    if isinstance(error, NEATError) and error.args == (str(error),):
        return type(error)(*error.args)
    return NEATError(f"{type(error).__name__}: {error}")
