"""Run reward functions over rows and add them up, strictly: no failure ever becomes a score."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import numbers
import threading
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from neat_align.errors import RewardError, RewardTimeoutError
from neat_align.prompts.rows import Prompt, PromptRow
from neat_align.rewards.protocol import CompletionInput, NamedReward, ScoredRows, completion_text

_EXCERPT_CHARS = 80
_ARGUMENTS = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True)
class _Rows:
    """What reward functions are given, and how each row is called in messages."""

    prompts: Sequence[Prompt]
    completions: Sequence[CompletionInput]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    labels: Sequence[str]

    def __len__(self) -> int:
        return len(self.completions)

    def arguments(self) -> dict[str, Any]:
        """Copies of all lists, so that a function that sorts or pops changes only its own."""
        rows = (self.prompts, self.completions, self.completion_ids)
        given = {**dict(zip(_ARGUMENTS, rows, strict=True)), **self.columns}
        return {name: list(values) for name, values in given.items()}

    def part(self, first: int, end: int) -> _Rows:
        """The rows from `first` to `end`, which is left out."""
        cut = slice(first, end)
        columns = {name: column[cut] for name, column in self.columns.items()}
        return _Rows(
            self.prompts[cut],
            self.completions[cut],
            self.completion_ids[cut],
            columns,
            self.labels[cut],
        )


def score(
    rewards: tuple[NamedReward, ...],
    *,
    prompts: Sequence[Prompt],
    completions: Sequence[CompletionInput],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    labels: Sequence[str] | None = None,
) -> ScoredRows:
    """Score every row with every function. `labels` are the rows' names in messages
    ("data.jsonl:3"), else "row 0", ….

    A row's reward is the weighted sum over the functions that did not abstain on it (TRL's nansum),
    not rescaled: a function that abstains on only some completions of one prompt contributes 0 to
    those and its score to the others, so such functions should be centred on 0, or abstain on whole
    prompts. It is None when every function of non-zero weight abstained; functions of weight 0 are
    only recorded.

    Async functions run concurrently, after the sync ones; this also works where an event loop is
    running already.

    A function that raises is called again on halves of the batch, to name the row: at most about as
    many rows again as the batch has. Where the failure is the moment's and not a row's (OSError:
    network, timeout, disk), it is not.
    """
    rows = _Rows(
        prompts,
        completions,
        completion_ids,
        columns,
        labels or [f"row {i}" for i in range(len(completions))],
    )
    _check_rows(rows)
    if not completions:
        return ScoredRows((), ())
    outputs = _run(rewards, rows)
    per_function = [
        checked_scores(reward.name, output, completions, rows.labels)
        for reward, output in zip(rewards, outputs, strict=True)
    ]
    components = (
        tuple(zip(*per_function, strict=True)) if per_function else ((),) * len(completions)
    )
    weights = [reward.weight for reward in rewards]
    sums = [
        _weighted_sum(weights, row, label)
        for row, label in zip(components, rows.labels, strict=True)
    ]
    return ScoredRows(tuple(sums), components)


def _check_rows(rows: _Rows) -> None:
    n = len(rows)
    taken = [name for name in rows.columns if name in _ARGUMENTS]
    if taken:
        raise RewardError(
            f"the data has columns named {', '.join(taken)}, which reward functions are given by "
            "neat-align: rename them"
        )
    lists: dict[str, Sequence[Any]] = {
        "prompts": rows.prompts,
        "completion_ids": rows.completion_ids,
        "labels": rows.labels,
        **rows.columns,
    }
    for name, column in lists.items():
        if len(column) != n:
            raise RewardError(
                f"there are {n} completions to score but {len(column)} {name}: one a completion "
                "is needed"
            )


def _weighted_sum(
    weights: Sequence[float], row: Sequence[float | None], label: str
) -> float | None:
    terms = [w * s for w, s in zip(weights, row, strict=True) if s is not None and w != 0]
    if not terms:
        return None
    total = sum(terms)
    if not math.isfinite(total):
        raise RewardError(
            f"the weighted sum of {label} overflows (components {list(row)}, weights "
            f"{list(weights)}): lower the weights"
        )
    return total


# ---- calling -------------------------------------------------------------------------------------


def _run(rewards: Sequence[NamedReward], rows: _Rows) -> list[Any]:
    """Every function's raw output, awaited where it is awaitable."""
    outputs: list[Any] = []
    try:
        for reward in rewards:
            try:
                outputs.append(_call(reward, rows))
            except RewardError:
                raise  # it says what is wrong already
            except Exception as error:
                raise _blamed(reward, rows, error) from error
        waiting = [i for i, output in enumerate(outputs) if inspect.isawaitable(output)]
        results = _await_all([(outputs[i], rewards[i]) for i in waiting])
        for i, result in zip(waiting, results, strict=True):
            if isinstance(result, RewardError):
                raise result
            if isinstance(result, Exception):
                raise _blamed(rewards[i], rows, result) from result
            if isinstance(result, BaseException):
                raise result
            outputs[i] = result
        return outputs
    finally:
        for output in outputs:
            if inspect.iscoroutine(output):
                output.close()


def _call(reward: NamedReward, rows: _Rows) -> Any:
    """The function's output, or what is to be awaited for it.

    RewardTimeoutError after the reward's timeout.
    """
    if reward.timeout is None:
        return reward.function(**rows.arguments())
    future: Future[Any] = Future()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            future.set_result(context.run(reward.function, **rows.arguments()))
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
            future.set_exception(error)

    # A daemon, so that a call that never returns does not keep the process from ending.
    threading.Thread(target=work, name=f"reward {reward.name}", daemon=True).start()
    wait([future], timeout=reward.timeout)
    if not future.done():
        raise _late(
            reward, "a thread cannot be ended, so the call may go on until this process ends"
        )
    return future.result()


