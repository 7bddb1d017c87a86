"""Two processes train as one does: rank 0 samples, both learn, gradients and counts are shared."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "two_processes.py"


def run(folder: Path, *arguments: str, processes: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = (
        [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--master-port",
            str(port),
        ]
        if processes > 1
        else []
    )
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    # torch's own threads abort a process that lets go of a process group in the middle of things,
    # now and then; whatever else goes wrong fails here.
    if (
        done.returncode != 0
        and "terminate called without an active exception" in done.stderr
        and "resume" not in arguments
    ):
        shutil.rmtree(folder, ignore_errors=True)
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=240, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    run(tmp_path / "one", "2", "2", processes=1)
    run(tmp_path / "two", "2", "1", processes=2)
    alone = torch.load(tmp_path / "one" / "weights-0.pt", weights_only=True)
    first, second = (
        torch.load(tmp_path / "two" / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between the processes"
        # AdamW's first steps are signs: a gradient near zero may round to either, so weights are
        # compared loosely.
        torch.testing.assert_close(first[name], value, rtol=0, atol=2e-4)
    logs = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    one, two = ([line for line in log if "loss" in line] for log in logs)
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_what_is_not_finite_on_one_process_stops_both_before_the_step(tmp_path: Path) -> None:
    run(tmp_path / "nan", "2", "1", "nan", processes=2)
    said = [(tmp_path / "nan" / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith("CollapseError at 2: the loss is nan at step 3")
    assert "; prompts " in said[0]


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_with_a_checkpoint_that_goes_on_exactly(
    tmp_path: Path,
) -> None:
    run(tmp_path / "whole", "2", "1", processes=2)
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
