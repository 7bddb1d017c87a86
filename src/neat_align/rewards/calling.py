"""Calling reward functions: on copies, within their time, all async ones at once, each once.

A call that ran out of memory is made again on two halves, cut between two prompts. Any other
exception is the function's own: it is passed on at once, and the function is not asked again, for
calls may cost money and may not be repeatable.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import sys
import threading
import traceback
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neat_align.errors import RewardError, RewardTimeoutError, name_list
from neat_align.network.event_loop import (
    CLEAN_UP_SECONDS,
    LoopBlockedError,
    background_loop,
    give_up,
)
from neat_align.prompts.copies import deep_copy
from neat_align.prompts.rows import Prompt
from neat_align.rewards.logged import OPTIONAL_ARGUMENTS, CallLog, named_by
from neat_align.rewards.output import checked_scores, consumed, excerpt
from neat_align.rewards.protocol import CompletionInput, NamedReward, Score

logger = logging.getLogger(__name__)
ARGUMENTS = ("prompts", "completions", "completion_ids")
_TOO_LARGE = 413  # the HTTP status of a request that is too large


@dataclass(frozen=True)
class Rows:
    """What reward functions are given, and how each row is called in messages.

    `answers` are the data's own, `chosen` and `rejected`, for functions whose signature names them.
    """

    prompts: Sequence[Prompt]
    completions: Sequence[CompletionInput]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    labels: Sequence[str]
    answers: Mapping[str, Sequence[str | None]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    def arguments(self) -> dict[str, Any]:
        """Deep copies, a row for itself: whatever a function does to its own changes no other's."""
        texts = {"prompts": self.prompts, "completions": self.completions, **self.columns}
        copies = {name: [deep_copy(value) for value in values] for name, values in texts.items()}
        return {**copies, "completion_ids": [list(ids) for ids in self.completion_ids]}

    def answers_for(self, reward: NamedReward) -> dict[str, Any]:
        """Those of the data's own answers that the function's signature names."""
        return {name: list(self.answers[name]) for name in named_by(reward.function, self.answers)}

    def part(self, first: int, end: int) -> Rows:
        """The rows from `first` to `end`, which is left out."""
        cut = slice(first, end)
        columns = {name: column[cut] for name, column in self.columns.items()}
        answers = {name: texts[cut] for name, texts in self.answers.items()}
        return Rows(
            self.prompts[cut],
            self.completions[cut],
            self.completion_ids[cut],
            columns,
            self.labels[cut],
            answers,
        )

    def middle(self) -> int | None:
        """Where a prompt begins, nearest to the middle; None when all rows have one prompt.

        A function may compare the completions of a prompt, so those stay together.
        """
        begins = [i for i in range(1, len(self)) if self.prompts[i] != self.prompts[i - 1]]
        return min(begins, key=lambda i: abs(2 * i - len(self)), default=None)


@dataclass(frozen=True)
class Answer:
    """What a function gave for some rows, from `first` on, and what it logged meanwhile."""

    first: int
    scores: list[Score]
    log: CallLog


@dataclass(frozen=True)
class _TooMuch:
    """Memory ran out; fewer rows may fit. `middle` is where to cut."""

    middle: int


class _LeavingError(Exception):
    """A function raised `left`, which ends the process and must not end the event loop."""

    def __init__(self, left: BaseException) -> None:
        super().__init__(str(left))
        self.left = left


def call_all(rewards: Sequence[NamedReward], rows: Rows) -> list[list[Answer]]:
    """Every function's answers on all rows, in the rows' order: one, or more where memory ran out.

    Sync functions are called one after the other, then async ones run together. Raises RewardError
    at the first failure.
    """
    todo = [[(0, len(rows))] for _ in rewards]
    answers: list[list[Answer]] = [[] for _ in rewards]
    while due := [(i, parts.pop()) for i, parts in enumerate(todo) if parts]:
        calls = [_Call(rewards[i], rows.part(*part), part[0]) for i, part in due]
        for (i, (first, end)), outcome in zip(due, _outcomes(calls), strict=True):
            if isinstance(outcome, Answer):
                answers[i].append(outcome)
            else:
                middle = first + outcome.middle
                todo[i] += [(middle, end), (first, middle)]
    return answers


