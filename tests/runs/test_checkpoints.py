"""A checkpoint counts when its marker is there and names what is there."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from neat_align.files.atomic import read_json
from neat_align.runs.checkpoints import MARKER, checkpoint_to_resume, is_complete, mark_complete


def checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "global").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights " + str(step).encode())
    (folder / "global" / "optimizer.pt").write_bytes(b"moments")
    if complete:
        mark_complete(folder)
    return folder


def test_a_marked_checkpoint_is_complete_and_names_all_its_files(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    assert is_complete(folder)
    facts = read_json(folder / MARKER)["files"]
    assert set(facts) == {"model.safetensors", "global/optimizer.pt"}
    assert facts["model.safetensors"] == {
        "size": 10,
        "crc32": [f"{zlib.crc32(b'weights 10'):08x}"],
    }


def test_marking_twice_does_not_count_the_marker(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    mark_complete(folder)
    assert is_complete(folder)
    assert MARKER not in read_json(folder / MARKER)["files"]


def test_without_a_marker_a_checkpoint_is_incomplete(tmp_path: Path) -> None:
    assert not is_complete(checkpoint(tmp_path, 10, complete=False))
    assert not is_complete(tmp_path / "checkpoint-99")


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "gone below"])
def test_a_checkpoint_that_was_changed_is_incomplete(tmp_path: Path, how: str) -> None:
    folder = checkpoint(tmp_path, 10)
    weights = folder / "model.safetensors"
    if how == "flipped":  # of the same size
        weights.write_bytes(b"W" + weights.read_bytes()[1:])
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "gone":
        weights.unlink()
    else:
        (folder / "global" / "optimizer.pt").unlink()
    assert not is_complete(folder)


def test_the_newest_complete_checkpoint_is_by_number_and_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100, 20):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-100"


def test_broken_newer_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 30, complete=False)
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"")
    assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("marker", ["", '{"files": {"model.saf', "{}", "[]"])
def test_a_damaged_marker_is_no_marker(tmp_path: Path, marker: str) -> None:
    checkpoint(tmp_path, 10)
    (checkpoint(tmp_path, 20) / MARKER).write_text(marker)
    assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-10"


def test_checkpoints_that_were_never_finished_are_a_start_from_the_first_step(
    tmp_path: Path,
) -> None:
    for step in (1, 2):
        checkpoint(tmp_path, step, complete=False)
    assert checkpoint_to_resume(tmp_path) is None
