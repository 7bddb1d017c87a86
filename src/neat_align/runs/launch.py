"""What a launcher (torchrun, accelerate launch) tells its processes, and what follows from it for a
run: how they meet, which of them speaks, and whether this start is the launcher's own restart.
"""

from __future__ import annotations

import functools
import os
import socket
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from neat_align.errors import NEATError
from neat_align.files.atomic import read_json, write_json
from neat_align.runs.lock import LOCK_FILE

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

LAUNCH_FILE = "launch.json"
# The files of which one is there as soon as a run has begun; `rounds` is a folder.
_MARKS = ("rounds", "run.json", "run-key.json", LOCK_FILE)
# How long the processes of a launch may take to begin: disks of other machines may be slower.
_MEETING_TIMEOUT = timedelta(minutes=10)
_LOOK_SECONDS = 0.02


def rank() -> int:
    """This process's number among those that were launched together; 0 alone."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes were launched together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@functools.cache
def store() -> Store | None:
    """The launcher's key-value store, with keys of this start alone; None where there is none.

    All processes of a launch have to call it once, before there is a process group.

    torch's launcher (2.13) keeps one store for all its starts, in which processes find each other's
    addresses: after a restart, one that looks before the others have written theirs connects to a
    dead one, and fails or waits (pytorch/pytorch#135712). How often it started is no help, since
    nodes count for themselves. So the processes meet here first, by names that nobody has used
    before; from the second start on they leave the launcher's store to rank 0's own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = PrefixStore(
        "neat-align", TCPStore(host, port, is_master=False, timeout=_MEETING_TIMEOUT)
    )
    start, own_port = _gather_all(shared) if rank() == 0 else _report(shared)
    if own_port:
        os.environ["MASTER_PORT"] = str(own_port)
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    return PrefixStore(f"start-{start}", shared)


def _gather_all(shared: Store) -> tuple[int, int]:
    """On rank 0: the number of this start, and the port of a store of its own from the second on.

    Answers every name that is found, a dead process's too, until all processes have thanked.
    """
    start, own_port = int(shared.add("starts", 1)), 0
    if start > 1:
        with socket.socket() as free:
            free.bind(("", 0))
            own_port = int(free.getsockname()[1])
    missing, answered = set(range(1, processes())), set[str]()
    give_up = time.monotonic() + _MEETING_TIMEOUT.total_seconds()
    while missing:
        for other in sorted(missing):
            if shared.check([f"thanks-{start}-{other}"]):
                missing.discard(other)
            elif shared.check([f"name-{other}"]):
                name = shared.get(f"name-{other}").decode()
                if name not in answered:
                    shared.set(f"answer-{name}", f"{start} {own_port}")
                    answered.add(name)
        if missing and time.monotonic() > give_up:
            raise NEATError(
                f"{len(missing)} of {processes()} processes were not heard of within "
                f"{_MEETING_TIMEOUT} (the first: rank {min(missing)}): look at their output, and "
                "whether their machines reach this one"
            )
        time.sleep(_LOOK_SECONDS)
    return start, own_port


def _report(shared: Store) -> tuple[int, int]:
    """On the other ranks: ask rank 0 under a name that nobody has used before."""
    name = uuid.uuid4().hex
    shared.set(f"name-{rank()}", name)
    start, own_port = map(int, shared.get(f"answer-{name}").split())
    shared.set(f"thanks-{start}-{rank()}", "")
    return start, own_port


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in the folder, however early it ended."""
    return any((folder / name).exists() for name in _MARKS)


def note_launch(folder: Path) -> None:
    """Write down which launch works on the run, for `is_restart` after a crash. On one rank."""
    mine = _launch()
    if mine is None:
        (folder / LAUNCH_FILE).unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / LAUNCH_FILE, mine)


def is_restart(folder: Path) -> bool:
    """Whether this very launcher's processes worked on the run in the folder before this start.

    A launcher starts its processes again whatever ended them, also a refusal to write into a folder
    that is not empty: what is there is only gone on with when this launch is known to have made it.
    """
    mine = _launch()
    if mine is None or not (folder / LAUNCH_FILE).is_file():
        return False
    return bool(read_json(folder / LAUNCH_FILE) == mine)


def _launch() -> dict[str, str | int] | None:
    """What tells this launcher, the parent of its processes, from any other; None without one that
    starts its processes again.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    launcher = os.getppid()
    stat = Path(f"/proc/{launcher}/stat")  # process ids are used again, in a container within days
    # The name, in parentheses, may hold blanks; the 20th word after it is the start, in ticks.
    since = stat.read_text("utf-8").rpartition(")")[2].split()[19] if stat.is_file() else ""
    host = socket.gethostname()
    return {"run_id": run_id, "host": host, "launcher": launcher, "since": since}
