"""One event loop for all async rewards of a process: clients and locks live from call to call."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from neat_align.errors import RewardError, RewardTimeoutError, RunInterrupted
from neat_align.network.event_loop import BackgroundLoop, background_loop
from neat_align.rewards.protocol import ScoredRows
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rewards.scoring import score
from reward_server import RewardServer
from small_trainer import ROWS, trainer

SOURCE = Path(__file__).resolve().parents[2] / "src"


def scored(*functions: Any, timeout: float | None = None) -> ScoredRows:
    rewards = resolve_rewards(list(functions), None, timeout=timeout)
    return score(
        rewards,
        prompts=["p", "p"],
        completions=["a", "bb"],
        completion_ids=[[1], [2]],
        columns={},
    )


class KeepsAClient:
    """As users write it: a client, a lock and a queue, made at the first call and kept."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client: httpx2.AsyncClient | None = None
        self.loops: set[int] = set()

    async def __call__(self, completions: Any, **columns: Any) -> list[float]:
        if self.client is None:
            self.client = httpx2.AsyncClient()
            self.lock = asyncio.Lock()
            self.queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)
        self.loops.add(id(asyncio.get_running_loop()))
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        rows = [{"prompt": "", "completion": text} for text in texts]

        async def ask(row: dict[str, str]) -> float:
            assert self.client is not None
            await self.queue.put(1)  # waits, so the queue is bound to the loop
            async with self.lock:
                answer = await self.client.post(self.url, json={"rows": [row]})
            await self.queue.get()
            return float(answer.json()["rewards"][0] or 0.0)

        return await asyncio.gather(*map(ask, rows))


def keep_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_server.Handler.protocol_version", "HTTP/1.1")


def test_a_client_a_lock_and_a_queue_can_be_kept_between_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep_alive(monkeypatch)
    with RewardServer() as server:
        reward = KeepsAClient(server.url)

        async def notebook() -> ScoredRows:
            return scored(reward)

        assert scored(reward).rewards == (1.0, 2.0)
        assert asyncio.run(notebook()).rewards == (1.0, 2.0)
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(scored, reward, reward) for _ in range(4)]
            assert [f.result().rewards for f in futures] == [(2.0, 4.0)] * 4
        assert scored(reward, timeout=5.0).rewards == (1.0, 2.0)
    assert len(reward.loops) == 1


def returns_a_coroutine(**given: Any) -> Any:
    return plain_async(**given)


