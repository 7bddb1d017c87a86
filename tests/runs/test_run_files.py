"""What a run keeps on the disk, without a model: lock, signals, checkpoints, batches, alarms, the
key of a run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from file_locks import NO_LOCKS, no_locks
from neat_align import NEATConfig
from neat_align.errors import ConfigError, RunInterrupted, SaveError
from neat_align.files.atomic import cut_to, write_folder
from neat_align.learning.alarms import Alarms
from neat_align.rounds.sampling_stage import even_batches
from neat_align.runs.checkpoints import (
    MARKER,
    checkpoint_to_resume,
    is_complete,
    mark_complete,
    rotate,
    unmark,
)
from neat_align.runs.lock import HELD_FILE, LOCK_FILE, one_writer
from neat_align.runs.ranks import Ranks
from neat_align.runs.resume_state import ResumeState, read_resume_state, write_resume_state
from neat_align.runs.run_key import check_same_run, key_changes, new_split, run_key, write_key
from neat_align.runs.signals import StopRequest, interrupted, listening

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
HOLD = "import sys, time; from pathlib import Path; from neat_align.runs.lock import one_writer\n"


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


# ---- one writer ----------------------------------------------------------------------------------


@pytest.fixture(params=["locks", "no locks"])
def preamble(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Code for a second process, on a file system with locks or, as this one, without them."""
    if request.param == "locks":
        return HOLD

    monkeypatch.setattr(fcntl, "flock", no_locks)
    return NO_LOCKS + HOLD


def holding(preamble: str, run_dir: Path) -> subprocess.Popen[str]:
    """A second process that holds the lock, and does until it is stopped."""
    code = preamble + (
        "with one_writer(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    holder = python(code, str(run_dir))
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_is_refused_by_name_and_a_killed_one_is_no_hindrance(
    tmp_path: Path, preamble: str
) -> None:
    holder = holding(preamble, tmp_path)
    for _ in range(2):  # the refused attempt takes nothing away from what the next one is told
        with (
            pytest.raises(
                ConfigError,
                match=rf"being written by process {holder.pid} on .*choose another output_dir",
            ),
            one_writer(tmp_path),
        ):
            pass
    holder.kill()
    holder.wait()
    assert str(holder.pid) in (tmp_path / LOCK_FILE).read_text()  # what is left of it says so still
    with one_writer(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    with one_writer(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_an_exception_lets_the_lock_go_and_empties_the_text(tmp_path: Path, preamble: str) -> None:
    with pytest.raises(RuntimeError, match="in the block"), one_writer(tmp_path):
        raise RuntimeError("in the block")
    assert (tmp_path / LOCK_FILE).read_text() == ""
    holder = holding(preamble, tmp_path)
    holder.send_signal(signal.SIGINT)
    holder.wait()
    assert (tmp_path / LOCK_FILE).read_text() == ""
    with one_writer(tmp_path):
        pass


def test_a_process_cannot_take_its_own_lock_again(tmp_path: Path, preamble: str) -> None:
    with one_writer(tmp_path):
        with (
            pytest.raises(ConfigError, match=rf"being written by process {os.getpid()} on "),
            one_writer(tmp_path),
        ):
            pass
        # Refused, it has not let go of the one that it has.
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
        second = python(preamble + "with one_writer(Path(sys.argv[1])): pass", str(tmp_path))
        assert f"being written by process {os.getpid()} on " in second.communicate()[1]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSYS, None),
        (errno.ENOTSUP, None),
        (errno.ENOLCK, None),
        (errno.EIO, "put/output error.*look at the disk or the network mount"),
        (errno.EPERM, "not permitted.*change its permissions"),
        (errno.EROFS, "Read-only.*mounted for reading only"),
        (errno.ENOSPC, "No space.*make room"),
        (errno.EDQUOT, "quota.*make room"),
    ],
)
def test_a_disk_that_fails_is_not_one_without_locks(
    number: int, advice: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if advice is not None:
        with pytest.raises(ConfigError, match=f"cannot be locked.*{advice}"), one_writer(tmp_path):
            pass
        return
    with one_writer(tmp_path):
        assert (tmp_path / HELD_FILE).is_file()
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_run_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="a part of the path is a file: choose another"),
        one_writer(tmp_path / "file" / "run"),
    ):
        pass


def test_an_error_of_the_work_itself_comes_through_the_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the work"), one_writer(tmp_path):
        raise OSError(errno.EIO, "of the work")
    with one_writer(tmp_path):
        pass


def test_the_holder_may_delete_the_run_directory(tmp_path: Path, preamble: str) -> None:
    run = tmp_path / "run"
    with one_writer(run):
        shutil.rmtree(run)
    assert not run.exists()


