"""A tiny run of `neat-align train` in a process of its own, with a fault at any of its events.

Events are counted in the order in which they happen, and a run without a fault always has the same
ones: a file opened for writing, synced, renamed, deleted or cut inside the run directory, a save of
torch or safetensors (before and after it), a forward pass, a reward's call, an optimizer step. A
fault is an action at the n-th of them. Processes are forked from one that has imported everything,
so that a run costs a second. A run of several processes has a fault in one of them; when one ends
badly, the others are ended, as torchrun does.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import harness
import torch
import transformers.modeling_utils
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers.models.llama.modeling_llama import LlamaModel

import neat_align.rounds.make_round
import neat_align.rounds.sampling_stage
from neat_align import NEATTrainer, pipeline
from neat_align.cli.app import PAUSED
from neat_align.cli.options import options_from
from neat_align.errors import NEATError, RewardUnavailableError
from neat_align.evaluation.drift_monitor import DriftMonitor
from neat_align.rewards import http
from neat_align.runs.run_directory import RunDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from reward_server import Behaviour, RewardServer
from tiny import save_tiny

# Two rounds of two steps; saves, log lines, batches of samples and accumulation steps fall apart.
OPTIONS: dict[str, Any] = {
    "holdout": 2,
    "num_positive": 1,
    "num_negative": 2,
    "num_plain": 1,
    "prompts_per_round": 4,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_prompt_length": 300,
    "max_completion_length": 6,
    "generation_batch_size": 6,
    "drift_prompts": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 3,
    "learning_rate": 1e-3,
    "instruction_bank": "politeness",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "seed": 1,
}
# How long the other processes of a run have to end by themselves, in seconds.
GRACE = 3.0
LOADING, OPENING, SAVING, BETWEEN = (
    "while it loads",
    "while it opens the run",
    "while it saves a checkpoint",
    "between stages",
)
# Stages of a run, by the function that is one.
STAGES = (
    (pipeline, "build_trainer", LOADING),
    (RunDirectory, "open", OPENING),
    (NEATTrainer, "evaluate", "in an evaluation"),
    (DriftMonitor, "measure_start", "while it measures drift"),
    (DriftMonitor, "measure", "while it measures drift"),
    (NEATTrainer, "make_round", "between sampling and scoring"),
    (neat_align.rounds.sampling_stage, "draw_samples", "while it samples"),
    (neat_align.rounds.make_round, "score_groups", "while it scores"),
    (NEATTrainer, "training_step", "in a training step"),
    (NEATTrainer, "_save_checkpoint", SAVING),
    (pipeline, "write_folder", "while it saves the model"),
    (pipeline, "write_report", "while it writes the report"),
)
# Events that put something new on the disk.
WRITES = ("open", "torch.save", "safetensors")
# Events of a file that is not under its name yet, or in a checkpoint without marker: only half of
# it may have reached the disk.
TEARABLE = ("fsync", "torch.save done", "safetensors done")

Action = Callable[[int, str, str, str], None]


@dataclass(frozen=True)
class Event:
    """What happened, in which stage."""

    kind: str
    stage: str


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    `code` is its exit code (minus a signal's number), `said` what it printed.
    """

    code: int
    said: str
    cpu_seconds: float


class _Events:
    """Counts events; silent until a process has begun."""

    def __init__(self) -> None:
        self.action: Action | None = None
        self.folder = ""
        self.number = 0
        self.stages = [BETWEEN]

    def happened(self, kind: str, path: str = "", stage: str | None = None) -> None:
        """Count an event and act; what the action itself does is none."""
        action = self.action
        if action is None:
            return
        self.number += 1
        self.action = None
        try:
            action(self.number, kind, stage or self.stages[-1], path)
        finally:
            self.action = action

    def audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Python's own report of what is done to files."""
        if self.action is None or name not in _AUDITED:
            return
        path = arguments[0]
        if isinstance(path, Path):
            path = str(path)
        if not isinstance(path, str) or not path.startswith(self.folder):
            return
        if name == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self.happened(_AUDITED[name], path)