async def plain_async(completions: Any, **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


def returns_an_awaitable_of_its_own(completions: Any, **_: Any) -> Any:
    class Answer:
        def __await__(self) -> Any:
            yield from asyncio.sleep(0).__await__()
            return [float(len(c)) for c in completions]

    return Answer()


class AsyncCall:
    async def __call__(self, **given: Any) -> list[float]:
        return await plain_async(**given)

    async def method(self, **given: Any) -> list[float]:
        return await plain_async(**given)


@pytest.mark.parametrize(
    "function",
    [
        plain_async,
        returns_a_coroutine,
        returns_an_awaitable_of_its_own,
        AsyncCall(),
        AsyncCall().method,
        functools.partial(plain_async, unused=1),
        functools.partial(AsyncCall()),
    ],
    ids=[
        "function",
        "coroutine",
        "awaitable",
        "call",
        "method",
        "partial",
        "partial of a call",
    ],
)
@pytest.mark.parametrize("timeout", [None, 5.0])
def test_every_way_to_be_async_works(function: Any, timeout: float | None) -> None:
    assert scored(function, timeout=timeout).rewards == (1.0, 2.0)


def test_the_callers_context_is_seen_and_stays_its_own() -> None:
    context: contextvars.ContextVar[str] = contextvars.ContextVar("context", default="none")

    async def reads(**_: Any) -> list[float]:
        assert context.get() == "the caller's"
        context.set("changed")
        return [0.0, 0.0]

    context.set("the caller's")
    for _ in range(2):
        scored(reads)
    assert context.get() == "the caller's"


def test_a_task_that_goes_on_between_the_calls_goes_on() -> None:
    counts: list[int] = []

    async def tick() -> None:
        while True:
            counts.append(1)
            await asyncio.sleep(0.001)

    class Warms:
        task: asyncio.Task[None] | None = None

        async def __call__(self, **_: Any) -> list[float]:
            self.task = self.task or asyncio.create_task(tick())
            return [0.0, 0.0]

    reward = Warms()
    scored(reward)
    before = len(counts)
    deadline = time.monotonic() + 5
    while len(counts) < before + 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(counts) >= before + 3
    assert reward.task is not None
    reward.task.get_loop().call_soon_threadsafe(reward.task.cancel)


# ---- what goes wrong -----------------------------------------------------------------------------


def test_what_belongs_to_another_loop_says_what_to_change() -> None:
    lock = asyncio.Lock()

    async def elsewhere() -> None:
        async def waits() -> None:
            async with lock:
                await asyncio.sleep(0)

        await asyncio.gather(waits(), waits())

    async def uses(**_: Any) -> list[float]:
        async def waits() -> None:
            async with lock:
                await asyncio.sleep(0)

        await asyncio.gather(waits(), waits())
        return [0.0, 0.0]

    asyncio.run(elsewhere())
    with pytest.raises(
        RewardError, match=r"different event loop.*inside the function, at its first"
    ):
        scored(uses)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_reward_that_leaves_leaves_and_the_loop_goes_on(kind: type[BaseException]) -> None:
    async def leaves(**_: Any) -> list[float]:
        raise kind

    async def its_task_leaves(**given: Any) -> list[float]:
        return await asyncio.create_task(leaves(**given))

    for function in (leaves, its_task_leaves):
        with pytest.raises(kind):
            scored(function)
        assert scored(plain_async).rewards == (1.0, 2.0)


def test_a_cancelled_inner_task_is_the_functions_failure() -> None:
    async def cancels(**_: Any) -> list[float]:
        task = asyncio.create_task(asyncio.sleep(5))
        task.cancel()
        await task
        return []

    with pytest.raises(RewardError, match="'cancels' raised CancelledError on a batch"):
        scored(cancels)


def test_a_reward_that_blocks_the_loop_is_late_and_the_next_one_has_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("neat_align.rewards.calling.CLEAN_UP_SECONDS", 0.1)
    over = threading.Event()

    async def blocks(**_: Any) -> list[float]:
        over.wait(10)
        return []

    before, started = background_loop(), time.monotonic()
    with pytest.raises(
        RewardTimeoutError, match=r"'blocks' did not return .*blocks the event loop"
    ):
        scored(blocks, timeout=0.1)
    assert time.monotonic() - started < 5
    assert scored(plain_async).rewards == (1.0, 2.0)
    assert background_loop() is not before
    over.set()


def test_a_reward_that_scores_with_an_async_reward_does_not_wait_for_itself() -> None:
    async def nested(**_: Any) -> list[float]:
        return list(scored(plain_async).rewards)  # type: ignore[arg-type]

    with pytest.raises(RewardError, match="would wait for itself"):
        scored(nested)


def test_an_interrupt_cancels_and_lets_clean_up() -> None:
    cleaned = threading.Event()

    async def waits(**_: Any) -> list[float]:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.01)
            cleaned.set()
        return []

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        scored(waits)
    assert cleaned.is_set()
    assert time.monotonic() - started < 5
    assert scored(plain_async).rewards == (1.0, 2.0)


def test_a_loop_that_is_closed_has_ended_its_tasks_and_its_thread() -> None:
    ended: list[str] = []

    async def leaves_a_task() -> None:
        async def long() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("cancelled")

        tasks.append(asyncio.create_task(long()))
        await asyncio.sleep(0)

    tasks: list[Any] = []
    loop = BackgroundLoop()
    loop.run(leaves_a_task())
    loop.close()
    loop.close()
    assert ended == ["cancelled"]
    assert not loop.is_usable()


