"""Run reward functions over rows and add them up, strictly: the wrong thing never becomes a score."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import numbers
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from neat_align.errors import RewardError
from neat_align.groups import Prompt
from neat_align.rewards.protocol import CompletionInput, NamedReward, ScoredRows, completion_text

_EXCERPT_CHARS = 80
_ARGUMENTS = ("prompts", "completions", "completion_ids")


def score(
    rewards: tuple[NamedReward, ...],
    *,
    prompts: Sequence[Prompt],
    completions: Sequence[CompletionInput],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> ScoredRows:
    """Score every row with every function.

    A row's reward is the weighted sum over the functions that did not abstain on it (TRL's nansum), not rescaled: a
    function that abstains on only some completions of one prompt contributes 0 to those and its score to the others, so
    such functions should be centred on 0, or abstain on whole prompts. It is None when every function of non-zero weight
    abstained; functions of weight 0 are only recorded.

    Async functions run concurrently, after the sync ones; this also works where an event loop is running already.
    """
    _check_rows(prompts, completions, completion_ids, columns)
    if not completions:
        return ScoredRows((), ())
    outputs = _run(rewards, prompts, completions, completion_ids, columns)
    per_function = [_checked(r.name, output, completions) for r, output in zip(rewards, outputs, strict=True)]
    components = tuple(zip(*per_function, strict=True)) if per_function else ((),) * len(completions)
    weights = [r.weight for r in rewards]
    return ScoredRows(tuple(_weighted_sum(weights, row, i) for i, row in enumerate(components)), components)


def _check_rows(
    prompts: Sequence[Prompt],
    completions: Sequence[CompletionInput],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> None:
    n = len(completions)
    taken = [name for name in columns if name in _ARGUMENTS]
    if taken:
        raise RewardError(f"the data has columns named {', '.join(taken)}, which reward functions are given by neat-align: rename them")
    for name, column in {"prompts": prompts, "completion_ids": completion_ids, **columns}.items():
        if len(column) != n:
            raise RewardError(f"there are {n} completions to score but {len(column)} {name}: one a completion is needed")


def _weighted_sum(weights: Sequence[float], row: Sequence[float | None], index: int) -> float | None:
    terms = [w * s for w, s in zip(weights, row, strict=True) if s is not None and w != 0]
    if not terms:
        return None
    total = sum(terms)
    if not math.isfinite(total):
        raise RewardError(f"the weighted sum of row {index} overflows (components {list(row)}, weights {list(weights)}): lower the weights")
    return total


# ---- calling ---------------------------------------------------------------------------------------------------------


def _run(
    rewards: Sequence[NamedReward],
    prompts: Sequence[Prompt],
    completions: Sequence[CompletionInput],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> list[Any]:
    """Every function's raw output, awaited where it is awaitable."""
    outputs: list[Any] = []
    try:
        for reward in rewards:
            # Every function gets its own lists: one that sorts or pops cannot change what the next one sees.
            arguments: dict[str, Any] = dict(zip(_ARGUMENTS, map(list, (prompts, completions, completion_ids)), strict=True))
            arguments.update({name: list(column) for name, column in columns.items()})
            try:
                outputs.append(reward.function(**arguments))
            except Exception as error:
                raise _raised(reward.name, len(completions), error) from error
        waiting = [i for i, output in enumerate(outputs) if inspect.isawaitable(output)]
        for i, result in zip(waiting, _await_all([outputs[i] for i in waiting]), strict=True):
            if isinstance(result, BaseException):
                raise _raised(rewards[i].name, len(completions), result) from result
            outputs[i] = result
        return outputs
    finally:
        for output in outputs:
            if inspect.iscoroutine(output):
                output.close()


def _raised(name: str, rows: int, error: BaseException) -> RewardError:
    hint = ""
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        hint = "; reward functions are given every column of the data: end their signature with **columns"
    return RewardError(f"reward function {name!r} raised {type(error).__name__} on a batch (rows 0 to {rows - 1}): {error}{hint}")


def _await_all(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Results, or the exceptions in their place, in order; all at once."""
    if not awaitables:
        return []

    async def gather() -> list[Any]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(gather())
    # Called from inside a loop (a notebook): a second loop is not allowed in this thread.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(contextvars.copy_context().run, asyncio.run, gather()).result()


# ---- checking --------------------------------------------------------------------------------------------------------


def _checked(name: str, output: Any, completions: Sequence[CompletionInput]) -> list[float | None]:
    """`output` as one float or None a row."""
    if getattr(output, "ndim", None) == 1 and hasattr(output, "tolist"):
        output = output.tolist()  # a numpy array or torch tensor
    if not isinstance(output, list | tuple):
        raise RewardError(
            f"reward function {name!r} returned {_described(output)}; it must return a list with one number or None a completion"
        )
    if len(output) != len(completions):
        raise RewardError(
            f"reward function {name!r} returned {len(output)} scores for {len(completions)} completions; "
            "it must return one a completion, None where it abstains"
        )
    return [_number(name, i, value, completions[i]) for i, value in enumerate(output)]


def _number(name: str, index: int, value: Any, completion: CompletionInput) -> float | None:
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
        f"reward function {name!r} returned {what}, for row {index}, whose completion begins {_excerpt(completion)}; "
        "it must return a finite number, or None to abstain"
    )


def _described(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + '…'}"


def _excerpt(completion: CompletionInput) -> str:
    text = completion_text(completion)
    return repr(text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + "…")