def _outcomes(calls: Sequence[_Call]) -> list[Answer | _TooMuch]:
    """What became of each call. Raises RewardError for the first that failed."""
    outcomes: list[Answer | _TooMuch | None] = []
    waiting: list[tuple[_Call, Awaitable[Any]]] = []
    try:
        for call in calls:
            outcome = call.begin()
            if isinstance(outcome, Answer | _TooMuch):
                outcomes.append(outcome)
            else:
                outcomes.append(None)
                waiting.append((call, outcome))
        awaited = iter(_await_all(waiting))
        return [next(awaited) if outcome is None else outcome for outcome in outcomes]
    finally:
        for _, awaitable in waiting:
            if (
                inspect.iscoroutine(awaitable)
                and inspect.getcoroutinestate(awaitable) == inspect.CORO_CREATED
            ):
                awaitable.close()  # Python warns of one that nobody awaited


class _Call:
    """One call of one function on the rows from `first` on."""

    def __init__(self, reward: NamedReward, rows: Rows, first: int) -> None:
        self.reward, self.rows, self.first = reward, rows, first
        self.log = CallLog(reward.name, len(rows))

    def begin(self) -> Answer | _TooMuch | Awaitable[Any]:
        """Call the function; what is to be awaited where it is async. Raises RewardError."""
        try:
            output = self._in_time()
            return output if inspect.isawaitable(output) else self._answer(output)
        except Exception as error:  # noqa: BLE001 - a reward function may raise anything
            return self._failed(error)

    async def finish(self, awaitable: Awaitable[Any]) -> Answer | _TooMuch:
        """Await what an async function has begun. Raises RewardError."""
        limit = asyncio.timeout(self.reward.timeout)
        try:
            async with limit:
                output = await awaitable
            return self._answer(output)
        except (KeyboardInterrupt, SystemExit) as error:
            raise _LeavingError(error) from None
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return self._failed(error)  # of something that the function awaited
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                raise self.late("it was cancelled") from error
            return self._failed(error)

    def _in_time(self) -> Any:
        """The function's output. RewardTimeoutError after the reward's timeout."""
        arguments = self.rows.arguments() | self.rows.answers_for(self.reward)
        arguments |= self.log.arguments_for(self.reward)

        def called() -> Any:
            return consumed(self.reward.function(**arguments), len(self.rows))

        if self.reward.timeout is None:
            return called()
        future: Future[Any] = Future()
        context = contextvars.copy_context()

        def work() -> None:
            try:
                future.set_result(context.run(called))
            except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
                future.set_exception(error)

        # A daemon, so that a call that never returns does not keep the process from ending.
        threading.Thread(target=work, name=f"reward {self.reward.name}", daemon=True).start()
        wait([future], timeout=self.reward.timeout)
        if not future.done():
            raise self.late(
                "a thread cannot be ended, so the call may go on until this process ends"
            )
        return future.result()

    def _answer(self, output: Any) -> Answer:
        scores = checked_scores(self.reward.name, output, self.rows.completions, self.rows.labels)
        self.log.close()
        return Answer(self.first, scores, self.log)

    def late(self, what_became_of_it: str) -> RewardTimeoutError:
        """The error of a call that took too long."""
        return RewardTimeoutError(
            f"reward function {self.reward.name!r} did not return within "
            f"reward_timeout={self.reward.timeout} s ({what_became_of_it}): raise the limit, or "
            "look at what the function waits for"
        )

    def _failed(self, error: BaseException) -> _TooMuch:
        """Where to cut the rows if there were too many at once; else raises RewardError."""
        if isinstance(error, RewardError):
            raise error  # it says what is wrong already
        middle = self.rows.middle() if _is_too_much(error) else None
        if middle is None:
            raise RewardError(self._blame(error)) from error
        logger.warning(
            "reward function %r ran out of memory on %d rows at once (%s): it is called again on "
            "fewer",
            self.reward.name,
            len(self.rows),
            type(error).__name__,
        )
        return _TooMuch(middle)

    def _blame(self, error: BaseException) -> str:
        """Function, place in its code, prompts and what was raised."""
        frames = traceback.extract_tb(error.__traceback__)
        here = max(i for i, frame in enumerate(frames) if frame.filename == __file__)
        inside = [f for f in frames[here + 1 :] if f.filename == frames[here + 1].filename]
        # The last line of the file that the function is in, not that of a library which it calls.
        place = f" ({Path(inside[-1].filename).name}:{inside[-1].lineno})" if inside else ""
        if len(self.rows) == 1:
            where = (
                f"{self.rows.labels[0]}, whose completion begins "
                f"{excerpt(self.rows.completions[0])}"
            )
        else:
            where = f"a batch of {len(self.rows)} rows ({name_list(self.rows.labels, '; ')})"
        return (
            f"reward function {self.reward.name!r} raised {type(error).__name__} on {where}: "
            f"{error}{place}{_hint(error, self.rows)}"
        )