# ---- processes -----------------------------------------------------------------------------------

SCRIPT = """
    import asyncio, os, sys
    from neat_align.rewards.protocol import NamedReward
    from neat_align.rewards.scoring import score

    class Reward:
        lock = None
        async def __call__(self, completions, **_):
            if self.lock is None:
                self.lock = asyncio.Lock()
                self.task = asyncio.create_task(self.background())
            async def one():
                async with self.lock:
                    await asyncio.sleep(0)
            await asyncio.gather(one(), one())
            return [1.0] * len(completions)
        async def background(self):
            try:
                await asyncio.sleep(600)
            finally:
                print("background ended", flush=True)

    def scored(reward):
        rows = dict(prompts=["p"], completions=["c"], completion_ids=[[1]], columns={})
        return score((NamedReward("r", reward, 1.0),), **rows).rewards
"""


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c",
         textwrap.dedent(SCRIPT) + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        check=False,
    )  # fmt: skip


def test_the_end_of_the_process_closes_the_loop() -> None:
    done = run_script("reward = Reward(); print(scored(reward), scored(reward), flush=True)")
    assert done.stdout.split("\n")[:2] == ["(1.0,) (1.0,)", "background ended"]
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_a_loop_of_its_own() -> None:
    done = run_script(
        """
        reward = Reward()
        print(scored(reward), flush=True)
        child = os.fork()
        if child == 0:
            print("child", scored(Reward()), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print("parent", scored(reward), flush=True)
        """
    )
    assert done.stdout.split("\n")[:4] == [
        "(1.0,)", "child (1.0,)", "parent (1.0,)", "background ended"
    ], done.stderr  # fmt: skip
    assert done.returncode == 0


def test_a_terminated_process_ends_while_a_reward_waits() -> None:
    done = run_script(
        """
        import signal
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        class Waits(Reward):
            async def __call__(self, completions, **_):
                os.kill(os.getpid(), signal.SIGTERM)
                try:
                    await asyncio.sleep(600)
                finally:
                    print("cleaned", flush=True)
        scored(Waits())
        """
    )
    assert done.stdout == "cleaned\n", done.stderr
    assert done.returncode == 143


# ---- a run ---------------------------------------------------------------------------------------


def test_a_client_is_kept_over_rounds_and_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_alive(monkeypatch)
    connections: set[Any] = set()

    def by_length(handler: Any, asked: Any, number: int) -> None:
        connections.add(handler.client_address)
        rewards = [float(len(row["completion"])) for row in asked.rows]
        handler.answer(200, json.dumps({"rewards": rewards}).encode())

    with RewardServer(by_length) as server:
        reward, judge = KeepsAClient(server.url), KeepsAClient(server.url)
        t = trainer(
            tmp_path,
            rows=ROWS[:4],
            reward=reward,
            judge_funcs=judge,
            eval_dataset=ROWS[8:10],
            prompts_per_round=2,
            num_train_epochs=2,
            evaluate_contrast=False,
        )
        t.train()
        t.evaluate()
        assert t.state.global_step == 2
    assert len(reward.loops | judge.loops) == 1
    assert (
        len(connections) == 2
    )  # a client has one request at a time here, and keeps its connection


def test_a_signal_while_a_reward_waits_stops_the_run_where_it_can_go_on(tmp_path: Path) -> None:
    calls: list[int] = []

    async def judge(completions: Any, **_: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        return [float(len(c[0]["content"])) for c in completions]

    def run() -> Any:
        return trainer(
            tmp_path, rows=ROWS[:4], reward=judge, prompts_per_round=4, generation_batch_size=8
        )

    with pytest.raises(RunInterrupted) as stopped:
        run().train()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(calls) == 1  # the batch is finished and kept
    t = run()
    t.train(resume_from_checkpoint=True)
    assert t.state.global_step == 2
    kept = sum(len(g.completions) for g in t.parts.round_maker.make(
        0, is_start=False, start_is_current=True
    ).groups)  # fmt: skip
    assert sum(calls) == kept
