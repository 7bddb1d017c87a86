"""Two processes train as one does: work, gradients and counts are shared."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import launched

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def run(folder: Path, *arguments: str, processes: int, script: str = "two_processes.py") -> None:
    def once() -> subprocess.CompletedProcess[str]:
        return launched(script, folder, *arguments, processes=processes, limit=240)

    done = once()
    # torch's own threads abort a process that lets go of a process group in the middle of things,
    # now and then; whatever else goes wrong fails here.
    if (
        done.returncode != 0
        and "terminate called without an active exception" in done.stderr
        and not any("resume" in argument for argument in arguments)
    ):
        shutil.rmtree(folder, ignore_errors=True)
        done = once()
    assert done.returncode == 0, done.stderr[-3000:]


# What only says how fast it was.
SPEED = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_numbers(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    """Every line has the same metrics, with the same numbers up to rounding."""
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert list(a) == list(b)
        for name in set(a) - set(SPEED):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), (a["step"], name)


@pytest.mark.parametrize("what", ["", "distil"])
def test_two_processes_train_as_one(tmp_path: Path, what: str) -> None:
    run(tmp_path / "one", "2", "2", what, processes=1)
    run(tmp_path / "two", "2", "1", what, processes=2)
    alone = torch.load(tmp_path / "one" / "weights-0.pt", weights_only=True)
    first, second = (
        torch.load(tmp_path / "two" / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between the processes"
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-6)
    one, two = (logged(tmp_path / n) for n in ("one", "two"))
    assert min(line["grad_norm"] for line in one if "grad_norm" in line) > 0.1  # weights moved
    assert len([line for line in one if "loss" in line]) == 4
    assert_same_numbers(one, two)


def test_what_is_not_finite_on_one_process_stops_both_before_the_step(tmp_path: Path) -> None:
    run(tmp_path / "nan", "2", "1", "nan", processes=2)
    said = [(tmp_path / "nan" / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith("CollapseError at 2: the loss is nan at step 3")
    assert "; prompts " in said[0]


def test_a_signal_to_one_process_ends_both_with_a_checkpoint_that_goes_on_exactly(
    tmp_path: Path,
) -> None:
    run(tmp_path / "whole", "2", "1", "whole", processes=2)
    run(tmp_path / "cut", "2", "1", "signal", processes=2)
    said = [(tmp_path / "cut" / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    assert all(
        text.startswith("RunInterrupted at 3: stopped by SIGTERM after step 3") for text in said
    )
    assert (tmp_path / "cut" / "checkpoint-3" / "COMPLETE.json").is_file()
    run(tmp_path / "cut", "2", "1", "resume", processes=2)
    whole, cut = (
        torch.load(tmp_path / n / "weights-1.pt", weights_only=True) for n in ("whole", "cut")
    )
    for name, value in whole.items():
        assert torch.equal(cut[name], value), name


def test_two_processes_log_what_one_does_with_the_same_groups(tmp_path: Path) -> None:
    """Seven groups a round: steps of 2 + 2 and 2 + 1. One prompt alone has human answers, so that
    one process has no completion of those origins.
    """
    run(tmp_path / "one", "2", "2", "uneven", processes=1)
    run(tmp_path / "two", "2", "1", "uneven", processes=2)
    one, two = (logged(tmp_path / n) for n in ("one", "two"))
    assert_same_numbers(one, two)
    steps = [line for line in two if "loss" in line]
    assert [line["step"] for line in steps] == [4]
    assert steps[0]["loss/kl"] > 0
    assert steps[0]["loss/negative"] > 0
    terms = [steps[0][f"loss/{name}"] for name in ("ranking", "lm", "kl", "negative")]
    weighted = sum(w * t for w, t in zip((1, 1, 0.1, 0.1), terms, strict=True))
    assert steps[0]["loss"] == pytest.approx(weighted, rel=1e-4)
    assert "logps/chosen" in steps[0]
    # What Trainer keeps, and gives back, is the same on both, the steps after the last log line
    # included.
    kept = [json.loads((tmp_path / "two" / f"history-{rank}.json").read_text()) for rank in (0, 1)]
    assert_same_numbers(*kept)
    alone = json.loads((tmp_path / "one" / "output-0.json").read_text())["train_loss"]
    for rank in (0, 1):
        given = json.loads((tmp_path / "two" / f"output-{rank}.json").read_text())
        assert given["train_loss"] == pytest.approx(alone, rel=1e-5)


def test_a_log_line_of_two_processes_survives_a_break(tmp_path: Path) -> None:
    """Stopped after step 3 by a signal to one process; the line of step 4 stands for all four."""
    run(tmp_path / "whole", "2", "1", "uneven", processes=2)
    run(tmp_path / "cut", "2", "1", "uneven-cut", processes=2)
    assert (tmp_path / "cut" / "checkpoint-3" / "COMPLETE.json").is_file()
    run(tmp_path / "cut", "2", "1", "uneven-resume", processes=2)
    whole, cut = (logged(tmp_path / n) for n in ("whole", "cut"))
    for a, b in zip(whole, cut, strict=True):
        assert {k: v for k, v in a.items() if k not in SPEED} == {
            k: v for k, v in b.items() if k not in SPEED
        }


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_the_number_of_processes_may_change_between_rounds(
    tmp_path: Path, first: int, then: int
) -> None:
    def split(processes: int) -> tuple[str, str]:
        return "2", str(2 // processes)

    run(tmp_path / "whole", *split(1), processes=1)
    run(tmp_path / "cut", *split(first), "round-cut", processes=first)
    assert (tmp_path / "cut" / "checkpoint-2" / "COMPLETE.json").is_file()
    run(tmp_path / "cut", *split(then), "round-resume", processes=then)
    whole, cut = (
        torch.load(tmp_path / n / "weights-0.pt", weights_only=True) for n in ("whole", "cut")
    )
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-6, atol=1e-6)
    assert_same_numbers(logged(tmp_path / "whole"), logged(tmp_path / "cut"))
    (change,) = json.loads((tmp_path / "cut" / "run.json").read_text())["changes"]
    assert change["from_step"] == 2
    assert (
        f"split as {first} processes x 2 x {2 // first} passes and are as" in change["changed"][0]
    )


# ---- shares --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes saw of the calls that they share."""
    folder = tmp_path_factory.mktemp("shared")
    run(folder, processes=2, script="two_ranks.py")
    return folder


