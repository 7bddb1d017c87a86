"""The faults of `faults.py`.

Where each strikes, how the run has to end, and what it is compared with after it has gone on.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fault_points as fp

import neat_align.learning.step_engine
from neat_align import NEATTrainer
from neat_align.cli.app import PAUSED
from neat_align.rewards import resolve
from reward_server import Behaviour, Handler, by_length

NO_RUN_YET = "holds no run to resume"
STOPPED_AFTER = 3
# Names its folder, and whether it was resumed.
OWN = ("training_args.bin",)
CHANGING = ("wall_seconds", "peak_rss_bytes", "commit", "versions")
TIMES = ("runtime", "per_second")


@dataclass(frozen=True)
class Bench:
    """What tries share.

    The unbroken run and its events, a run that was stopped after its third step, a free port. Runs
    have so many `processes`; faults strike the one of this `rank`, whose events these are.
    """

    base: Path
    whole: dict[str, Any]
    events: Sequence[fp.Event]
    cpu_seconds: float
    half: Path
    port: int
    whole_http: dict[str, Any]
    seed: int
    processes: int = 1
    rank: int = 0


@dataclass(frozen=True)
class Try:
    """One fault.

    `work` is given a folder that is not there yet, and says why the try is lost, or None.
    """

    fault: str
    name: str
    work: Callable[[Path], str | None]


# ---- comparing -----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on how it came about."""
    found: dict[str, Any] = {}
    for pattern in ("rounds/?????/*", "model/*", "evaluation-*.json", "drift-start.json"):
        found |= {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.glob(pattern)
            if p.is_file() and p.name not in OWN
        }
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found["metrics.jsonl"] = [
        {k: v for k, v in json.loads(line).items() if not k.endswith(TIMES)} for line in lines
    ]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    found["result.json"] = {k: v for k, v in result.items() if k not in CHANGING}
    found["report.html"] = (folder / "report.html").is_file()
    return found


def difference(whole: dict[str, Any], folder: Path) -> str | None:
    """What a finished run has otherwise than the unbroken one."""
    try:
        found = contents(folder)
    except (OSError, ValueError) as error:
        return f"the run is not whole: {error}"
    other = sorted(
        name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)
    )
    return f"other than unbroken: {', '.join(other)}" if other else None


def last_line(text: str) -> str:
    """The end of what a process said, for a report of a lost try."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def run(b: Bench, folder: Path, **how: Any) -> fp.Ended:
    """A run of the bench's processes."""
    return fp.run(b.base, folder, processes=b.processes, rank=b.rank, **how)


def go_on(folder: Path, b: Bench, server: fp.Server | None = None) -> str | None:
    """Resume the run, or start it where nothing had begun, and compare. What is lost, or None."""
    ended = run(b, folder, resume=True, server=server)
    if ended.code == 2 and NO_RUN_YET in ended.said:
        ended = run(b, folder, resume=False, server=server)
    if ended.code != 0:
        return f"resumed, it ended with {ended.code}: {last_line(ended.said)}"
    return difference(b.whole if server is None else b.whole_http, folder)


def broken(
    folder: Path,
    b: Bench,
    codes: Sequence[int],
    says: str = "",
    *,
    action: fp.Action = fp.nothing,
    server: fp.Server | None = None,
    before: Callable[[], None] = lambda: None,
) -> str | None:
    """Run with a fault; it must end with one of the codes, and say `says` where that is not 0.

    Then go on, and compare.
    """
    ended = run(b, folder, resume=False, action=action, server=server, before=before)
    if ended.code not in codes:
        return f"it ended with {ended.code}, not {list(codes)}: {last_line(ended.said)}"
    if ended.code == 0:
        return difference(b.whole if server is None else b.whole_http, folder)
    if says not in ended.said:
        return f"it did not say {says!r}: {last_line(ended.said)}"
    return go_on(folder, b, None if server is None else fp.Server(server.port, by_length))


# ---- where ---------------------------------------------------------------------------------------


