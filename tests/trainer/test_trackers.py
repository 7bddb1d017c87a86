"""Trackers, the real ones, offline: numbers, a table of every round's groups, and the report.

None of them is needed by the library; a test skips where its tracker is not installed
(`pip install 'neat-align[tensorboard]'`, `[wandb]`, `[trackio]`, `[mlflow]`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from neat_align import ConfigError
from neat_align.pipeline import run_training
from neat_align.reporting.tracker_tables import MARKDOWN_ROWS, markdown_table, table_rows
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.script_arguments import ScriptArguments
from neat_align.trainer import trackers
from small_trainer import ROWS, config, trainer
from tiny import save_tiny

ROUNDS = 2
REWARD = "small_trainer:count_e"


def installed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"not installed: pip install 'neat-align[{name}]'")


def run(folder: Path, tracker: str, **changes: Any) -> Path:
    """A whole run with a tracker, in `folder`/run."""
    data = folder / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    script = ScriptArguments(
        model_name_or_path=str(save_tiny(folder / "base", "llama")),
        dataset_name=str(data),
        reward_funcs=[REWARD],
        holdout=3,
    )
    settings = {"num_train_epochs": ROUNDS, "prompts_per_round": 4, "log_completions": True}
    args = config(folder / "run", report_to=[tracker], **{**settings, **changes})
    run_training(script, args)
    return folder / "run"


# ---- the table ----------------------------------------------------------------------------------


def group(number: int, rewards: list[float | None], text: str = "said") -> CompletionGroup:
    made = [
        Completion("negative", i, f"{text} {i}", (1, 2), reward=r, reward_components=(r, 1.0))
        for i, r in enumerate(rewards)
    ]
    asked = [{"role": "system", "content": "Be."}, {"role": "user", "content": f"asked {number}"}]
    return CompletionGroup(f"id-{number}", asked, (1,), tuple(made))


def test_rows_are_whole_groups_best_first_and_no_more_are_read() -> None:
    read = []

    def groups() -> Iterator[CompletionGroup]:
        for number in range(1_000_000):
            read.append(number)
            yield group(number, [0.5, None, 2.0])

    rows = table_rows(groups(), 4, ["tone", "length"], most=8)  # type: ignore[arg-type]
    assert [row["reward"] for row in rows] == [2.0, 0.5, None] * 2
    assert len(read) == 3
    assert rows[0] == {
        "round": 4,
        "prompt": "system: Be.\nuser: asked 0",
        "origin": "negative",
        "reward": 2.0,
        "reward/tone": 2.0,
        "reward/length": 1.0,
        "completion": "said 2",
        "tokens": 2,
        "end": "stop",
    }
    assert len(table_rows([group(0, [1.0] * 50)], 0, ["a", "b"], most=8)) == 8


def test_markdown_is_cut_and_holds_no_markup_of_the_models() -> None:
    rows = table_rows([group(i, [1.0], f"<b>|\n{'x' * 5000}") for i in range(99)], 0, ["a", "b"])
    text = markdown_table(rows)
    assert len(text.splitlines()) == MARKDOWN_ROWS + 2
    assert "\\<b\\>\\|" in text
    assert max(map(len, text.splitlines())) < 700
    assert markdown_table([]) == "no completions"


# ---- the trackers -------------------------------------------------------------------------------


def test_tensorboard_has_tables_and_everything_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = run(tmp_path, "tensorboard")
    assert list((tmp_path / "here").iterdir()) == []  # not ./runs
    texts, scalars = [], set()
    for logs in sorted((folder / "runs").iterdir()):
        found = EventAccumulator(str(logs))
        found.Reload()
        scalars |= set(found.Tags()["scalars"])
        for tag in found.Tags()["tensors"]:
            if tag.startswith("completions"):
                texts += [e.tensor_proto.string_val[0].decode() for e in found.Tensors(tag)]
    assert {"before/reward", "train/loss", "train/reward", "after/reward"} <= {
        name.replace("train/before_", "before/").replace("train/after_", "after/")
        for name in scalars
    }
    assert len(texts) == ROUNDS
    assert "| negative |" in texts[0]
    assert "What do you say to number" in texts[0]


@pytest.mark.slow
def test_mlflow_has_one_run_with_tables_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = installed("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    run(tmp_path, "mlflow", run_name="mine")
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert found.info.status == "FINISHED"
    assert {"loss", "before_reward", "after_reward"} <= set(found.data.metrics)
    names = {a.path for a in client.list_artifacts(found.info.run_id, "completions")}
    assert names == {f"completions/round-{i:05d}.json" for i in range(ROUNDS)}
    assert "report.html" in {a.path for a in client.list_artifacts(found.info.run_id)}
    (file,) = (tmp_path / "mlruns").rglob("round-00000.json")
    said = json.loads(file.read_text())
    assert {"prompt", "origin", "reward", "completion"} <= set(said["columns"])
    assert mlflow.active_run() is None


@pytest.mark.slow
def test_trackio_has_one_run_with_tables_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = installed("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run(tmp_path, "trackio", project="mine")
    (name,) = SQLiteStorage.get_runs("mine")
    logs = SQLiteStorage.get_logs("mine", name)
    logged = {key for line in logs for key in line}
    assert {"train/loss", "train/before_reward", "train/after_reward"} <= {
        key.replace("before/", "train/before_").replace("after/", "train/after_") for key in logged
    }
    tables = [line["completions"] for line in logs if "completions" in line]
    assert len(tables) == ROUNDS
    assert trackio.context_vars.current_run.get() is None
    assert [a["name"] for a in SQLiteStorage.get_artifacts("mine")] == ["report.html"]


@pytest.mark.slow
def test_wandb_offline_has_tables_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = installed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        run(tmp_path, "wandb", run_name="mine")
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
    assert {"train/loss", "completions"} <= set(summary)
    assert any(key.startswith("after") or "after_" in key for key in summary)
    tables = list(tmp_path.rglob("completions*.table.json"))
    assert len(tables) == ROUNDS
    assert {"prompt", "origin", "reward"} <= set(json.loads(tables[0].read_text())["columns"])
    staged = [p.read_bytes() for p in (tmp_path / "artifacts" / "staging").iterdir()]
    assert (tmp_path / "run" / "report.html").read_bytes() in staged


# ---- what is not sent, and what fails -----------------------------------------------------------


class Recorded(trackers._Tracker):
    """A tracker that keeps what it is given, or breaks."""

    given: ClassVar[list[tuple[str, Any]]]
    breaks = False

    def table(self, rows: Any, round_index: int, step: int) -> None:
        if self.breaks:
            raise RuntimeError("no room on the server")
        self.given.append(("table", (round_index, step, rows)))

    def report(self, path: Path) -> None:
        self.given.append(("report", path.name))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    """In the place of tensorboard, which transformers is told to leave alone."""

    class Fresh(Recorded):
        given: ClassVar[list[tuple[str, Any]]] = []

    monkeypatch.setattr(trackers, "_TRACKERS", {"none": Fresh})
    return Fresh


def told(folder: Path, **changes: Any) -> Any:
    t = trainer(folder, **changes)
    t.args.report_to = ["none"]
    names = [r.name for r in t.parts.scored_by.rewards]
    t.add_callback(trackers.TrackerCallback(t.args, names, lambda: t.callback_handler.callbacks))
    return t


def test_completions_are_sent_only_where_log_completions_asks(
    tmp_path: Path, recorded: type[Recorded]
) -> None:
    t = told(tmp_path / "silent")
    t.train()
    (tmp_path / "silent" / "report.html").write_text("negatives, folded")
    with trackers.after_training(t):
        pass
    assert recorded.given == []
    t = told(tmp_path / "asked")
    t.callback_handler.callbacks[-1]._sends_text = True
    t.train()
    (tmp_path / "asked" / "report.html").write_text("negatives, folded")
    with trackers.after_training(t):
        pass
    (kind, (index, step, rows)), (last, name) = recorded.given
    assert (kind, index, step, last, name) == ("table", 0, 0, "report", "report.html")
    assert {row["origin"] for row in rows} >= {"positive", "negative"}


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, recorded: type[Recorded], caplog: pytest.LogCaptureFixture
) -> None:
    recorded.breaks = True
    t = told(tmp_path)
    t.callback_handler.callbacks[-1]._sends_text = True
    t.train()
    assert t.state.global_step > 0
    assert "none does not take the completions or the report (no room on the server)" in caplog.text


def test_log_completions_needs_somebody_who_shows_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tracker shows them: .*or set report_to"):
        trainer(tmp_path, log_completions=True)
