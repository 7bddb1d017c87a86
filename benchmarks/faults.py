"""What survives what? A tiny run is broken in every way below, gone on with, and compared with the run that nobody broke.

    python benchmarks/faults.py --json OUT [--fast] [--jobs N] [--only WORDS]

A try is lost when the run cannot be gone on with, when the fault is not noticed where it has to be, or when anything that the finished
run holds differs from the unbroken run's: the weights (bytes of the saved model), the files of the rounds, every line of
metrics.jsonl (but for times), the evaluations, the result. Points are drawn with --seed among a run's events (`fault_points`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fault_points as fp
import harness
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import neat_align.group_trainer
from neat_align import NEATTrainer
from neat_align.cli import PAUSED
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
    """What tries share: the unbroken run and its events, a run that was stopped after its third step, a free port."""

    base: Path
    whole: dict[str, Any]
    events: Sequence[fp.Event]
    cpu_seconds: float
    half: Path
    port: int
    whole_http: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class Try:
    """One fault. `work` is given a folder that is not there yet, and says why the try is lost, or None."""

    fault: str
    name: str
    work: Callable[[Path], str | None]


# ---- comparing -------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on how it came about."""
    found: dict[str, Any] = {}
    for pattern in ("rounds/?????/*", "model/*", "evaluation-*.json", "drift-start.json"):
        found |= {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob(pattern) if p.is_file() and p.name not in OWN}
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found["metrics.jsonl"] = [{k: v for k, v in json.loads(line).items() if not k.endswith(TIMES)} for line in lines]
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
    other = sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))
    return f"other than unbroken: {', '.join(other)}" if other else None


