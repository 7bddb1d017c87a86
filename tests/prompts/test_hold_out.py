"""Rows that are kept back for evaluation: a number that fits the data, and a word about it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neat_align.errors import ConfigError
from neat_align.pipeline import load_data
from neat_align.prompts.hold_out import held_out_count, hold_out
from neat_align.prompts.loading import rows_from_dataset
from neat_align.prompts.rows import PromptRow
from neat_align.script_arguments import ScriptArguments


def rows_of(*texts: str) -> list[PromptRow]:
    return rows_from_dataset([{"prompt": text} for text in texts])


def written(folder: Path, *texts: str) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("prompts", "asked", "count"),
    [
        (12, None, 3),  # a quarter
        (2, None, 1),
        (7, None, 1),
        (255, None, 63),
        (256, None, 64),
        (1_000_000, None, 64),
        (12, 5, 5),  # what was asked for and leaves something to train on
        (12, 11, 11),
        (12, 12, 3),
        (12, 64, 3),
        (100, 64, 64),
        (3, 3, 1),
    ],
)
def test_how_many_are_held_out(prompts: int, asked: int | None, count: int) -> None:
    assert held_out_count(prompts, asked) == count


@given(
    texts=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40),
    asked=st.one_of(st.none(), st.integers(1, 50)),
)
def test_both_sides_have_a_prompt_wherever_there_are_two(
    texts: list[str], asked: int | None
) -> None:
    rows = rows_of(*texts)
    if len(set(texts)) == 1:
        with pytest.raises(ConfigError, match="data has one prompt"):
            hold_out(rows, asked, "data")
        return
    held, _ = hold_out(rows, asked, "data")
    prompts = {row.prompt for row in held}
    assert 1 <= len(prompts) < len(set(texts))


def test_twelve_rows_are_enough_and_the_terminal_says_what_was_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, notices = written(tmp_path, *"abcdefghijkl"), list[str]()
    rows, held = load_data(ScriptArguments(dataset_name=path), notices=notices)
    assert (len(rows), [row.prompt for row in held]) == (9, ["a", "e", "i"])
    assert notices == [
        "prompts.jsonl has 12 different prompts: 3 are held out to measure the result, not 64; "
        "holdout sets another number. So few measure a change only roughly."
    ]
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(logging.WARNING, notices[0])]
    caplog.clear()
    rows, held = load_data(ScriptArguments(dataset_name=path, holdout=5), notices=[])
    assert (len(rows), len(held), caplog.records) == (7, 5, [])
    assert load_data(ScriptArguments(dataset_name=path, holdout=0))[1] == []


def test_one_prompt_cannot_be_on_both_sides(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_data(ScriptArguments(dataset_name=written(tmp_path, "What now?", "What now?")))
    assert str(raised.value) == (
        "prompts.jsonl has one prompt (2 rows), and none can be held out of it to measure the "
        "result: set holdout to 0 to train without measuring, give eval_dataset_name, or add "
        "prompts"
    )
    path = written(tmp_path, "What now?")
    assert len(load_data(ScriptArguments(dataset_name=path, holdout=0))[0]) == 1


def test_the_demo_holds_out_all_that_it_has_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert len(load_data(ScriptArguments(dataset_name="demo", holdout=100))[1]) == 64
    assert caplog.messages == ["the demo holds 64 prompts out, not 100 as holdout asks for"]