def test_a_forked_child_neither_holds_nor_empties(tmp_path: Path, preamble: str) -> None:
    code = preamble + (
        "import os\nparent = os.getpid()\ntry:\n    with one_writer(Path(sys.argv[1])):\n"
        "        if os.fork() == 0:\n            raise SystemExit\n        os.wait()\n"
        "        print((Path(sys.argv[1]) / 'run.lock').read_text())\n"
        "finally:\n    if os.getpid() != parent:\n        os._exit(0)"
    )
    process = python(code, str(tmp_path))
    out, err = process.communicate(timeout=60)
    assert err == ""
    assert json.loads(out)["pid"] == process.pid


def test_without_locks_a_holder_on_another_host_is_believed_until_its_file_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = holding(NO_LOCKS + HOLD, tmp_path)
    held = tmp_path / HELD_FILE
    lines = held.read_text().splitlines()
    assert lines[0] == str(holder.pid)
    holder.kill()
    holder.wait()
    held.write_text("\n".join([lines[0], "elsewhere", *lines[2:]]) + "\n")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.raises(ConfigError, match=rf"{HELD_FILE} alone .* delete it if"),
        one_writer(tmp_path),
    ):
        pass
    held.unlink()
    with one_writer(tmp_path):
        pass


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stop = StopRequest()
    with listening(stop), listening(stop):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # at the same moment, as a launcher forwards it: one request
        time.sleep(0.01)
    assert stop.signal_number == number
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert f"{number.name}: what is being done is finished" in capfd.readouterr().err


def test_a_run_that_is_gone_on_with_says_again_why_it_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """train() is called twice on one trainer, and stopped twice."""
    ranks = Ranks(Accelerator(cpu=True), StopRequest(), timeout=9, folder=tmp_path)
    for _ in range(2):
        with listening(ranks.stop):
            ranks.stop.signal_number = signal.SIGTERM
            for _ in range(2):
                with pytest.raises(RunInterrupted, match="stopped by SIGTERM in a test"):
                    ranks.raise_if_stop_requested("in a test")
        assert capsys.readouterr().err.count("stopped by SIGTERM in a test") == 1


def test_a_second_signal_leaves_at_once() -> None:
    code = (
        "import os, signal, time\nfrom neat_align.runs.signals import *\n"
        "stop = StopRequest()\nwith listening(stop):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(SAME_REQUEST_SECONDS + 0.1)\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)\n    finally:\n    "
        "    print('not at once')"
    )
    process = python(code)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert out == ""
    assert "SIGTERM again: leaving at once" in err


def test_another_thread_changes_no_handler() -> None:
    seen = []

    def work() -> None:
        with listening(StopRequest()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_an_interruption_that_nobody_catches_is_the_exit_code_of_the_signal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    error = interrupted(signal.SIGTERM, "after step 3")
    assert isinstance(error, SystemExit)
    assert error.code == 143
    assert "stopped by SIGTERM after step 3" in str(error)
    assert "neat-align train … --resume true" in capfd.readouterr().err
    assert interrupted(signal.SIGINT, "x", show=False).code == 130
    assert isinstance(error, RunInterrupted)


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (folder / name).write_bytes(f"{name} {step}".encode())
    if complete:
        mark_complete(folder)
    return folder


def test_a_checkpoint_without_what_training_needs_is_never_marked(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1, complete=False)
    with pytest.raises(SaveError, match=r"saved without rng_state.pth: training could not go on"):
        mark_complete(folder, required=("optimizer.pt", "rng_state.pth"))
    assert not (folder / MARKER).exists()


def test_incomplete_checkpoints_are_set_aside_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30, 40):
        checkpoint(tmp_path, step, complete=step != 40)
    (tmp_path / "checkpoint-30" / "scheduler.pt").unlink()
    (tmp_path / "checkpoint-20" / "optimizer.pt").write_bytes(b"optimizer.pt 21")
    with caplog.at_level(logging.WARNING):
        assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-10"
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"checkpoint-10", *(f"checkpoint-{n}.incomplete" for n in (20, 30, 40))}
    for reason in (
        f"has no {MARKER}",
        "scheduler.pt is missing",
        "optimizer.pt is not the file that was written",
    ):
        assert reason in caplog.text


def test_damaged_checkpoints_alone_are_an_error_also_the_second_time_but_unfinished_ones_are_not(
    tmp_path: Path,
) -> None:
    checkpoint(tmp_path, 10, complete=False)
    assert checkpoint_to_resume(tmp_path) is None
    checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(
            ConfigError,
            match=r"no complete checkpoint.*checkpoint-10.incomplete-2 were finished and then "
            r"damaged",
        ):
            checkpoint_to_resume(tmp_path)