_AUDITED = {
    "open": "open",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
    "os.truncate": "cut",
}
EVENTS = _Events()


def count_e(completions: Sequence[Any], **_: Any) -> list[float]:
    """The run's reward: how often the answer says e, which random text spreads over."""
    EVENTS.happened("reward")
    return [float(c[0]["content"].count("e")) + 0.01 * len(c[0]["content"]) for c in completions]


def _in_stage(owner: Any, name: str, stage: str) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        EVENTS.stages.append(stage)
        try:
            return function(*args, **kwargs)
        finally:
            EVENTS.stages.pop()

    setattr(owner, name, inside)


def _reporting(owner: Any, name: str, kind: str, *, path_at: int | None = None) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def reported(*args: Any, **kwargs: Any) -> Any:
        path = "" if path_at is None else str(args[path_at])
        EVENTS.happened(kind, path)
        found = function(*args, **kwargs)
        if path:
            EVENTS.happened(f"{kind} done", path)
        return found

    setattr(owner, name, reported)


def install() -> None:
    """Make this process and its children report their events. Once, and for good."""
    for owner, name, stage in STAGES:
        _in_stage(owner, name, stage)
    _reporting(torch, "save", "torch.save", path_at=1)
    _reporting(transformers.modeling_utils, "safe_save_file", "safetensors", path_at=1)
    _reporting(LlamaModel, "forward", "forward")
    register_optimizer_step_pre_hook(
        lambda *_: EVENTS.happened("optimizer step", stage="in a training step")
    )
    fsync = os.fsync

    def reported(descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if path.startswith(EVENTS.folder):
            EVENTS.happened("fsync", path)
        fsync(descriptor)

    os.fsync = reported  # type: ignore[assignment]
    sys.addaudithook(EVENTS.audit)
    # A failed request is sent again at once.
    http.RetryPolicy.pause = lambda self, failed, asked, rng: 0.0  # type: ignore[method-assign]


# ---- what can happen at an event ----


def kill(at: int) -> Action:
    """SIGKILL at the n-th event."""

    def action(number: int, kind: str, stage: str, path: str) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return action


def tear(at: int) -> Action:
    """Only half of the n-th event's file has reached the disk: then SIGKILL."""

    def action(number: int, kind: str, stage: str, path: str) -> None:
        if number == at:
            if Path(path).is_file():
                os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return action


def send(at: int, what: signal.Signals) -> Action:
    """A signal at the n-th event."""

    def action(number: int, kind: str, stage: str, path: str) -> None:
        if number == at:
            os.kill(os.getpid(), what)

    return action


def full_disk(at: int) -> Action:
    """From the n-th event on nothing new is written: the disk stays full."""

    def action(number: int, kind: str, stage: str, path: str) -> None:
        if number >= at and (kind in WRITES or kind == "fsync"):
            raise OSError(errno.ENOSPC, "No space left on device", path)

    return action


def record(into: Path) -> Action:
    """Write every event to a file, a line each."""
    file = into.open("w", encoding="utf-8", buffering=1)

    def action(number: int, kind: str, stage: str, path: str) -> None:
        file.write(json.dumps([kind, stage]) + "\n")

    return action


def nothing(number: int, kind: str, stage: str, path: str) -> None:
    """No fault."""


# ---- a process ----


def prepare(base: Path) -> None:
    """Write the model and the data that all runs under `base` use."""
    save_tiny(base / "model", "llama")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What do you say to number {i}?"}],
            "chosen": [{"role": "assistant", "content": f"thank you {i}"}],
            "rejected": [{"role": "assistant", "content": f"I hate {i}"}],
        }
        for i in range(14)
    ]
    (base / "data.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )


@dataclass(frozen=True)
class Server:
    """A reward server inside of the process; `behaviour` None is one that is down."""

    port: int
    behaviour: Behaviour | None


def start(
    base: Path,
    folder: Path,
    *,
    resume: bool,
    action: Action = nothing,
    server: Server | None = None,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
    processes: int = 1,
    rank: int = 0,
) -> int:
    """Fork a process that runs `neat-align train` into `folder`; gives its id.

    `before` is called in it first, `after` last. With several `processes` it is their launcher,
    and `action`, `before` and `after` are for the one of that rank.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        if processes > 1:
            _launch(base, folder, processes, rank, resume, action, server, before, after)
        _be_a_rank(base, folder, 0, resume, action, server, before, after)
    return child


def _launch(
    base: Path,
    folder: Path,
    processes: int,
    rank: int,
    resume: bool,
    *how: Any,
) -> NoReturn:
    """Be the launcher of so many processes; `how` is for the one of that rank."""
    port = harness.free_port()
    ranks: dict[int, int] = {}
    for r in range(processes):
        own = os.fork()
        if not own:
            os.environ |= {
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            well = (nothing, None, lambda: None, lambda: None)
            _be_a_rank(base, folder, r, resume, *(how if r == rank else well))
        ranks[own] = r
    _end_as(_watch(ranks))


def _watch(ranks: dict[int, int]) -> int:
    """Wait for processes; the first bad end ends all. Gives its code (minus a signal's number)."""
    worst, until = 0, float("inf")
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ranks.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not worst:
                worst, until = code, time.monotonic() + GRACE
                for other in ranks:
                    os.kill(other, signal.SIGTERM)
            continue
        if time.monotonic() > until:
            until = float("inf")
            for other in ranks:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    return worst


def _end_as(code: int) -> NoReturn:
    """End as another process did."""
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _be_a_rank(
    base: Path,
    folder: Path,
    rank: int,
    resume: bool,
    action: Action,
    server: Server | None,
    before: Callable[[], None],
    after: Callable[[], None],
) -> NoReturn:
    """Run, and end this process."""
    log = _log_of(folder, rank)
    code = 3
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = _train(base, folder, resume, action, server, before)
        after()
    except BaseException:  # noqa: BLE001 - a process ends here, however it ends
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(
    base: Path,
    folder: Path,
    resume: bool,
    action: Action,
    server: Server | None,
    before: Callable[[], None],
) -> int:
    reward = "fault_points:count_e" if server is None else f"http://127.0.0.1:{server.port}/score"
    names = {
        "model_name_or_path": str(base / "model"),
        "dataset_name": str(base / "data.jsonl"),
        "output_dir": str(folder),
    }
    shares: dict[str, Any] = {}
    if "WORLD_SIZE" in os.environ:  # the same steps, in as many shares
        shares = {
            "gradient_accumulation_steps": 2 // int(os.environ["WORLD_SIZE"]),
            "ddp_backend": "gloo",
        }
    settings, config = options_from(
        {**OPTIONS, **shares, **names, "reward_funcs": [reward], "resume": resume}
    )
    EVENTS.folder = str(folder) + os.sep
    EVENTS.action = action
    before()
    try:
        if server is None or server.behaviour is None:
            pipeline.run_training(settings, config)
        else:
            with RewardServer(server.behaviour, port=server.port):
                pipeline.run_training(settings, config)
        return 0
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except RewardUnavailableError as error:
        print(f"paused: {error}", file=sys.stderr)
        return PAUSED
    except NEATError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _log_of(folder: Path, rank: int) -> Path:
    return folder.with_suffix(f".log{rank}" if rank else ".log")


def wait(child: int, folder: Path) -> Ended:
    """Wait for a process to end."""
    _, status, used = os.wait4(child, 0)
    logs = sorted(folder.parent.glob(f"{folder.name}.log*"))
    said = "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)
    return Ended(os.waitstatus_to_exitcode(status), said, used.ru_utime + used.ru_stime)


def run(base: Path, folder: Path, **how: Any) -> Ended:
    """`start`, and `wait`."""
    return wait(start(base, folder, **how), folder)


def limit_file_size(limit: int) -> None:
    """No file of this process grows over so many bytes: real short writes, in C++ and Rust, too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def die_after(cpu_seconds: float) -> None:
    """End this process, as suddenly as by SIGKILL, when it has used so much CPU time."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, max(1e-3, cpu_seconds))
