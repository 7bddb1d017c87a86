"""How reward functions are called: on copies of their own, once, and what a failure says."""

from __future__ import annotations

import copy
import functools
import gc
import json
import threading
import traceback
import urllib.error
import weakref
from collections.abc import Callable, Iterator
from email.message import Message
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from transformers import TrainerState

from neat_align.errors import RewardError, RewardTimeoutError
from neat_align.rewards.contrast import ContrastReward
from neat_align.rewards.protocol import NamedReward, ScoredRows
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rewards.scoring import score


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def rows(prompts: int = 2, each: int = 2) -> dict[str, Any]:
    """Two answers to each of two conversations, with a column of nested values."""
    shared = [chat(f"q{p}") for p in range(prompts)]  # as the rows of the data share them
    tags = [{"labels": [p, [p]], "by": ("a", [p])} for p in range(prompts)]
    n = prompts * each
    return {
        "prompts": [shared[i // each] for i in range(n)],
        "completions": [[{"role": "assistant", "content": f"a{i}"}] for i in range(n)],
        "completion_ids": [[i, i + 1] for i in range(n)],
        "columns": {"tags": [tags[i // each] for i in range(n)]},
        "labels": [f"data.jsonl:{i // each + 1}" for i in range(n)],
    }


def scored(*functions: Any, timeout: float | None = None, **given: Any) -> ScoredRows:
    rewards = resolve_rewards(list(functions), None, timeout=timeout)
    return score(rewards, **(given or rows()))


# ---- copies --------------------------------------------------------------------------------------


def spoil(prompts: Any, completions: Any, completion_ids: Any, tags: Any) -> None:
    """Everything that a function could do to what it is given."""
    for prompt in prompts:
        prompt.insert(0, {"role": "system", "content": "new"})
        prompt[-1]["content"] += "!"
    completions[0][0]["content"] = ""
    completion_ids[1].clear()
    for tag in tags:
        tag["labels"][1].append(9)
        tag["by"][1].append(9)
    for given in (prompts, completions, completion_ids, tags):
        given.reverse()


def ones(rows: Any) -> list[float]:
    return [1.0] * len(rows)


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_function_that_changes_what_it_is_given_changes_it_for_nobody(
    timeout: float | None,
) -> None:
    seen: list[Any] = []

    def note(**given: Any) -> None:
        seen.append(copy.deepcopy(given))

    def sync(**given: Any) -> list[float]:
        note(**given)
        spoil(**given)
        return ones(given["prompts"])

    async def later(**given: Any) -> list[float]:
        note(**given)
        spoil(**given)
        return ones(given["prompts"])

    given = rows()
    before = copy.deepcopy(given)
    scored(sync, later, sync, functools.partial(later), timeout=timeout, **given)
    assert given == before
    expected = {k: before[k] for k in ("prompts", "completions", "completion_ids")}
    assert seen == [expected | before["columns"]] * 4


def test_rows_of_one_prompt_do_not_share_their_copies() -> None:
    def first_of_each(prompts: Any, **_: Any) -> list[float]:
        prompts[0].append("mine")
        return [float(len(p)) for p in prompts]

    assert scored(first_of_each).rewards == (2.0, 1.0, 1.0, 1.0)


def test_what_a_function_keeps_it_may_change_later() -> None:
    kept: list[Any] = []

    def keeps(prompts: Any, **_: Any) -> list[float]:
        for prompt in kept:
            prompt.clear()
        kept.extend(prompts)
        return [float(len(p)) for p in prompts]

    given = rows()
    for _ in range(3):
        assert scored(keeps, **given).rewards == (1.0,) * 4


def test_a_list_that_a_function_keeps_and_changes_is_not_its_answer_any_more() -> None:
    scores = [1.0] * 4

    def kept_list(**_: Any) -> list[float]:
        return scores

    async def spoiler(**_: Any) -> list[float]:
        scores[:] = [7.0] * 9
        return [0.0] * 4

    assert scored(kept_list, spoiler).components == ((1.0, 0.0),) * 4


def test_a_contrast_scorer_may_change_its_lists() -> None:
    def log_probs(prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        for ids in (*prompts, *answers):
            ids.append(99)
        return [float(-sum(ids)) for ids in answers]

    reward = ContrastReward(
        log_probs, lambda prompt, polarity: [len(polarity), polarity == "negative"]
    )
    got = reward(prompts=["a", "b"], completions=["x", "y"], completion_ids=[[1, 2], [3]])
    assert got == [0.0, 0.0]  # the same answers under both instructions


# ---- what is returned ----------------------------------------------------------------------------


def generator(**_: Any) -> Iterator[float]:
    yield from (1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    "function",
    [
        generator,
        lambda **_: (x for x in (1, 2, 3, 4)),
        lambda **_: map(float, "1234"),
        lambda **_: range(1, 5),
        lambda **_: {"a": 1, "b": 2, "c": 3, "d": 4}.values(),
        lambda **_: (1, 2, 3, 4),
        lambda **_: np.array([1, 2, 3, 4], dtype=np.float16),
        lambda **_: list(np.array([1, 2, 3, 4])),
        lambda **_: torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True),
        lambda **_: list(torch.tensor([1.0, 2.0, 3.0, 4.0]).bfloat16()),
    ],
)
@pytest.mark.parametrize("timeout", [None, 5.0])
def test_any_sequence_of_numbers_is_an_answer(
    function: Callable[..., Any], timeout: float | None
) -> None:
    assert scored(function, timeout=timeout).rewards == (1.0, 2.0, 3.0, 4.0)


def test_a_generator_that_fails_or_goes_on_and_on_is_the_functions_fault() -> None:
    def fails(**_: Any) -> Iterator[float]:
        yield 1.0
        raise ZeroDivisionError("in the generator")

    def endless(**_: Any) -> Iterator[float]:
        while True:
            yield 1.0

    def sleeps(**_: Any) -> Iterator[float]:
        never.wait(5)
        yield 1.0

    never = threading.Event()
    with pytest.raises(
        RewardError, match=r"'fails' raised ZeroDivisionError on .*in the generator"
    ):
        scored(fails)
    with pytest.raises(RewardError, match="'endless' returned 5 scores for 4 completions"):
        scored(endless)
    with pytest.raises(RewardTimeoutError, match="'sleeps' did not return"):
        scored(sleeps, timeout=0.1)
    never.set()


@pytest.mark.parametrize("bad", [b"1234", {1.0, 2.0, 3.0, 4.0}, {1: 2}, "1234", object()])
def test_what_has_no_order_of_numbers_is_no_answer(bad: Any) -> None:
    with pytest.raises(RewardError, match="it must return a list"):
        scored(lambda **_: bad)


# ---- failures ------------------------------------------------------------------------------------


class Client400(Exception):
    status_code = 400


def http_status(status: int) -> Exception:
    request = httpx2.Request("POST", "https://judge.example/")
    return httpx2.HTTPStatusError(
        "no", request=request, response=httpx2.Response(status, request=request)
    )


@pytest.mark.parametrize(
    "error",
    [
        TypeError("a bug"),
        ValueError("a bug"),
        KeyError("a bug"),
        ZeroDivisionError("a bug"),
        AssertionError("a bug"),
        RuntimeError("a bug"),
        StopIteration("a bug"),
        ConnectionError("a bug"),
        TimeoutError("a bug"),
        Client400("a bug"),
        http_status(400),
        http_status(422),
        http_status(429),
        http_status(500),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_failing_function_is_called_once_and_no_other_after_it(
    error: Exception, timeout: float | None
) -> None:
    calls: list[str] = []

    def broken(**_: Any) -> list[float]:
        calls.append("broken")
        raise error

    def paid(**given: Any) -> list[float]:
        calls.append("paid")
        return ones(given["prompts"])

    with pytest.raises(
        RewardError,
        match=rf"'broken' raised {type(error).__name__} on a batch of 4 rows \(data\.jsonl:1; "
        r"data\.jsonl:2\): .*\(test_calling\.py:\d+\)",
    ) as caught:
        scored(broken, paid, timeout=timeout)
    assert calls == ["broken"]
    assert caught.value.__cause__ is error
    assert traceback.extract_tb(error.__traceback__)[-1].name == "broken"


def test_a_failing_async_function_is_called_once_and_ends_the_others() -> None:
    calls: list[str] = []

    async def slow(**_: Any) -> list[float]:
        calls.append("slow")
        try:
            await forever()
        finally:
            calls.append("ended")
        return []

    async def broken(completions: Any, **_: Any) -> list[float]:
        calls.append("broken")
        return [1.0 / (c[0]["content"] != "a2") for c in completions]

    with pytest.raises(RewardError, match=r"'broken' raised ZeroDivisionError on .*division") as e:
        scored(slow, broken)
    assert calls == ["slow", "broken", "ended"]
    frames = traceback.extract_tb(e.value.__cause__.__traceback__)  # type: ignore[union-attr]
    assert "broken" in [frame.name for frame in frames]


async def forever() -> None:
    import asyncio

    await asyncio.sleep(60)


def test_the_place_is_the_users_line_and_not_the_librarys() -> None:
    def parses(**_: Any) -> list[float]:
        json.loads("{")
        return []

    line = parses.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"JSONDecodeError on .*\(test_calling\.py:{line}\)$"):
        scored(parses)


def test_a_call_inside_of_the_function_is_not_taken_for_ours() -> None:
    def inner() -> None: ...

    def outer(**_: Any) -> list[float]:
        inner(temperature=1)  # type: ignore[call-arg]
        return []

    with pytest.raises(RewardError, match="argument 'temperature'") as caught:
        scored(outer)
    assert "**columns" not in str(caught.value)


def test_a_single_row_is_named_with_its_answer() -> None:
    def broken(**_: Any) -> list[float]:
        raise ValueError("no")

    with pytest.raises(RewardError, match=r"on data\.jsonl:1, whose completion begins 'a0': no"):
        scored(broken, **rows(1, 1))


# ---- too much at once ----------------------------------------------------------------------------


def out_of_memory(*_: Any) -> list[float]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


TOO_MUCH: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError("no room"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    http_status(413),
    urllib.error.HTTPError("https://judge.example", 413, "too large", Message(), None),
]


@pytest.mark.parametrize("error", TOO_MUCH, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("is_async", [False, True])
def test_memory_that_runs_out_is_met_with_fewer_prompts_never_with_part_of_one(
    error: Exception, is_async: bool
) -> None:
    sizes: list[int] = []

    def at_most_six(completions: Any, **_: Any) -> list[float]:
        sizes.append(len(completions))
        if len(completions) > 6:
            raise error
        texts = [c[0]["content"] for c in completions]
        return [float(text[1:]) for text in texts]

    async def at_most_six_async(**given: Any) -> list[float]:
        return at_most_six(**given)

    def small(completions: Any, **_: Any) -> list[float]:
        return [0.5] * len(completions)

    given = rows(prompts=5, each=3)
    got = scored(at_most_six_async if is_async else at_most_six, small, **given)
    assert got.components == tuple((float(i), 0.5) for i in range(15))
    # 15 rows are cut between prompts 2 and 3 (or 3 and 4), the larger part once more.
    assert sizes == [15, 6, 9, 3, 6]


@pytest.mark.parametrize("is_async", [False, True])
def test_one_prompt_that_is_too_much_is_an_error(is_async: bool) -> None:
    sizes: list[int] = []

    def never(completions: Any, **_: Any) -> list[float]:
        sizes.append(len(completions))
        raise torch.OutOfMemoryError("CUDA out of memory")

    async def never_async(**given: Any) -> list[float]:
        return never(**given)

    with pytest.raises(
        RewardError,
        match=r"raised OutOfMemoryError on a batch of 3 rows \(data\.jsonl:1\): CUDA out of memory "
        r"\(.*\); these are the completions of one prompt: let the function take fewer at once",
    ):
        scored(never_async if is_async else never, **rows(prompts=4, each=3))
    assert sizes == [12, 6, 3]


# ---- TRL's arguments -----------------------------------------------------------------------------


def test_what_the_signature_names_is_given_and_nothing_else() -> None:
    seen: dict[str, Any] = {}

    def asks(completions: Any, trainer_state: Any, log_metric: Any = None, **columns: Any) -> Any:
        seen["asks"] = (trainer_state, set(columns))
        log_metric("my/number", 3)
        return ones(completions)

    def does_not(**given: Any) -> Any:
        seen["does not"] = set(given)
        return ones(given["prompts"])

    class Judge:
        async def __call__(self, completions: Any, log_extra: Any, **columns: Any) -> list[float]:
            log_extra("why", [f"because {i}" for i in range(2)])
            log_extra("why", [torch.tensor(2.5), {"a": (1, {2})}])
            return ones(completions)

    functions = [asks, does_not, Judge(), functools.partial(asks, trainer_state="bound")]
    got = scored(*functions)
    assert seen["asks"][0] == "bound"
    names = {"prompts", "completions", "completion_ids", "tags"}
    assert seen["does not"] == names
    assert seen["asks"][1] == names - {"completions"}
    assert got.metrics == {"my/number": (3.0, 3.0)}
    assert got.extra == {"why": ("because 0", "because 1", 2.5, {"a": [1, "{2}"]})}


def test_the_trainers_state_is_a_copy() -> None:
    state = TrainerState(global_step=7, log_history=[{"loss": 1.0}])
    given: list[Any] = []

    def meddles(completions: Any, trainer_state: Any, **_: Any) -> list[float]:
        given.append(trainer_state)
        assert trainer_state.global_step == 7
        assert trainer_state.log_history == [{"loss": 1.0}]
        trainer_state.global_step = 99
        trainer_state.log_history[0]["loss"] = 0.0
        trainer_state.log_history.append({})
        return ones(completions)

    reward = NamedReward("meddles", meddles, 1.0, trainer_state=lambda: state)
    for _ in range(2):
        score((reward,), **rows())
    assert isinstance(given[0], TrainerState)
    assert (state.global_step, state.log_history) == (7, [{"loss": 1.0}])


def test_a_trl_function_that_takes_all_of_it_from_kwargs_is_told_how() -> None:
    def trls(completions: Any, **kwargs: Any) -> list[float]:
        return [float(kwargs["trainer_state"].global_step)] * len(completions)

    with pytest.raises(RewardError, match="name it in their signature: trainer_state=None"):
        scored(trls)


def test_what_is_logged_is_checked() -> None:
    late: list[Any] = []

    def words(completions: Any, log_metric: Any, **_: Any) -> Any:
        log_metric("x", "high")
        return ones(completions)

    def short(completions: Any, log_extra: Any, **_: Any) -> Any:
        log_extra("why", ["one"])
        return ones(completions)

    def keeps(completions: Any, log_metric: Any, log_extra: Any, **_: Any) -> Any:
        late.extend((log_metric, log_extra))
        return ones(completions)

    with pytest.raises(RewardError, match="'words' gave log_metric 'x' as str 'high'; it must be"):
        scored(words)
    with pytest.raises(RewardError, match="'short' gave log_extra 1 values of 'why' for 4 compl"):
        scored(short)
    scored(keeps)
    for log, value in zip(late, (1.0, [1.0]), strict=True):
        with pytest.raises(RewardError, match=r"'keeps' called log_.* after the call"):
            log("x", value)


def test_totals_are_added_up_over_calls_and_functions() -> None:
    def counts(completions: Any, log_total: Any, **_: Any) -> Any:
        if len(completions) > 2:
            raise MemoryError  # it is called again on halves, each of which counts
        log_total("tokens", len(completions))
        log_total("tokens", torch.tensor(0.5))
        return ones(completions)

    got = scored(counts, counts, **rows(prompts=4, each=1))
    assert got.totals == {"tokens": 2 * (4 + 2 * 0.5)}
    assert got.metrics == {}

    def words(completions: Any, log_total: Any, **_: Any) -> Any:
        log_total("x", "many")
        return ones(completions)

    with pytest.raises(RewardError, match="'words' gave log_total 'x' as str 'many'; it must be"):
        scored(words)


def test_numbers_that_are_not_finite_are_left_out_and_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def logs(completions: Any, log_metric: Any, log_extra: Any, **_: Any) -> Any:
        for value in (np.float32("nan"), torch.tensor(2.0), float("inf"), 4):
            log_metric("x", value)
        log_extra("y", [1.5, float("nan"), np.nan, None])
        return ones(completions)

    got = scored(logs)
    assert got.metrics == {"x": (2.0, 4.0)}
    assert got.extra == {"y": (1.5, "nan", "nan", None)}
    assert "'logs' logged nan as 'x': left out" in caplog.text


def test_what_a_call_that_was_made_again_has_logged_counts_once() -> None:
    def logs(completions: Any, log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric("rows", len(completions))
        log_extra("text", [c[0]["content"] for c in completions])
        return out_of_memory() if len(completions) > 2 else ones(completions)

    got = scored(logs)
    assert got.metrics == {"rows": (2.0, 2.0)}
    assert got.extra == {"text": ("a0", "a1", "a2", "a3")}


def test_a_kept_logger_keeps_no_trainer() -> None:
    class Trainer:
        state = TrainerState()

    kept: list[Any] = []

    def keeps(
        completions: Any, trainer_state: Any, log_metric: Any, log_extra: Any, **_: Any
    ) -> Any:
        kept.extend((trainer_state, log_metric, log_extra))
        return ones(completions)

    trainer = Trainer()
    here = weakref.ref(trainer)
    rewards = (NamedReward("keeps", keeps, 1.0, trainer_state=lambda: trainer.state),)
    score(rewards, **rows())
    del rewards, trainer
    gc.collect()
    assert here() is None
    assert len(kept) == 3