def test_weights_alone_are_not_resumed_from(tmp_path: Path) -> None:
    mark_complete(checkpoint(tmp_path, 10, complete=False), resumable=False)
    with pytest.raises(ConfigError, match=r"weights alone \(save_only_model: true\)"):
        checkpoint_to_resume(tmp_path)


@pytest.mark.parametrize(("limit", "left"), [(None, [1, 2, 3, 4]), (3, [2, 3, 4]), (1, [3, 4])])
def test_rotation_counts_marked_checkpoints_and_keeps_two(
    tmp_path: Path, limit: int | None, left: list[int]
) -> None:
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 5, complete=False)
    rotate(tmp_path, limit)
    assert {p.name for p in tmp_path.iterdir()} == {f"checkpoint-{n}" for n in (*left, 5)}
    assert all(is_complete(tmp_path / f"checkpoint-{n}") for n in left)


def test_rotation_keeps_the_best_and_finishes_what_was_begun(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    (tmp_path / ".checkpoint-0.deleted").mkdir()
    rotate(tmp_path, 2, keep=str(tmp_path / "checkpoint-1"))
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-3", "checkpoint-4"}
    unmark(tmp_path / "checkpoint-4")
    assert not is_complete(tmp_path / "checkpoint-4")


# ---- folders and files ---------------------------------------------------------------------------


def test_a_folder_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_folder(path, lambda new: (new / "a").write_text("1"))

    def fail(new: Path) -> None:
        (new / "a").write_text("2")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_folder(path, fail)
    assert {p.name: (p / "a").read_text() for p in tmp_path.iterdir()} == {"model": "1"}
    write_folder(path, lambda new: (new / "b").write_text("3"))
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "b"]


