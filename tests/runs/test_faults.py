"""A run that is broken in any way is gone on with and ends as the unbroken one: the fast part of
`make faults`, and its table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "faults.json"


def faults(out: Path, *arguments: str) -> dict[str, Any]:
    """In a process of its own, with one thread each: it forks, and this process may have
    threads.
    """
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "faults.py"),
        "--jobs",
        "2",
        "--json",
        str(out),
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_a_broken_run_loses_nothing(tmp_path: Path) -> None:
    found = faults(tmp_path / "faults.json", "--fast")
    assert found["lost"] == []
    assert found["tried"] == found["planned"] == sum(row["tried"] for row in found["rows"]) >= 9
    kinds = " ".join(row["fault"] for row in found["rows"])
    for word in (
        "kill -9 while",
        "inside of a write",
        "SIGTERM",
        "disk full",
        "one bit flipped",
        "NaN",
        "a second process",
    ):
        assert word in kinds


@pytest.mark.slow
@pytest.mark.distributed
def test_a_broken_run_of_two_processes_loses_nothing(tmp_path: Path) -> None:
    found = faults(tmp_path / "faults.json", "--fast", "--processes", "2")
    assert found["lost"] == []
    struck = [row["fault"] for row in found["rows"]]
    assert found["tried"] == found["planned"] == len(struck) >= 12
    for rank in (0, 1):
        kinds = " ".join(fault for fault in struck if fault.endswith(f"in process {rank} of 2"))
        for word in ("kill -9", "inside of a write", "SIGTERM", "disk full", "NaN"):
            assert word in kinds


def test_the_page_shows_the_committed_result() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "faults_table.py"), str(RESULT)]
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    for line in subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.splitlines():
        assert line in page
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    assert found["lost"] == []
    assert found["tried"] == found["planned"]
    assert sum(row["tried"] for row in found["rows"] if row["fault"].startswith("kill")) >= 50
