"""A run that ends before its first finished work: its folder is free again, and it leaves nothing.

Whatever is finished, somebody else's, or another process's stays.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from file_locks import NO_LOCKS, no_locks
from neat_align.errors import ConfigError, RewardError, RewardUnavailableError
from neat_align.pipeline import _goes_on, run_training
from neat_align.runs.leftovers import is_free, leaving_nothing, remove_leftovers
from neat_align.runs.lock import one_writer
from neat_align.script_arguments import ScriptArguments
from small_trainer import ROWS, config, trainer
from tiny import save_tiny

# What is in the files of a run that was killed early.
KEY = '{"options": {}, "processes": 1}'
RECORD = '{"config": {}, "metrics_bytes": 0}'
LAUNCH = '{"run_id": "none", "host": "a", "launcher": 1, "since": ""}'
HELD = ' {"pid": 1, "host": "a", "since": "2026"}'


class RewardThatFails:
    """Fails at its `fails_at`-th call, with `error`."""

    name = "failing"
    fails_at = 1
    error: Callable[[], Exception] = staticmethod(lambda: RuntimeError("no"))
    calls = 0

    def __call__(self, completions: list[Any], **others: Any) -> list[float]:
        self.calls += 1
        if self.calls >= self.fails_at:
            raise self.error()
        return [float(len(c[0]["content"])) for c in completions]


REWARD = RewardThatFails()


@pytest.fixture
def script(tmp_path: Path) -> ScriptArguments:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    REWARD.calls, REWARD.fails_at = 0, 1
    RewardThatFails.error = staticmethod(lambda: RuntimeError("no"))
    return ScriptArguments(
        model_name_or_path=str(save_tiny(tmp_path / "model", "llama")),
        dataset_name=str(path),
        holdout=2,
        reward_funcs=[f"{__name__}:REWARD"],
    )


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", "-").replace("-dot-", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def begun(folder: Path) -> Path:
    """All that a run can leave before it has finished anything."""
    return write(
        folder,
        run_dot_lock=HELD,
        run_key_dot_json=KEY,
        run_dot_json=RECORD,
        launch_dot_json=LAUNCH,
        skipped_rows_dot_jsonl="{}\n",
        metrics_dot_jsonl="",
        rounds__00000__work__000000__plan_dot_json="{}",
        rounds__00000__work__groups_dot_parquet_dot_part="",
    )


def test_what_a_run_leaves_before_its_first_work_keeps_nobody_from_the_folder(
    tmp_path: Path,
) -> None:
    folder = begun(tmp_path / "run")
    assert len(list(folder.rglob("*.*"))) == 8
    assert is_free(folder)
    with one_writer(folder):
        remove_leftovers(folder)
    assert list(folder.iterdir()) == []
    assert is_free(folder)
    assert is_free(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.txt", ""),
        ("run.json", '{"my": "own"}'),  # the name of one of ours, and something else in it
        ("run-key.json", "not JSON"),
        ("launch.json", "[1]"),
        ("run.lock", "mine"),
        ("evaluation-before.json", "{}"),
        ("drift-start.json", "{}"),
        ("metrics.jsonl", "{}\n"),
        ("/".join(("rounds", "00000", "work", "000000", "samples-000000.parquet")), "PAR1"),
        ("/".join(("rounds", "00000", "work", "groups.parquet.part")), "PAR1"),
        ("rounds/00000/manifest.json", "{}"),
        ("rounds/notes.txt", ""),
        ("checkpoint-4/COMPLETE.json", "{}"),
        ("runs/events.out", ""),
    ],
)
def test_finished_work_and_what_is_somebody_elses_is_never_deleted(
    tmp_path: Path, name: str, text: str
) -> None:
    folder = begun(tmp_path / "run")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    before = {p: p.is_file() and p.read_text() for p in folder.rglob("*")}
    assert not is_free(folder)
    with pytest.raises(ConfigError, match="which is not empty"):
        _goes_on(ScriptArguments(), folder)
    with pytest.raises(ZeroDivisionError), leaving_nothing(folder):
        _ = 1 / 0
    with one_writer(tmp_path):
        remove_leftovers(folder)
    assert {p: p.is_file() and p.read_text() for p in folder.rglob("*")} == before


def test_a_link_is_not_followed_and_stays(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", run_key_dot_json=KEY)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "rounds").symlink_to(elsewhere)
    assert not is_free(folder)
    (folder / "rounds").unlink()
    (folder / "run-key.json").symlink_to(elsewhere / "run-key.json")
    assert not is_free(folder)


def test_a_run_that_fails_before_its_first_work_leaves_nothing_and_the_next_one_may_differ(
    tmp_path: Path, script: ScriptArguments
) -> None:
    out = tmp_path / "runs" / "first"
    with pytest.raises(RewardError, match="'failing' raised RuntimeError"):
        run_training(script, config(out))
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()  # it was there before: it stays
    REWARD.fails_at, script.holdout = 100, None
    result = run_training(script, config(out, learning_rate=1e-3))
    assert result["steps"] == 4
    (notice,) = result["notices"]
    assert notice.startswith("rows.jsonl has 12 different prompts: 3 are held out")
    assert json.loads((out / "run.json").read_text())["data"]["notices"] == [notice]
    assert f'<li data-warning="data">{notice}</li>' in (out / "report.html").read_text("utf-8")


def test_also_one_that_never_came_to_open_its_folder(
    tmp_path: Path, script: ScriptArguments
) -> None:
    with pytest.raises(ConfigError, match="max_prompt_length"):
        run_training(script, config(tmp_path / "run", max_prompt_length=2000))
    assert not (tmp_path / "run").exists()


def test_what_is_to_be_gone_on_with_stays(tmp_path: Path, script: ScriptArguments) -> None:
    RewardThatFails.error = staticmethod(lambda: RewardUnavailableError("it is down"))
    out = tmp_path / "run"
    with pytest.raises(RewardUnavailableError):
        run_training(script, config(out))
    assert sorted(p.name for p in out.iterdir()) == ["run-key.json", "run.lock"]
    REWARD.fails_at = 100
    script.resume = True
    assert run_training(script, config(out))["steps"] == 4


def test_a_run_that_was_killed_early_is_in_nobodys_way_whatever_it_was(
    tmp_path: Path, script: ScriptArguments
) -> None:
    """Neither on the command line nor in Python, where the folder may hold other files, too."""
    REWARD.fails_at = 100
    out = begun(tmp_path / "run")
    assert run_training(script, config(out))["steps"] == 4
    other = write(begun(tmp_path / "other"), notes_dot_txt="mine")
    (other / "run.json").unlink()
    (other / "rounds" / "00000" / "work" / "000000" / "plan.json").unlink()
    for folder in ("000000", "."):
        (other / "rounds" / "00000" / "work" / folder / "groups.parquet.part").unlink(True)
    emptied = other / "rounds" / "00000" / "work" / "000000"
    for folder in (emptied, *emptied.parents[:3]):
        folder.rmdir()
    trainer(other).train()
    trainer(begun(tmp_path / "third")).train()
    assert (other / "notes.txt").read_text() == "mine"


HOLD = """
import sys, time
from pathlib import Path
from neat_align.runs.lock import one_writer
"""


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_a_run_that_has_only_begun_is_not_taken_for_a_dead_one(
    tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "run")
    hold = "with one_writer(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    code = ("" if locks else NO_LOCKS) + HOLD + hold
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        names = sorted(p.relative_to(folder) for p in folder.rglob("*"))
        with pytest.raises(ConfigError, match=f"being written by process {holder.pid}"):
            _goes_on(ScriptArguments(), folder)
        with pytest.raises(ZeroDivisionError), leaving_nothing(folder):
            _ = 1 / 0
        assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == names
        holder.kill()
    with pytest.raises(ZeroDivisionError), leaving_nothing(folder):
        _ = 1 / 0
    assert [p.name for p in folder.iterdir()] == []
