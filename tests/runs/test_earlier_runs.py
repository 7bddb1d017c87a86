"""A run that an earlier version wrote can be read, inspected, reported and gone on with.

`tests/fixtures/run_before_rooms` was made by the commit before the package was divided into rooms;
its README says how.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from neat_align.cli import main
from neat_align.rounds.round_files import read_round
from neat_align.runs.checkpoints import damage_of

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
EARLIER = FIXTURES / "run_before_rooms"
sys.path.insert(0, str(FIXTURES))

from make_run_before_rooms import ARGUMENTS  # noqa: E402


def ended_well(*arguments: str) -> bool:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code == 0


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_its_rounds_and_checkpoints_are_read() -> None:
    for index in range(2):
        made = read_round(EARLIER / "finished" / "rounds" / f"{index:05d}")
        assert made is not None
        assert made.index == index
        assert made.groups
    for checkpoint in ("finished/checkpoint-6", "interrupted/checkpoint-3"):
        assert damage_of(EARLIER / checkpoint) is None


def test_it_is_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended_well("inspect", str(EARLIER / "finished"))
    assert "How do I bake bread?" in capsys.readouterr().out


def test_it_is_reported(tmp_path: Path) -> None:
    run = shutil.copytree(EARLIER / "finished", tmp_path / "finished")
    assert ended_well("report", str(run))
    assert "How do I bake bread?" in (run / "report.html").read_text(encoding="utf-8")


def test_it_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model", "prompts.jsonl"):
        copy = shutil.copytree if (EARLIER / name).is_dir() else shutil.copyfile
        copy(EARLIER / name, tmp_path / name)
    run = shutil.copytree(EARLIER / "interrupted", tmp_path / "run")
    before = lines(run / "metrics.jsonl")
    monkeypatch.chdir(tmp_path)
    assert ended_well(*ARGUMENTS, "--resume", "true")
    after = lines(run / "metrics.jsonl")
    assert after[: len(before)] == before
    steps = [line["step"] for line in after if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert json.loads((run / "result.json").read_text(encoding="utf-8"))["rounds"] == 2
    # The earlier version logged the same names from there, in the same order, but for what came
    # later.
    then = lines(EARLIER / "resumed-metrics.jsonl")
    later = {"loss/distil", "round/measured_prompts"}
    assert [set(line) - later for line in after] == [set(line) for line in then]