def seen_by(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_calls_are_shared_and_what_one_process_meets_reaches_both(shared: Path) -> None:
    lead, other = seen_by(shared)
    assert lead["shares"] == [[[2, 4], [6]], [0, 1]]
    assert lead["nobody"] == [None, [8]]
    assert lead["own"] == ["mine", 1]
    assert other["shares"] is other["nobody"] is other["own"] is None
    # Where it was, and on rank 0, which a user reads, the error is what it was.
    assert lead["typed"] == other["typed"] == "RewardError: no score for row 3"
    assert lead["foreign"] == "NEATError: KeyError: 'lost'"
    assert other["foreign"] == "KeyError: 'lost'"
    assert lead["rank zero"] == "ValueError: rank 0 alone"
    elsewhere = "another process failed in scene {}: its own message says why"
    assert other["rank zero"] == f"OtherProcessError: {elsewhere.format('rank zero')}"
    assert lead["share of rank zero"] == "RewardError: here"
    assert other["share of rank zero"].startswith("OtherProcessError: another process failed")
    assert lead["still fine"] == [[10], [12]]
    # The second process heard SIGTERM; the first stops before its next batch, and both with it.
    for seen in (lead, other):
        assert seen["signal"].startswith("RunInterrupted: stopped by SIGTERM"), seen["signal"]
        assert seen["scattered"] == {"from": 0}
        assert seen["largest"] == 4


def test_a_process_that_is_stuck_is_an_error_in_time_and_says_where_it_is(shared: Path) -> None:
    lead, other = seen_by(shared)
    assert lead["stuck took"] < 8
    assert lead["stuck"].startswith("NEATError: process 0 of 2 could not hear from the others")
    assert "ddp_timeout=4 seconds" in lead["stuck"]
    assert other["stuck"].startswith("NEATError: process 1 of 2 could not")
    assert "in sleep" in (shared / "stacks-1.txt").read_text()