def _late(reward: NamedReward, what_became_of_it: str) -> RewardTimeoutError:
    return RewardTimeoutError(
        f"reward function {reward.name!r} did not return within reward_timeout={reward.timeout} s "
        f"({what_became_of_it}): raise the limit, or look at what the function waits for"
    )


def _blamed(reward: NamedReward, rows: _Rows, error: Exception) -> RewardError:
    """The error that names the function and, where one can be found, the row."""
    where = f"a batch of {len(rows)} rows (first {rows.labels[0]}, last {rows.labels[-1]})"
    hint = ""
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        hint = (
            "; reward functions are given every column of the data: end their signature with "
            "**columns"
        )
    elif not isinstance(error, OSError):
        row = _guilty_row(reward, rows)
        if row is None:
            where += ", of which none that was tried raises alone"
        else:
            excerpt = _excerpt(rows.completions[row])
            where = f"{rows.labels[row]}, whose completion begins {excerpt}"
    return RewardError(
        f"reward function {reward.name!r} raised {type(error).__name__} on {where}: {error}{hint}"
    )


def _guilty_row(reward: NamedReward, rows: _Rows) -> int | None:
    """A row on which the function raises by itself, by halving."""
    first, end = 0, len(rows)
    while end - first > 1:
        middle = (first + end) // 2
        if _raises(reward, rows.part(first, middle)):
            end = middle
        else:
            first = middle
    return first if _raises(reward, rows.part(first, end)) else None


def _raises(reward: NamedReward, rows: _Rows) -> bool:
    try:
        output = _call(reward, rows)
    except Exception:  # noqa: BLE001 - a reward function may raise anything
        return True
    if not inspect.isawaitable(output):
        return False
    (result,) = _await_all([(output, reward)])
    return isinstance(result, BaseException)


def _await_all(waiting: Sequence[tuple[Awaitable[Any], NamedReward]]) -> list[Any]:
    """Results, or the exceptions in their place, in order; all at once."""
    if not waiting:
        return []

    async def one(awaitable: Awaitable[Any], reward: NamedReward) -> Any:
        limit = asyncio.timeout(reward.timeout)
        try:
            async with limit:
                return await awaitable
        except TimeoutError as error:
            if limit.expired():
                raise _late(reward, "it was cancelled") from error
            raise

    async def gather() -> list[Any]:
        return await asyncio.gather(*(one(*w) for w in waiting), return_exceptions=True)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(gather())
    return _run_in_thread(gather())


def _run_in_thread(main: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """Run in a thread of its own, for a caller whose thread has a running loop (a notebook).

    An interrupt of the caller (Ctrl-C) cancels it.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[list[Any]]]] = Future()

    async def announced() -> list[Any]:
        task = asyncio.create_task(main)
        started.set_result((asyncio.get_running_loop(), task))
        return await task

    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(contextvars.copy_context().run, asyncio.run, announced())
        try:
            return future.result()
        finally:
            if not future.done():
                loop, task = started.result()
                loop.call_soon_threadsafe(task.cancel)


# ---- checking ------------------------------------------------------------------------------------


def checked_scores(
    name: str, output: Any, completions: Sequence[CompletionInput], labels: Sequence[str]
) -> list[float | None]:
    """`output` as one float or None a row; `labels` are the rows' names in messages."""
    if getattr(output, "ndim", None) == 1 and hasattr(output, "tolist"):
        output = output.tolist()  # a numpy array or torch tensor
    if not isinstance(output, list | tuple):
        raise RewardError(
            f"reward function {name!r} returned {_described(output)}; it must return a list with "
            "one number or None a completion"
        )
    if len(output) != len(completions):
        raise RewardError(
            f"reward function {name!r} returned {len(output)} scores for {len(completions)} "
            "completions; it must return one a completion, None where it abstains"
        )
    return [_number(name, *row) for row in zip(labels, output, completions, strict=True)]


def _number(name: str, label: str, value: Any, completion: CompletionInput) -> float | None:
    if value is None:
        return None
    plain = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        hint = " (for a yes or no, return 1.0 or 0.0)" if isinstance(plain, bool) else ""
        what = f"{_described(value)}, which is not a number{hint}"
    else:
        try:
            number = float(plain)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
        what = f"{number}"
    raise RewardError(
        f"reward function {name!r} returned {what}, for {label}, whose completion begins "
        f"{_excerpt(completion)}; it must return a finite number, or None to abstain"
    )


def _described(value: Any) -> str:
    return f"{type(value).__name__} {_shortened(repr(value))}"


def _excerpt(completion: CompletionInput) -> str:
    return repr(_shortened(completion_text(completion)))


def _shortened(text: str) -> str:
    return text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + "…"


def score_answers(
    rows: Sequence[PromptRow],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    rewards: tuple[NamedReward, ...],
) -> ScoredRows:
    """Rewards of answers to the plain prompts of `rows`, one a row, in one batch."""
    conversational = bool(rows) and not isinstance(rows[0].prompt, str)
    completions: list[CompletionInput] = (
        [[{"role": "assistant", "content": t}] for t in texts] if conversational else list(texts)
    )
    names = sorted({name for row in rows for name in row.columns} - set(_ARGUMENTS))
    return score(
        rewards,
        prompts=[row.prompt for row in rows],
        completions=completions,
        completion_ids=[list(i) for i in ids],
        columns={name: [row.columns.get(name) for row in rows] for name in names},
        labels=[row.where for row in rows],
    )
