"""A run says which share of its data it takes, and which rows it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neat_align import read_groups, terminal_callbacks
from neat_align.cli.expand import write_expansion
from neat_align.errors import ConfigError, DataError
from neat_align.pipeline import build_trainer, run_training
from neat_align.prompts.hold_out import refilled
from neat_align.prompts.loading import rows_from_dataset
from neat_align.reporting.run_files import read_run
from neat_align.reporting.run_report import run_facts
from neat_align.script_arguments import ScriptArguments
from small_trainer import ROWS, config, trainer
from tiny import save_tiny

LONG = {"prompt": [{"role": "user", "content": "x" * 600}], "id": "long"}
BLANK = {"prompt": [{"role": "user", "content": " "}], "id": "blank"}


def asked(text: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], **fields}


def listed(folder: Path) -> list[Any]:
    text = (folder / "skipped-rows.jsonl").read_text()
    return [json.loads(line)["id"] for line in text.splitlines()]


def test_bad_rows_are_left_out_counted_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    t = trainer(
        tmp_path,
        rows=[BLANK, *ROWS, LONG],
        eval_dataset=[LONG | {"id": "held"}, ROWS[0], BLANK | {"id": "out"}, ROWS[1]],
        num_eval_prompts=2,
        on_bad_row="skip",
    )
    assert not (tmp_path / "skipped-rows.jsonl").exists()  # nothing has begun
    t.train()
    assert listed(tmp_path) == ["blank", "out", "long", "held"]
    (said,) = [r.message for r in caplog.records if "left out" in r.message]
    assert said.split("\n")[0] == (
        f"4 rows are left out and listed in {tmp_path / 'skipped-rows.jsonl'}:"
    )
    assert [line.split(";")[0] for line in said.split("\n")[1:]] == [
        "  train_dataset: 1 of 14 rows",
        "  eval_dataset: 1 of 4 rows",
        "  training prompts: 1 of 13 rows",
        "  held-out prompts: 1 of 3 rows",
    ]
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["data"]["rows"], record["data"]["skipped_rows"]) == (12, 4)
    assert len(t.parts.data.eval_rows) == 2
    facts = dict(run_facts(read_run(tmp_path)))
    assert facts["Planned prompts"] == "8, 66.7 % of 12 rows"
    assert facts["Rows left out"] == "4 (skipped-rows.jsonl)"


def test_the_rows_that_are_left_are_what_a_run_is_known_by(tmp_path: Path) -> None:
    """The same run as without the bad rows, to the last metric; and it can be taken up as that."""
    plain, skipping = (
        trainer(tmp_path / name, rows=rows, on_bad_row=word)
        for name, rows, word in (("a", ROWS, "error"), ("b", [BLANK, *ROWS, LONG], "skip"))
    )
    assert plain.parts.run_key() == skipping.parts.run_key()


def test_a_run_that_stopped_at_a_bad_row_goes_on_without_it(tmp_path: Path) -> None:
    trainer(tmp_path, num_train_epochs=2).train()
    trainer(tmp_path, num_train_epochs=2, on_bad_row="skip").train(resume_from_checkpoint=True)


def test_errors_are_the_default(tmp_path: Path) -> None:
    for bad in (LONG, BLANK):
        with pytest.raises(DataError, match=r"on_bad_row: skip"):
            trainer(tmp_path, rows=[*ROWS, bad])


def test_an_evaluation_on_other_rows_leaves_bad_ones_out_too(tmp_path: Path) -> None:
    rows = [ROWS[0], LONG, BLANK]
    with pytest.raises(
        DataError, match=r"row 2: prompt must end with a user message that says something"
    ):
        trainer(tmp_path / "a").evaluate(rows)
    with pytest.raises(DataError, match="1 prompts are longer than max_prompt_length=200"):
        trainer(tmp_path / "a").evaluate(rows[:2])
    t = trainer(tmp_path / "b", on_bad_row="skip")
    for _ in range(2):
        t.evaluate(rows)
    assert t.last_evaluation is not None
    assert len(t.last_evaluation.prompt_ids) == 1
    assert listed(tmp_path / "b") == ["blank", "long"]  # once, not at every evaluation


def test_one_pass_makes_as_many_rounds_as_take_every_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    t = trainer(tmp_path, num_train_epochs=3, data_passes=1, prompts_per_round=5)
    t.train()
    assert t.state.num_train_epochs == 3  # 15 of 12 prompts
    assert t.args.num_train_epochs == 3  # as it was given
    assert json.loads((tmp_path / "run.json").read_text())["plan"]["rounds"] == 3
    assert [r.message.split("\n")[0] for r in caplog.records if "plan:" in r.message] == [
        "plan: 3 rounds of 5 prompts, 9 optimizer steps"
    ]
    files = sorted(tmp_path.glob("rounds/*/groups.parquet"))
    assert len({group.prompt_id for path in files for group in read_groups(path)}) == 12


def test_half_a_pass_stops_there_and_goes_on_when_more_are_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"num_train_epochs": 3, "prompts_per_round": 4}
    half = trainer(tmp_path, data_passes=0.5, **changes)
    half.train()
    assert half.state.num_train_epochs == 2  # 8 of 12 prompts
    with pytest.raises(ConfigError, match=r"data_passes was 0\.5 and is 1"):
        trainer(tmp_path, data_passes=1.0, **changes).train(resume_from_checkpoint=True)
    caplog.clear()
    whole = trainer(tmp_path, data_passes=1.0, allow_changes=True, **changes)
    whole.train(resume_from_checkpoint=True)
    assert whole.state.num_train_epochs == 3
    plan = json.loads((tmp_path / "run.json").read_text())["plan"]
    assert (plan["rounds"], plan["share_of_data"]) == (3, 1.0)
    assert any("6 optimizer steps (4 done)" in r.message for r in caplog.records)


def test_the_terminal_is_told_before_anything_is_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, LONG]))
    script = ScriptArguments(
        model_name_or_path=str(folder), dataset_name=str(data), holdout=2, reward_funcs=[]
    )
    args = config(
        tmp_path / "run", on_bad_row="skip", data_passes=1, num_train_epochs=3, rank_by="origin"
    )
    run_training(script, args, callbacks=terminal_callbacks(args))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "plan: 2 rounds of 8 prompts, 8 optimizer steps"
    assert max(len(line) for line in out[:5]) <= 80
    assert sum(line.startswith("plan:") for line in out) == 1
    assert len(listed(tmp_path / "run")) == 1


def test_an_expansion_says_its_share_and_takes_no_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, LONG]))
    script = ScriptArguments(model_name_or_path=str(folder), dataset_name=str(data))
    args = config(tmp_path / "run", on_bad_row="skip", rank_by="origin", num_train_epochs=3)
    write_expansion(script, args, tmp_path / "out.jsonl", "ranked")
    out = capsys.readouterr().out
    assert out.startswith(
        "plan: 1 round of 8 prompts\n"
        "data: 8 prompts: 66.7 % of the data (12 rows); prompts_per_round: 12 is all of\n  it\n"
    )
    assert listed(tmp_path / "run") == ["long"]
    passes = config(tmp_path / "other", rank_by="origin", data_passes=1, num_train_epochs=3)
    with pytest.raises(ConfigError, match="data_passes is 1 and expand makes one round"):
        write_expansion(script, passes, tmp_path / "other.jsonl", "ranked")


def test_held_out_rows_stay_held_out_whatever_fits(tmp_path: Path) -> None:
    """One that is too long is replaced; no other row changes its side."""
    texts = [f"{i} " + "x" * (300 if i % 7 == 0 else 3) for i in range(40)]
    rows = list(rows_from_dataset([asked(text, id=i) for i, text in enumerate(texts)]))
    held_out, train = rows[::5], [row for row in rows if row not in rows[::5]]
    train_then, held_then = refilled(train, held_out, lambda row: "xxxx" not in str(row.prompt))
    failed = {"0", "35"}
    kept = [row.id for row in held_out if row.id not in failed]
    assert [row.id for row in held_then][: len(kept)] == kept
    assert len(held_then) == len(held_out)
    assert not any("xxxx" in str(row.prompt) for row in held_then)
    assert failed <= {row.id for row in train_then}
    assert sorted(row.id for row in (*train_then, *held_then)) == sorted(r.id for r in rows)
    assert refilled(train, held_out, lambda row: True) == (train, held_out)
    assert refilled(train, held_out, lambda row: False) == ([*train, *held_out], [])


def test_as_many_rows_are_held_out_as_are_asked_for(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    data = tmp_path / "data.jsonl"
    texts = [f"{i} " + "x" * (300 if i % 5 == 0 else 3) for i in range(40)]
    data.write_text("".join(json.dumps(asked(text)) + "\n" for text in texts))
    script = ScriptArguments(
        model_name_or_path=str(folder), dataset_name=str(data), holdout=8, reward_funcs=[]
    )
    args = config(tmp_path / "run", on_bad_row="skip", rank_by="origin", max_prompt_length=100)
    made = build_trainer(script, args).parts.data
    assert (len(made.rows), len(made.eval_rows), made.skipped.count) == (24, 8, 8)
    assert not {row.id for row in made.rows} & {row.id for row in made.eval_rows}


def test_also_where_an_instruction_makes_some_too_long(tmp_path: Path) -> None:
    """Held-out prompts are sampled under instructions; the training prompts of this run are not."""
    folder = save_tiny(tmp_path / "model", "llama")
    data = tmp_path / "data.jsonl"
    texts = [f"{i} " + "?" * (470 if i % 5 == 0 else 3) for i in range(40)]
    data.write_text("".join(json.dumps(asked(text)) + "\n" for text in texts))
    script = ScriptArguments(
        model_name_or_path=str(folder), dataset_name=str(data), holdout=8, reward_funcs=[]
    )
    changes: dict[str, Any] = {"num_positive": 0, "num_negative": 0, "num_plain": 2}
    changes |= {"distil_weight": 1.0, "distil_toward": "sharpened", "ranking_loss": "none"}
    changes |= {"lm_weight": 0.0, "rank_by": "origin", "max_prompt_length": 500}
    args = config(tmp_path / "run", on_bad_row="skip", **changes)
    made = build_trainer(script, args).parts.data
    assert (len(made.rows), len(made.eval_rows), made.skipped.count) == (32, 8, 0)
    assert not any("????" in str(row.prompt) for row in made.eval_rows)
