"""The one event loop of async rewards and requests to servers, for the life of the process.

Clients, locks and queues of asyncio belong to the loop in which they are first used, so a reward
that keeps one between its calls needs the same loop every time: over rounds, evaluations and the
runs of a comparison. The loop has a thread of its own, so it also works where the caller's thread
has a running loop already (a notebook). It begins with the first that needs it and is closed when
the process ends; what is still running then is cancelled.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from neat_align.errors import RewardError

T = TypeVar("T")
# How long cancelled work may take to clean up.
CLEAN_UP_SECONDS = 5.0
# A wait without end cannot be interrupted on Windows.
_LOOK_EVERY = 1.0


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; the first failure ends the rest, and is raised itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in work]
    except ExceptionGroup as failures:
        failure = failures.exceptions[0]
        raise failure from failure.__cause__
    return [task.result() for task in tasks]


class LoopBlockedError(Exception):
    """The loop gave no answer in time: something in it does not come back to it."""


class BackgroundLoop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="neat-align requests", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        while True:
            try:
                self._loop.run_forever()
            except (KeyboardInterrupt, SystemExit):
                continue  # a task raised it, which whoever awaits that task is told
            return

    def is_usable(self) -> bool:
        """Whether it runs: a forked process has the loop, and not its thread."""
        return self._process == os.getpid() and self._thread.is_alive()

    def run(
        self,
        main: Coroutine[Any, Any, T],
        limit: float | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> T:
        """The result of `main`, run in the loop with a copy of the caller's context.

        `meanwhile` is called about once a second in the caller's thread. When the caller is
        interrupted, by what it raises too, `main` is cancelled and its clean-up waited for. Raises
        what `main` raises, LoopBlockedError after `limit` seconds (None: no limit), and RewardError
        for a caller that runs in the loop itself.
        """
        if threading.current_thread() is self._thread:
            main.close()
            raise RewardError(
                "an async reward function scores with other async rewards and would wait for "
                "itself: await those functions instead"
            )
        done: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(main))
            tasks[0].add_done_callback(lambda task: _pass_on(task, done))

        try:
            # It runs in a copy of this thread's context, and so does the task that it makes.
            self._loop.call_soon_threadsafe(begin)
            waited = 0.0
            while not done.done():
                step = _LOOK_EVERY if limit is None else min(_LOOK_EVERY, limit - waited)
                wait([done], timeout=step)
                waited += step
                if limit is not None and waited >= limit and not done.done():
                    raise LoopBlockedError
                if meanwhile is not None:
                    meanwhile()
            return done.result()
        finally:
            if not done.done():
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
                wait([done], timeout=0.0 if limit is not None else CLEAN_UP_SECONDS)

    def close(self) -> None:
        """Cancel what is running, and end loop and thread; nothing where they have ended."""
        atexit.unregister(self.close)
        if not self.is_usable():
            return
        ended = asyncio.run_coroutine_threadsafe(_cancel_everything(), self._loop)
        wait([ended], timeout=CLEAN_UP_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=CLEAN_UP_SECONDS if ended.done() else 0.0)
        if not self._thread.is_alive():
            self._loop.close()


def _pass_on(task: asyncio.Task[T], done: Future[T]) -> None:
    if task.cancelled():
        done.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        done.set_exception(error)
    else:
        done.set_result(task.result())


async def _cancel_everything() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=CLEAN_UP_SECONDS / 2)
    await asyncio.get_running_loop().shutdown_asyncgens()


_current: BackgroundLoop | None = None
_making = threading.Lock()


def background_loop() -> BackgroundLoop:
    """The process's loop, begun at the first call."""
    global _current
    with _making:
        if _current is None or not _current.is_usable():
            _current = BackgroundLoop()
        return _current


def give_up(loop: BackgroundLoop) -> None:
    """Leave a blocked loop alone in its thread; `background_loop` then begins another."""
    global _current
    with _making:
        if _current is loop:
            _current = None
    atexit.unregister(loop.close)
