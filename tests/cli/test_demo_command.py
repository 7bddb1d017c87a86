"""The demo may replace its own earlier run, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from neat_align import ConfigError
from neat_align.cli.demo import make_room


def folder_with(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("first", ["run-key.json", "run.json"])
def test_an_earlier_run_makes_room_also_when_it_was_interrupted_at_once(
    tmp_path: Path, first: str
) -> None:
    folder = folder_with(tmp_path, first)
    make_room(folder, overwrite=True)
    assert not folder.exists()


@pytest.mark.parametrize(("name", "overwrite"), [("run.json", False), ("thesis.tex", True)])
def test_what_is_not_to_be_replaced_stays(tmp_path: Path, name: str, overwrite: bool) -> None:
    folder = folder_with(tmp_path, name)
    with pytest.raises(ConfigError, match="not empty"):
        make_room(folder, overwrite=overwrite)
    assert (folder / name).is_file()


def test_an_empty_folder_or_none_is_fine(tmp_path: Path) -> None:
    make_room(tmp_path / "none", overwrite=False)
    make_room(tmp_path, overwrite=False)
    assert tmp_path.is_dir()
