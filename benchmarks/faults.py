"""What survives what? A tiny run is broken in every way below, and gone on with.

Then it is compared with the run that nobody broke.

    python benchmarks/faults.py --json OUT [--fast] [--jobs N] [--only WORDS] [--processes N]

A try is lost when the run cannot be gone on with, when the fault is not noticed where it has to be,
or when anything that the finished run holds differs from the unbroken run's: the weights (bytes of
the saved model), the files of the rounds, every line of metrics.jsonl (but for times), the
evaluations, the result. Points are drawn with --seed among a run's events (`fault_points`).
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
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import Any

import fault_points as fp
import harness
import torch
from fault_kinds import (
    FAULTS,
    FAULTS_OF_SEVERAL,
    STOPPED_AFTER,
    Bench,
    Try,
    contents,
    difference,
    last_line,
)
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from reward_server import by_length

# What a run imports only on its way: once imported in the parent, it is there in all runs that
# follow.
IMPORTED_LATE = ("datasets", "jinja2", "neat_align", "pandas", "pyarrow", "transformers")
# The outcome of a try for which there was no time.
NOT_TRIED = "not tried"


def make_benches(base: Path, seed: int, fast: bool, processes: int) -> list[Bench]:
    """The runs that tries are compared with, and start from; a bench for each rank to strike."""
    fp.prepare(base)
    fp.install()
    modules = base / "modules.json"
    names = ["whole"] if fast and processes == 1 else ["first", "whole"]
    events: list[list[fp.Event]] = []
    for rank in range(processes):
        events_file = base / f"events-{rank}.jsonl"
        for name in names if rank == 0 else ["whole-again"]:
            # The first run tells what it imported, so that all that follow find it in place; two
            # say whether runs are alike.
            action, after = fp.record(events_file), partial(write_modules, modules)
            how: dict[str, Any] = {"action": action, "after": after, "rank": rank}
            ended = fp.run(base, base / name, resume=False, processes=processes, **how)
            check(ended)
            for module in json.loads(modules.read_text(encoding="utf-8")):
                if module not in sys.modules and module.split(".")[0] in IMPORTED_LATE:
                    importlib.import_module(module)
        lines = events_file.read_text(encoding="utf-8").splitlines()
        events.append([fp.Event(*json.loads(line)) for line in lines])
    found = contents(base / "whole")
    differs = difference(found, base / names[0])
    if differs is not None:
        raise SystemExit(
            f"two runs without a fault are not the same, so nothing can be compared: {differs}"
        )
    half = base / "half"
    saves = [
        n
        for n, e in enumerate(events[0], start=1)
        if e.stage == fp.SAVING and e.kind == "torch.save"
    ]
    stopped = fp.run(
        base,
        half,
        resume=False,
        action=fp.send(saves[len(saves) * (STOPPED_AFTER - 1) // 4], SIGTERM),
        processes=processes,
    )
    if stopped.code != 143 or not (half / f"checkpoint-{STOPPED_AFTER}").is_dir():
        raise SystemExit(
            f"the run that was to stop after step {STOPPED_AFTER} ended with {stopped.code}: "
            f"{last_line(stopped.said)}"
        )
    port = harness.free_port()
    whole_http: dict[str, Any] = {}
    if not fast and processes == 1:
        check(fp.run(base, base / "http", resume=False, server=fp.Server(port, by_length)))
        whole_http = contents(base / "http")
    return [
        Bench(base, found, own, ended.cpu_seconds, half, port, whole_http, seed, processes, rank)
        for rank, own in enumerate(events)
    ]


def write_modules(path: Path) -> None:
    """What this process has imported."""
    path.write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")


def check(ended: fp.Ended) -> None:
    """The run without a fault must end well."""
    if ended.code != 0:
        raise SystemExit(f"the run without a fault ended with {ended.code}:\n{ended.said[-3000:]}")


def start_workers(b: Bench, tries: Sequence[Try], jobs: int) -> int:
    """Share the tries out to so many processes. Gives a descriptor to read their outcomes from."""
    reading, writing = os.pipe()
    for job in range(jobs):
        if os.fork() == 0:
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
    os.close(writing)
    return reading


def outcomes(tries: Sequence[Try], reading: int) -> dict[int, str | None]:
    """By the number of a try, why it is lost or None; what was not tried is left out.

    Shows how far it is.
    """
    ended: dict[int, str | None] = {}
    heard = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress, os.fdopen(reading, encoding="utf-8") as lines:
        task = progress.add_task("faults", total=len(tries))
        for line in lines:
            number, why = json.loads(line)
            heard += 1
            progress.update(task, advance=1, description=tries[number].fault)
            if why == NOT_TRIED:
                continue
            ended[number] = why
            if why is not None:
                progress.console.print(
                    f"lost: {tries[number].fault} ({tries[number].name}): {why}", markup=False
                )
    if heard < len(tries):
        raise SystemExit(
            f"{len(tries) - heard} tries never said how they ended: a process that ran them died"
        )
    return ended


def table(tries: Sequence[Try], ended: dict[int, str | None]) -> list[dict[str, Any]]:
    """A row a fault."""
    rows: dict[str, dict[str, Any]] = {}
    for number, why in sorted(ended.items()):
        row = rows.setdefault(
            tries[number].fault, {"fault": tries[number].fault, "tried": 0, "lost": 0}
        )
        row["tried"] += 1
        row["lost"] += why is not None
    return list(rows.values())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the result file goes")
    parser.add_argument("--seed", type=int, default=0, help="which points are drawn")
    parser.add_argument("--fast", action="store_true", help="a few tries of each kind")
    parser.add_argument("--jobs", type=int, default=1, help="tries at a time")
    parser.add_argument("--processes", type=int, default=1, help="of every run: 1 or 2")
    parser.add_argument(
        "--only", default="", help="only the faults whose words these are (a regular expression)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="no try begins later; the rest is not tried, and the result says so",
    )
    return parser.parse_args()


def main() -> None:
    """All faults, a table, a result file; exit code 1 when anything was lost."""
    a = arguments()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="neat-align-faults-") as folder:
        benches = make_benches(Path(folder).resolve(), a.seed, a.fast, a.processes)
        b = benches[0]
        faults = FAULTS if a.processes == 1 else FAULTS_OF_SEVERAL
        planned = [
            t
            for bench in benches
            for fault in faults
            for t in in_rank(bench, fault(bench, a.fast))
            if re.search(a.only, t.fault)
        ]
        until = started + 60 * a.minutes
        # In any order: cut short, it has still seen some of each.
        tries = [
            replace(t, work=until_then(t.work, until))
            for t in random.Random(a.seed).sample(planned, len(planned))
        ]
        # Before the bar, whose lock a forked process could find taken for ever.
        reading = start_workers(b, tries, a.jobs)
        ended = outcomes(tries, reading)
    by_kind = {t.fault: i for i, t in reversed(list(enumerate(planned)))}
    rows = sorted(table(tries, ended), key=lambda row: by_kind[row["fault"]])
    harness.show(
        "what was broken",
        ["fault", "tried", "lost"],
        [[r["fault"], str(r["tried"]), str(r["lost"])] for r in rows],
    )
    lost = [
        {"fault": tries[n].fault, "try": tries[n].name, "why": why}
        for n, why in sorted(ended.items())
        if why is not None
    ]
    facts = {
        "seed": a.seed,
        "processes": a.processes,
        "events": len(b.events),
        "planned": len(tries),
        "tried": len(ended),
        "seconds": time.monotonic() - started,
    }
    harness.save(a.json, {**facts, "rows": rows, "lost": lost})
    sys.exit(1 if lost or not ended else 0)


def in_rank(b: Bench, tries: Iterable[Try]) -> Iterator[Try]:
    """The tries, with the process that is struck in their names, where there are several."""
    for t in tries:
        where = f"{t.fault}, in process {b.rank} of {b.processes}"
        yield t if b.processes == 1 else replace(t, fault=where)


def until_then(work: Callable[[Path], str | None], until: float) -> Callable[[Path], str | None]:
    """The work, while there is time."""
    return lambda folder: work(folder) if time.monotonic() < until else NOT_TRIED


if __name__ == "__main__":
    main()