def _hint(error: BaseException, rows: Rows) -> str:
    """What to change, for mistakes that are often made."""
    said = str(error)
    given = (*ARGUMENTS, *rows.columns)
    if isinstance(error, TypeError) and any(f"keyword argument '{n}'" in said for n in given):
        return (
            "; reward functions are given every column of the data: end their signature with "
            "**columns"
        )
    if isinstance(error, KeyError) and error.args and error.args[0] in OPTIONAL_ARGUMENTS:
        return f"; it is given to functions that name it in their signature: {error.args[0]}=None"
    if isinstance(error, RuntimeError) and "different" in said and "loop" in said:
        return (
            "; async rewards run in one event loop of their own: make clients, locks and queues "
            "inside the function, at its first call"
        )
    if _is_too_much(error):
        return "; these are the completions of one prompt: let the function take fewer at once"
    return ""


def _is_too_much(error: BaseException) -> bool:
    """Whether fewer rows at once may work: memory ran out, or a server said 413."""
    torch = sys.modules.get("torch")  # not loaded here: without it nothing raises its errors
    if isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    ):
        return True
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        return True  # torch has no class of its own for this one
    # Where the clients keep the status: openai and aiohttp, urllib, httpx and requests.
    response = getattr(error, "response", None)
    statuses = [getattr(error, name, None) for name in ("status_code", "status", "code")]
    return any(
        isinstance(status, int) and status == _TOO_LARGE
        for status in (*statuses, getattr(response, "status_code", None))
    )


# ---- async ---------------------------------------------------------------------------------------


def _await_all(waiting: Sequence[tuple[_Call, Awaitable[Any]]]) -> list[Answer | _TooMuch]:
    """What becomes of these calls, all at once; the first failure ends the others."""
    if not waiting:
        return []
    loop = background_loop()
    try:
        return loop.run(_together(waiting), _longest([call.reward for call, _ in waiting]))
    except _LeavingError as error:
        raise error.left from None
    except LoopBlockedError:
        give_up(loop)
        raise waiting[0][0].late(
            "it, or another async reward beside it, blocks the event loop: await instead of "
            "waiting, or make the function a plain one"
        ) from None


def _longest(rewards: Sequence[NamedReward]) -> float | None:
    """Seconds after which a loop in which these run must have answered; None: no limit."""
    limits = [reward.timeout for reward in rewards]
    known = [limit for limit in limits if limit is not None]
    return max(known) + CLEAN_UP_SECONDS if len(known) == len(limits) else None


async def _together(waiting: Sequence[tuple[_Call, Awaitable[Any]]]) -> list[Answer | _TooMuch]:
    tasks = [asyncio.ensure_future(call.finish(awaitable)) for call, awaitable in waiting]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done() and (error := task.exception()) is not None:
                raise error
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