def last_line(text: str) -> str:
    """The end of what a process said, for a report of a lost try."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def go_on(folder: Path, b: Bench, server: fp.Server | None = None) -> str | None:
    """Resume the run, or start it where nothing had begun, and compare. What is lost, or None."""
    ended = fp.run(b.base, folder, resume=True, server=server)
    if ended.code == 2 and NO_RUN_YET in ended.said:
        ended = fp.run(b.base, folder, resume=False, server=server)
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
    """Run with a fault; it must end with one of the codes, and say `says` where that is not 0. Then go on, and compare."""
    ended = fp.run(b.base, folder, resume=False, action=action, server=server, before=before)
    if ended.code not in codes:
        return f"it ended with {ended.code}, not {list(codes)}: {last_line(ended.said)}"
    if ended.code == 0:
        return difference(b.whole if server is None else b.whole_http, folder)
    if says not in ended.said:
        return f"it did not say {says!r}: {last_line(ended.said)}"
    return go_on(folder, b, None if server is None else fp.Server(server.port, by_length))


# ---- where ------------------------------------------------------------------------------------------------------------


def spread(b: Bench, count: int, kinds: Sequence[str] = (), salt: str = "") -> list[tuple[int, fp.Event]]:
    """So many events, drawn with the seed and as even over the stages as there are; `kinds` () means any."""
    rng = random.Random(f"{b.seed}/{salt}")
    by_stage: dict[str, list[int]] = {}
    for number, event in enumerate(b.events, start=1):
        if not kinds or event.kind in kinds:
            by_stage.setdefault(event.stage, []).append(number)
    for numbers in by_stage.values():
        rng.shuffle(numbers)
    picked: list[int] = []
    while len(picked) < count and any(by_stage.values()):
        for numbers in by_stage.values():
            if numbers and len(picked) < count:
                picked.append(numbers.pop())
    return [(n, b.events[n - 1]) for n in sorted(picked)]


# ---- the faults -------------------------------------------------------------------------------------------------------


def kills(b: Bench, fast: bool) -> Iterator[Try]:
    """SIGKILL everywhere."""
    for n, event in spread(b, 3 if fast else 66, salt="kill"):
        yield Try(f"kill -9 {event.stage}", f"event {n}, {event.kind}", partial(broken, b=b, codes=[-9], action=fp.kill(n)))
    for n, event in spread(b, 1 if fast else 12, fp.TEARABLE, salt="tear"):
        name = f"event {n}, {event.kind} {event.stage}"
        yield Try("kill -9 inside of a write: half of the file is there", name, partial(broken, b=b, codes=[-9], action=fp.tear(n)))
    if fast:
        return
    rng = random.Random(f"{b.seed}/twice")
    for n, event in spread(b, 8, salt="twice"):
        again = rng.randrange(1, len(b.events) // 2)
        yield Try(
            "kill -9, and again in the resumed run", f"events {n}, {event.kind}, and {again}", partial(twice, b=b, first=n, second=again)
        )
    for _ in range(10):
        seconds = b.cpu_seconds * rng.random()
        work = partial(broken, b=b, codes=[-signal.SIGPROF, 0], before=partial(fp.die_after, seconds))
        yield Try("killed by the clock, between two instructions", f"after {seconds:.2f} s of CPU time", work)


def twice(folder: Path, b: Bench, first: int, second: int) -> str | None:
    """Kill, resume, kill, resume."""
    fp.run(b.base, folder, resume=False, action=fp.kill(first))
    ended = fp.run(b.base, folder, resume=any(folder.glob("run*")), action=fp.kill(second))
    if ended.code not in (-9, 0):
        return f"resumed, it ended with {ended.code}: {last_line(ended.said)}"
    return difference(b.whole, folder) if ended.code == 0 else go_on(folder, b)


def signals(b: Bench, fast: bool) -> Iterator[Try]:
    """SIGTERM in each stage. Before the run is opened it is a kill; when all is done already, the run just ends."""
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
    for limit in () if fast else (30_000, 100_000, 200_000):
        work = partial(broken, b=b, codes=[2, 3], before=partial(fp.limit_file_size, limit))
        yield Try("a file that cannot grow (a real short write)", f"{limit} bytes", work)


def damages(b: Bench, fast: bool) -> Iterator[Try]:
    """The newest checkpoint, a file of it damaged."""
    files = sorted(p for p in (b.half / f"checkpoint-{STOPPED_AFTER}").rglob("*") if p.is_file())
    for how in ("missing", "cut", "one bit flipped"):
        for path in files:
            if not fast or (path.name, how) == ("rng_state.pth", "one bit flipped"):
                name = path.relative_to(b.half).as_posix()
                yield Try(f"a file of the last checkpoint {how}", name, partial(damaged, b=b, name=name, how=how))


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
        for good in (0,) if behaviour is None else (0, 1, 4, 6):
            server = fp.Server(b.port, None if behaviour is None else after(good, behaviour))
            work = partial(broken, b=b, codes=[code], server=server, before=impatient)
            yield Try(f"the reward server {name}", f"after {good} good answers", work)
    for name in ("says 429", "says 500", "hangs up"):
        work = partial(broken, b=b, codes=[0], server=fp.Server(b.port, but_for(3, SERVERS[name][0])))
        yield Try(f"the reward server {name} three times, then answers", "from the first request", work)


def impatient() -> None:
    """Wait for a server a tenth of a second only; in a run that nobody compares times of."""
    resolve.DEFAULT_TIMEOUT = 0.3


def after(good: int, behaviour: Behaviour) -> Behaviour:
    """Good answers first."""
    return lambda handler, asked, number: (by_length if number < good else behaviour)(handler, asked, number)


def but_for(bad: int, behaviour: Behaviour | None) -> Behaviour:
    """Bad answers first."""
    assert behaviour is not None
    return lambda handler, asked, number: (behaviour if number < bad else by_length)(handler, asked, number)


def not_finite(b: Bench, fast: bool) -> Iterator[Try]:
    """NaN in a step, while a round is sampled, in a reward."""
    for what, says in (("weights", "nan"), ("loss", "nan"), ("gradient", "not finite")):
        for step in range(1, 5):
            if not fast or (what, step) == ("gradient", 3):
                work = partial(broken, b=b, codes=[2], says=says, before=partial(poison, what, step))
                yield Try(f"NaN in the {what} of a training step", f"step {step}", work)
    if fast:
        return
    for index in range(2):
        work = partial(broken, b=b, codes=[2], says="not finite", before=partial(poison_round, index))
        yield Try("NaN in the weights while it samples", f"round {index + 1}", work)
    for call in (1, 4, 8):
        work = partial(broken, b=b, codes=[2], says="nan", before=partial(poison_reward, call))
        yield Try("NaN from a reward function", f"call {call}", work)


def poison(what: str, step: int) -> None:
    """Break the step's weights, loss or gradient in this process."""
    compute, total = NEATTrainer.compute_loss, neat_align.group_trainer.total_loss

    def poisoned(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        now = self.state.global_step + 1 == step
        weights = next(self.policy.parameters())
        if now and what == "weights":
            weights.data[:] = math.nan
        bad = now and what == "loss"
        neat_align.group_trainer.total_loss = (lambda terms, **_: terms.ranking * math.nan) if bad else total
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
    held = [(n, e) for n, e in spread(b, 40, salt="two") if e.stage not in (fp.LOADING, fp.OPENING)]
    for n, event in held[:: len(held)] if fast else held[:: len(held) // 6]:
        yield Try("a second process on the run directory", f"event {n}, {event.kind} {event.stage}", partial(second, b=b, at=n))


def second(folder: Path, b: Bench, at: int) -> str | None:
    """Stop a run at an event, try to go on with it in another process, let the first one finish."""
    first = fp.start(b.base, folder, resume=False, action=fp.send(at, signal.SIGSTOP))
    os.waitpid(first, os.WUNTRACED)
    log = folder.with_suffix(".log")
    log.rename(log.with_suffix(".first"))
    intruder = fp.run(b.base, folder, resume=True)
    os.kill(first, signal.SIGCONT)
    ended = fp.wait(first, folder)
    if intruder.code != 2 or f"being written by process {first}" not in intruder.said:
        return f"the second ended with {intruder.code}: {last_line(intruder.said)}"
    return f"the first ended with {ended.code}" if ended.code else difference(b.whole, folder)


FAULTS = (kills, signals, full_disks, damages, servers, not_finite, two_writers)


# ---- the script -------------------------------------------------------------------------------------------------------


def make_bench(base: Path, seed: int, fast: bool) -> Bench:
    """The runs that tries are compared with, and start from."""
    fp.prepare(base)
    fp.install()
    events_file, modules = base / "events.jsonl", base / "modules.json"
    for name in ("first", "whole"):
        # The first run tells what it imported, so that all that follow find it in place; two say whether runs are alike.
        if fast and name == "first":
            continue
        action, after = fp.record(events_file), partial(write_modules, modules)
        ended = fp.run(base, base / name, resume=False, action=action, after=after)
        check(ended)
        for module in json.loads(modules.read_text(encoding="utf-8")):
            if module not in sys.modules and module.split(".")[0] in (
                "datasets",
                "jinja2",
                "neat_align",
                "pandas",
                "pyarrow",
                "transformers",
            ):
                importlib.import_module(module)
    events = [fp.Event(*json.loads(line)) for line in events_file.read_text(encoding="utf-8").splitlines()]
    found = contents(base / "whole")
    differs = None if fast else difference(found, base / "first")
    if differs is not None:
        raise SystemExit(f"two runs without a fault are not the same, so nothing can be compared: {differs}")
    half = base / "half"
    saves = [n for n, e in enumerate(events, start=1) if e.stage == fp.SAVING and e.kind == "torch.save"]
    stopped = fp.run(base, half, resume=False, action=fp.send(saves[len(saves) * (STOPPED_AFTER - 1) // 4], signal.SIGTERM))
    if stopped.code != 143 or not (half / f"checkpoint-{STOPPED_AFTER}").is_dir():
        raise SystemExit(f"the run that was to stop after step {STOPPED_AFTER} ended with {stopped.code}: {last_line(stopped.said)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    whole_http: dict[str, Any] = {}
    if not fast:
        check(fp.run(base, base / "http", resume=False, server=fp.Server(port, by_length)))
        whole_http = contents(base / "http")
    return Bench(base, found, events, ended.cpu_seconds, half, port, whole_http, seed)


def write_modules(path: Path) -> None:
    """What this process has imported."""
    path.write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")


def check(ended: fp.Ended) -> None:
    """The run without a fault must end well."""
    if ended.code != 0:
        raise SystemExit(f"the run without a fault ended with {ended.code}:\n{ended.said[-3000:]}")


def outcomes(b: Bench, tries: Sequence[Try], jobs: int) -> Iterator[tuple[int, str | None]]:
    """(number of the try, why it is lost or None), as they end. Tries are shared out to so many processes."""
    reading, writing = os.pipe()
    workers = []
    for job in range(jobs):
        worker = os.fork()
        if worker == 0:
            os.close(reading)
            for number in range(job, len(tries), jobs):
                folder = b.base / f"try-{number}"
                try:
                    why = tries[number].work(folder)
                except Exception as error:  # noqa: BLE001 - one try is lost, not all that follow
                    why = f"{type(error).__name__}: {error}"
                shutil.rmtree(folder, ignore_errors=True)
                os.write(writing, (json.dumps([number, why and why[:500]]) + "\n").encode())
            os._exit(0)
        workers.append(worker)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as lines:
        for line in lines:
            number, why = json.loads(line)
            yield number, why
    for worker in workers:
        os.waitpid(worker, 0)


def table(tries: Sequence[Try], ended: dict[int, str | None]) -> list[dict[str, Any]]:
    """A row a fault."""
    rows: dict[str, dict[str, Any]] = {}
    for number, why in sorted(ended.items()):
        row = rows.setdefault(tries[number].fault, {"fault": tries[number].fault, "tried": 0, "lost": 0})
        row["tried"] += 1
        row["lost"] += why is not None
    return list(rows.values())


def main() -> None:
    """All faults, a table, a result file; exit code 1 when anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result file goes")
    parser.add_argument("--seed", type=int, default=0, help="which points are drawn")
    parser.add_argument("--fast", action="store_true", help="a few tries of each kind")
    parser.add_argument("--jobs", type=int, default=1, help="tries at a time")
    parser.add_argument("--only", default="", help="only the faults whose words these are (a regular expression)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="no try begins later; the rest is not tried, and the result says so"
    )
    a = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="neat-align-faults-") as folder:
        b = make_bench(Path(folder).resolve(), a.seed, a.fast)
        tries = [t for fault in FAULTS for t in fault(b, a.fast) if re.search(a.only, t.fault)]
        until = started + 60 * a.minutes
        # Cut short, a run of all faults has still seen some of each.
        order = random.Random(a.seed).sample(tries, len(tries))
        ended: dict[int, str | None] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("faults", total=len(order))
            for number, why in outcomes(b, [Try(t.fault, t.name, until_then(t.work, until)) for t in order], a.jobs):
                progress.update(task, advance=1, description=order[number].fault)
                if why == NOT_TRIED:
                    continue
                ended[number] = why
                if why is not None:
                    progress.console.print(f"lost: {order[number].fault} ({order[number].name}): {why}", markup=False)
    by_kind = {t.fault: i for i, t in reversed(list(enumerate(tries)))}
    rows = sorted(table(order, ended), key=lambda row: by_kind[row["fault"]])
    harness.show("what was broken", ["fault", "tried", "lost"], [[r["fault"], str(r["tried"]), str(r["lost"])] for r in rows])
    lost = [{"fault": order[n].fault, "try": order[n].name, "why": why} for n, why in sorted(ended.items()) if why is not None]
    facts = {"seed": a.seed, "events": len(b.events), "planned": len(tries), "tried": len(ended), "seconds": time.monotonic() - started}
    harness.save(a.json, {**facts, "rows": rows, "lost": lost})
    sys.exit(1 if lost or not ended else 0)


NOT_TRIED = "not tried"


def until_then(work: Callable[[Path], str | None], until: float) -> Callable[[Path], str | None]:
    """The work, while there is time."""
    return lambda folder: work(folder) if time.monotonic() < until else NOT_TRIED


if __name__ == "__main__":
    main()