def spread(
    b: Bench, count: int, kinds: Sequence[str] = (), salt: str = ""
) -> list[tuple[int, fp.Event]]:
    """So many events, drawn with the seed, in turn from each stage, the busiest first.

    `kinds` () means any.
    """
    rng = random.Random(f"{b.seed}/{salt}")
    by_stage: dict[str, list[int]] = {}
    for number, event in enumerate(b.events, start=1):
        if not kinds or event.kind in kinds:
            by_stage.setdefault(event.stage, []).append(number)
    stages = sorted(by_stage.values(), key=len, reverse=True)
    for numbers in stages:
        rng.shuffle(numbers)
    picked = [
        numbers[i] for i in range(max(map(len, stages))) for numbers in stages if i < len(numbers)
    ][:count]
    return [(n, b.events[n - 1]) for n in sorted(picked)]


# ---- the faults ----------------------------------------------------------------------------------


def kills(b: Bench, fast: bool) -> Iterator[Try]:
    """SIGKILL everywhere."""
    for n, event in spread(b, 3 if fast else 66, salt="kill"):
        yield Try(
            f"kill -9 {event.stage}",
            f"event {n}, {event.kind}",
            partial(broken, b=b, codes=[-9], action=fp.kill(n)),
        )
    for n, event in spread(b, 1 if fast else 12, fp.TEARABLE, salt="tear"):
        name = f"event {n}, {event.kind} {event.stage}"
        yield Try(
            "kill -9 inside of a write: half of the file is there",
            name,
            partial(broken, b=b, codes=[-9], action=fp.tear(n)),
        )
    if fast:
        return
    rng = random.Random(f"{b.seed}/twice")
    for n, event in spread(b, 8, salt="twice"):
        again = rng.randrange(1, len(b.events) // 2)
        yield Try(
            "kill -9, and again in the resumed run",
            f"events {n}, {event.kind}, and {again}",
            partial(twice, b=b, first=n, second=again),
        )
    for _ in range(10):
        seconds = b.cpu_seconds * rng.random()
        work = partial(
            broken, b=b, codes=[-signal.SIGPROF, 0], before=partial(fp.die_after, seconds)
        )
        yield Try(
            "killed by the clock, between two instructions",
            f"after {seconds:.2f} s of CPU time",
            work,
        )


def twice(folder: Path, b: Bench, first: int, second: int) -> str | None:
    """Kill, resume, kill, resume."""
    run(b, folder, resume=False, action=fp.kill(first))
    ended = run(b, folder, resume=any(folder.glob("run*")), action=fp.kill(second))
    if ended.code not in (-9, 0):
        return f"resumed, it ended with {ended.code}: {last_line(ended.said)}"
    return difference(b.whole, folder) if ended.code == 0 else go_on(folder, b)


def signals(b: Bench, fast: bool) -> Iterator[Try]:
    """SIGTERM in each stage.

    Before the run is opened it is a kill; when all is done already, the run just ends.
    """
    for n, event in spread(b, 1 if fast else 24, salt="term"):
        codes = [143, 0] if event.stage != fp.LOADING else [143, 0, -signal.SIGTERM]
        work = partial(broken, b=b, codes=codes, action=fp.send(n, signal.SIGTERM))
        yield Try(f"SIGTERM {event.stage}", f"event {n}, {event.kind}", work)


def full_disks(b: Bench, fast: bool) -> Iterator[Try]:
    """No space left, at every write of a run and for all that come after it."""
    writes = [(n, e) for n, e in enumerate(b.events, start=1) if e.kind in fp.WRITES]
    for n, event in spread(b, 1, ("torch.save",), salt="full") if fast else writes:
        work = partial(broken, b=b, codes=[2, 3, 0], says="No space left", action=fp.full_disk(n))
        yield Try(f"disk full {event.stage}", f"event {n}, {event.kind}", work)
    # Only rank 0 writes rounds and weights; the largest files of another rank are random states.
    limits = (30_000, 100_000, 200_000) if b.rank == 0 else (1_000, 5_000, 10_000)
    for limit in () if fast else limits:
        work = partial(broken, b=b, codes=[2, 3], before=partial(fp.limit_file_size, limit))
        yield Try("a file that cannot grow (a real short write)", f"{limit} bytes", work)


def damages(b: Bench, fast: bool) -> Iterator[Try]:
    """The newest checkpoint, a file of it damaged."""
    files = sorted(p for p in (b.half / f"checkpoint-{STOPPED_AFTER}").rglob("*") if p.is_file())
    for how in ("missing", "cut", "one bit flipped"):
        for path in files:
            if not fast or (path.name, how) == ("rng_state.pth", "one bit flipped"):
                name = path.relative_to(b.half).as_posix()
                yield Try(
                    f"a file of the last checkpoint {how}",
                    name,
                    partial(damaged, b=b, name=name, how=how),
                )


def damaged(folder: Path, b: Bench, name: str, how: str) -> str | None:
    """Damage a file of the stopped run's checkpoint, and go on."""
    shutil.copytree(b.half, folder)
    path = folder / name
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        bit = random.Random(f"{b.seed}/{name}").randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
    lost = go_on(folder, b)
    if lost is None and not (folder / f"checkpoint-{STOPPED_AFTER}.incomplete").is_dir():
        return "the damage was not noticed"
    return lost


def slow(handler: Handler, asked: Any, number: int) -> None:
    """No answer in time."""
    time.sleep(1.0)


def hanging_up(handler: Handler, asked: Any, number: int) -> None:
    """Less than was announced."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"rewards"')


def always(status: int, body: bytes, **headers: str) -> Behaviour:
    """The same answer to all."""
    return lambda handler, asked, number: handler.answer(status, body, **headers)


# What a server does, and the exit code: a pause, or an error at once.
SERVERS: dict[str, tuple[Behaviour | None, int]] = {
    "is down": (None, PAUSED),
    "is slow": (slow, PAUSED),
    "hangs up": (hanging_up, PAUSED),
    "says 429": (always(429, b""), PAUSED),
    "says 500": (always(500, b"oh"), PAUSED),
    "says 503": (always(503, b""), PAUSED),
    "says 401": (always(401, b""), 2),
    "redirects": (always(302, b"", Location="http://127.0.0.1:1/"), 2),
    "sends HTML": (always(200, b"<html>no</html>"), 2),
    "sends too few": (always(200, b'{"rewards": []}'), 2),
    "sends NaN": (always(200, b'{"rewards": [NaN]}'), 2),
    "sends too much": (always(200, b" " * (2 << 20)), 2),
}


def servers(b: Bench, fast: bool) -> Iterator[Try]:
    """The reward server fails: at the first request, or after some good answers."""
    if fast:  # tests/test_paused_runs.py has one of these
        return
    for name, (behaviour, code) in SERVERS.items():
        for good in (0,) if behaviour is None else (0, 4):
            server = fp.Server(b.port, None if behaviour is None else after(good, behaviour))
            work = partial(broken, b=b, codes=[code], server=server, before=impatient)
            work = partial(alone, lock=b.base / "port.lock", work=work)
            yield Try(f"the reward server {name}", f"after {good} good answers", work)
    for name in ("says 429", "says 500", "hangs up"):
        work = partial(
            broken, b=b, codes=[0], server=fp.Server(b.port, but_for(3, SERVERS[name][0]))
        )
        work = partial(alone, lock=b.base / "port.lock", work=work)
        yield Try(
            f"the reward server {name} three times, then answers", "from the first request", work
        )


def alone(folder: Path, lock: Path, work: Callable[[Path], str | None]) -> str | None:
    """One try at a time.

    A reward's name holds the server's port, so that all of them need the same one.
    """
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        return work(folder)


def impatient() -> None:
    """Wait for a server for a moment only.

    Not by an option: those may not change when the run goes on.
    """
    resolve.DEFAULT_TIMEOUT = 0.3


def after(good: int, behaviour: Behaviour) -> Behaviour:
    """Good answers first."""

    def answer(handler: Any, asked: Any, number: int) -> None:
        (by_length if number < good else behaviour)(handler, asked, number)

    return answer


def but_for(bad: int, behaviour: Behaviour | None) -> Behaviour:
    """Bad answers first."""
    assert behaviour is not None

    def answer(handler: Any, asked: Any, number: int) -> None:
        (behaviour if number < bad else by_length)(handler, asked, number)

    return answer


def not_finite(b: Bench, fast: bool) -> Iterator[Try]:
    """NaN in a step, while a round is sampled, in a reward."""
    for what, says in (("weights", "nan"), ("loss", "nan"), ("gradient", "not finite")):
        for step in range(1, 5):
            if not fast or (what, step) == ("gradient", 3):
                work = partial(
                    broken, b=b, codes=[2], says=says, before=partial(poison, what, step)
                )
                yield Try(f"NaN in the {what} of a training step", f"step {step}", work)
    if fast:
        return
    for index in range(2):
        work = partial(
            broken, b=b, codes=[2], says="not finite", before=partial(poison_round, index)
        )
        yield Try("NaN in the weights while it samples", f"round {index + 1}", work)
    for call in (1, 4, 8):
        work = partial(broken, b=b, codes=[2], says="nan", before=partial(poison_reward, call))
        yield Try("NaN from a reward function", f"call {call}", work)


def poison(what: str, step: int) -> None:
    """Break the step's weights, loss or gradient in this process."""
    compute, total = NEATTrainer.compute_loss, neat_align.learning.step_engine.total_loss

    def poisoned(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        now = self.state.global_step + 1 == step
        weights = next(self.policy.parameters())
        if now and what == "weights":
            weights.data[:] = math.nan
        bad = now and what == "loss"
        neat_align.learning.step_engine.total_loss = (
            (lambda terms, **_: terms.ranking * math.nan) if bad else total
        )
        loss = compute(self, model, *args, **kwargs)
        if now and what == "gradient":
            weights.register_hook(lambda g: g * math.nan)
        return loss

    NEATTrainer.compute_loss = poisoned  # type: ignore[method-assign]


def poison_round(index: int) -> None:
    """Break the weights before a round is sampled."""
    make = NEATTrainer.make_round

    def poisoned(self: Any, number: int) -> Any:
        if number == index:
            next(self.policy.parameters()).data[:] = math.nan
        return make(self, number)

    NEATTrainer.make_round = poisoned  # type: ignore[method-assign]


def poison_reward(call: int) -> None:
    """Let the reward function give NaN in its n-th call."""
    reward, calls = fp.count_e, 0

    def poisoned(completions: Sequence[Any], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return [math.nan] * len(completions) if calls == call else reward(completions, **columns)

    poisoned.__name__ = "count_e"
    fp.count_e = poisoned


def two_writers(b: Bench, fast: bool) -> Iterator[Try]:
    """A second process on the run directory while the first one holds it."""
    # The lock is taken just before the run is opened.
    opening = max(n for n, e in enumerate(b.events, start=1) if e.stage == fp.OPENING)
    held = [(n, e) for n, e in spread(b, 40, salt="two") if n > opening]
    for n, event in held[:: len(held)] if fast else held[:: len(held) // 6]:
        yield Try(
            "a second process on the run directory",
            f"event {n}, {event.kind} {event.stage}",
            partial(second, b=b, at=n),
        )


def second(folder: Path, b: Bench, at: int) -> str | None:
    """Stop a run at an event, try to go on with it in another process, let the first one finish."""
    first = fp.start(b.base, folder, resume=False, action=fp.send(at, signal.SIGSTOP))
    os.waitpid(first, os.WUNTRACED)
    log = folder.with_suffix(".log")
    log.rename(log.with_suffix(".first"))
    intruder = run(b, folder, resume=True)
    os.kill(first, signal.SIGCONT)
    ended = fp.wait(first, folder)
    if intruder.code != 2 or f"being written by process {first}" not in intruder.said:
        return f"the second ended with {intruder.code}: {last_line(intruder.said)}"
    return f"the first ended with {ended.code}" if ended.code else difference(b.whole, folder)


FAULTS = (kills, signals, full_disks, damages, servers, not_finite, two_writers)
# Those that a run of several processes has, too; the others are rank 0's alone.
FAULTS_OF_SEVERAL = (kills, signals, full_disks, not_finite)