def test_a_file_is_cut_back_and_never_made_longer(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert cut_to(path, 5) == 0
    path.write_text("one\ntwo\n")
    assert cut_to(path, 100) == 0
    assert cut_to(path, 4) == 4
    assert path.read_text() == "one\n"


def test_batches_are_as_few_as_the_size_allows_and_alike() -> None:
    assert [len(s) for _, s in even_batches(range(10), 4)] == [4, 4, 2]
    assert [len(s) for _, s in even_batches(range(9), 8)] == [5, 4]
    assert [start for start, _ in even_batches(range(9), 8)] == [0, 5]
    assert list(even_batches([], 8)) == []


# ---- the same run --------------------------------------------------------------------------------


def test_changes_are_said_one_a_line_and_can_be_allowed(tmp_path: Path) -> None:
    key: dict[str, Any] = {"processes": 1, "options": {"seed": 1, "beta": 2.0}}
    assert check_same_run(tmp_path, key, allow_changes=False) == []
    write_key(tmp_path, key)
    now = {
        "processes": 2,
        "new part": "not compared",
        "options": {"seed": 1, "beta": 3.0, "new_option": 1},
    }
    with pytest.raises(ConfigError) as error:
        check_same_run(tmp_path, now, allow_changes=False)
    assert "\n  processes was 1 and is 2\n  beta was 2.0 and is 3.0\n" in str(error.value)
    assert "--allow_changes true" in str(error.value)
    assert check_same_run(tmp_path, now, allow_changes=True) == [
        "processes was 1 and is 2",
        "beta was 2.0 and is 3.0",
    ]
    write_key(tmp_path, now)
    assert check_same_run(tmp_path, now, allow_changes=False) == []
    assert key_changes({}, now) == []


def test_a_step_in_other_shares_is_the_same_step(tmp_path: Path) -> None:
    def key(processes: int, size: int, passes: int, **options: Any) -> dict[str, Any]:
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
        return {"processes": processes, "model": "A", "options": {**split, "seed": 1, **options}}

    assert new_split(tmp_path, key(2, 2, 2)) is None  # a new run
    write_key(tmp_path, key(1, 2, 4))
    said = new_split(tmp_path, key(4, 1, 2))
    assert said == (
        "a step's groups were split as 1 processes x 2 x 4 passes and are as 4 processes x 1 x 2 "
        "passes"
    )
    # What is no other split of the same, or more than that, is compared as any change is.
    for other in (key(1, 4, 2), key(2, 2, 4), key(2, 2, 2, seed=2), {**key(2, 2, 2), "model": "B"}):
        assert new_split(tmp_path, other) is None
        with pytest.raises(ConfigError, match="other settings"):
            check_same_run(tmp_path, other, allow_changes=False)


def test_an_option_that_came_later_counts_as_its_default(tmp_path: Path) -> None:
    """The key of an earlier version has fewer options: the run had none of what they ask for."""

    def options(**changes: Any) -> dict[str, Any]:
        args = NEATConfig(output_dir=str(tmp_path), bf16=False, num_plain=3, **changes)
        return run_key(args, {})["options"]

    later = ("distil_weight", "token_weight_scale", "contrast_from", "distil_clip", "max_kl")
    now = options()
    # Options of transformers' own come and go with its versions.
    was = {"options": {k: v for k, v in now.items() if k not in (*later, "use_liger_kernel")}}
    assert key_changes(was, {"options": now}) == []
    for name, value, default in (
        ("distil_weight", 1.0, 0.0),
        ("token_weight_scale", 1.0, 0.0),
        ("contrast_from", "branch", "prompt"),
    ):
        changes = key_changes(was, {"options": options(**{name: value})})
        assert changes == [f"{name} was {default!r} and is {value!r}"]
    # That it has none at all says nothing.
    assert key_changes({"options": {}}, {"options": now | {"use_liger_kernel": True}}) == [
        "num_plain was 2 and is 3"
    ]


# ---- alarms --------------------------------------------------------------------------------------


def test_alarms_sound_past_their_threshold_once_a_round(caplog: pytest.LogCaptureFixture) -> None:
    alarms = Alarms(logp_drop=0.5, ratio=2.0)
    start = {"mean_length": 10.0, "entropy": 2.0}
    with caplog.at_level(logging.WARNING):
        for value, index in ((-1.0, 0), (-1.5, 0)):
            alarms.training({"logps/best": value}, index)
        alarms.drift({"mean_length": 20.0, "entropy": 1.0}, start, 0)
        assert caplog.text == ""
        for index in (1, 1, 2):
            alarms.training({"logps/best": -1.6}, index)
            alarms.drift({"mean_length": 21.0, "entropy": 0.9}, start, index)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 6
    assert (
        "round 2: the log-probability of the best answers fell from -1.00 to -1.60 nats per token"
        in lines[0]
    )
    assert "the mean length of plain answers went from 10 to 21 tokens" in lines[1]
    assert "the entropy of plain answers went from 2 to 0.9 nats per token" in lines[2]
    assert alarms.baselines == {"logps/best": -1.0}
    off = Alarms(logp_drop=0, ratio=0)
    off.training({"logps/best": -1.0}, 0)
    off.training({"logps/best": -9.0}, 0)
    off.drift({"mean_length": 90.0}, start, 0)
    assert len(caplog.records) == 6


# ---- sums between two log lines, of several processes --------------------------------------------


def saved_by(folder: Path, losses: list[float]) -> Path:
    """A checkpoint of as many processes as there are losses."""
    folder.mkdir()
    for rank, loss in enumerate(losses):
        sums = {"loss/lm": [loss, 0.0], "logps/best": [-loss, 2.0]}
        state = ResumeState(loss_since_log=loss, total_loss=7.0, logged_step=3, sums=sums)
        write_resume_state(folder, rank, state)
    return folder


@pytest.mark.parametrize("losses", [[1.0], [1.0, 2.0], [1.0, 2.0, 6.0]])
def test_as_many_processes_go_on_with_their_own_sums(tmp_path: Path, losses: list[float]) -> None:
    folder = saved_by(tmp_path / "checkpoint", losses)
    states = [read_resume_state(folder, rank, len(losses)) for rank in range(len(losses))]
    assert [state and state.loss_since_log for state in states] == losses
    assert [state and state.sums["loss/lm"][0] for state in states] == losses


@pytest.mark.parametrize("losses", [[1.0], [1.0, 2.0], [1.0, 2.0, 6.0]])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_any_number_of_processes_logs_the_same_line(
    tmp_path: Path, losses: list[float], processes: int
) -> None:
    """The mean of the losses and the sum of the sums are what a log line is made of."""
    folder = saved_by(tmp_path / "checkpoint", losses)
    states = [read_resume_state(folder, rank, processes) for rank in range(processes)]
    mean = sum(state.loss_since_log for state in states if state) / processes
    assert mean == pytest.approx(sum(losses) / len(losses))
    for name, expected in (("loss/lm", [sum(losses), 0.0]), ("logps/best", None)):
        rows = [state.sums[name] for state in states if state and name in state.sums]
        found = [sum(column) for column in zip(*rows, strict=True)]
        assert found == (expected or [-sum(losses), 2.0 * len(losses)])
    assert all(state and (state.total_loss, state.logged_step) == (7.0, 3) for state in states)


def test_a_checkpoint_without_such_a_file_has_no_state(tmp_path: Path) -> None:
    assert read_resume_state(tmp_path, 0, 1) is None
    assert read_resume_state(tmp_path, 1, 2) is None
