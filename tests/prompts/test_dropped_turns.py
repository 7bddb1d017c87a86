"""`drop_old_turns`: conversations that are too long lose their oldest turns, and nothing else."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neat_align import NEATTrainer
from neat_align.errors import DataError
from neat_align.pipeline import build_trainer
from neat_align.prompts.dropped_turns import without_old_turns
from neat_align.prompts.instructed_limit import InstructedLimit
from neat_align.prompts.loading import rows_from_dataset
from neat_align.prompts.row_checks import check_prompts, is_usable
from neat_align.prompts.row_prompts import instructed_ids, row_prompt_ids
from neat_align.prompts.rows import Message, PromptRow
from neat_align.prompts.skipped_rows import SkippedRows
from neat_align.script_arguments import ScriptArguments
from small_trainer import TOKENIZER, config, count_e
from tiny import save_tiny, tiny_model


def said(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def row_of(*turns: Message, row_id: str = "a") -> PromptRow:
    (row,) = rows_from_dataset([{"id": row_id, "prompt": list(turns)}])
    return row


LONG = "tell me of it " * 4
TALK = (
    said("system", "Be kind."),
    said("user", f"1 {LONG}"),
    said("assistant", f"2 {LONG}"),
    said("user", f"3 {LONG}"),
    said("assistant", f"4 {LONG}"),
    said("user", "5 and now?"),
)


def tokens(*turns: Message) -> int:
    return len(row_prompt_ids(TOKENIZER, row_of(*turns)))


def checked(rows: list[PromptRow], limit: int, **options: Any) -> list[PromptRow]:
    found = check_prompts(
        rows, TOKENIZER, limit, conversational=True, drop_old_turns=True, **options
    )
    assert list(found.lengths) == [len(row_prompt_ids(TOKENIZER, row)) for row in found.rows]
    return found.rows


def test_the_oldest_turns_go_and_the_system_turn_stays(caplog: pytest.LogCaptureFixture) -> None:
    whole, shorter, shortest = tokens(*TALK), tokens(TALK[0], *TALK[3:]), tokens(TALK[0], TALK[5])
    assert whole > shorter > shortest
    row = row_of(*TALK)
    assert checked([row], whole) == [row]
    assert not caplog.records
    for limit, kept in (
        (whole - 1, [TALK[0], *TALK[3:]]),
        (shorter, [TALK[0], *TALK[3:]]),
        (shorter - 1, [TALK[0], TALK[5]]),
        (shortest, [TALK[0], TALK[5]]),
    ):
        (found,) = checked([row], limit)
        assert found.prompt == kept
        assert (found.id, found.where) == (row.id, row.where)
    assert caplog.messages[0] == (
        f"training data: 1 conversation is too long (max_prompt_length={whole - 1}) and used "
        "without the oldest turns: 2 turns in all; the first: dataset 'train_dataset', row 0, 2 of "
        "6"
    )
    with pytest.raises(DataError, match=f"1 prompts are longer than max_prompt_length={shortest}"):
        check_prompts([row], TOKENIZER, shortest, conversational=True)
    with pytest.raises(DataError, match=rf"row 0 \({whole}\)"):  # the last turns alone are too long
        checked([row], shortest - 1)


def test_a_tools_result_never_stands_without_its_call() -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}],
    }
    talk = [said("user", f"a {LONG}"), said("assistant", LONG), said("user", "b"), call]
    talk.append({"role": "tool", "content": "sunny", "name": "look"})
    # As many turns as are left of the four that fit.
    found = without_old_turns(row_of(*talk), lambda row: len(row.prompt) <= 4)
    assert found is not None
    assert found.prompt == talk[2:]
    assert without_old_turns(row_of(*talk), lambda row: len(row.prompt) <= 2) is None


def test_text_prompts_are_not_cut() -> None:
    text = rows_from_dataset([{"prompt": "word " * 90}])
    with pytest.raises(DataError, match="longer than max_prompt_length=10"):
        check_prompts(text, TOKENIZER, 10, conversational=False, drop_old_turns=True)


def test_what_does_not_fit_in_any_way_is_skipped_and_listed() -> None:
    rows = [row_of(*TALK, row_id="a"), row_of(said("user", LONG * 9), row_id="b")]
    skipped = SkippedRows()
    kept = checked(rows, tokens(*TALK) - 1, on_bad_row="skip", skipped=skipped)
    assert [row.id for row in kept] == ["a"]
    assert [entry["id"] for entry in skipped] == ["b"]


def test_the_context_under_an_instruction_counts() -> None:
    row, instruction = row_of(*TALK), "Answer as if everything was fine. " * 3
    plain = len(row_prompt_ids(TOKENIZER, row))
    longest = len(instructed_ids(TOKENIZER, row, instruction, "user_suffix"))
    limit = InstructedLimit(longest + 9, 10, (instruction,), "user_suffix", 2 * (longest - plain))
    (found,) = checked([row], plain, instructed=limit)
    assert found.prompt == [TALK[0], *TALK[3:]]
    assert not is_usable(row, TOKENIZER, plain, conversational=True, instructed=limit)
    assert is_usable(
        row, TOKENIZER, plain, conversational=True, instructed=limit, drop_old_turns=True
    )


texts = st.text(st.characters(codec="ascii", categories=["L", "Zs"]), min_size=1, max_size=60)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Any order of turns that ends with a user's, sometimes after system turns."""
    roles = draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=9))
    head = ["system"] * draw(st.integers(0, 2))
    return [said(role, draw(texts)) for role in [*head, *roles]] + [said("user", f"x{draw(texts)}")]


@settings(max_examples=150, deadline=None)
@given(conversations(), st.integers(1, 250))
def test_what_is_left_is_the_longest_that_fits(talk: list[Message], limit: int) -> None:
    """Against every way to drop turns, tried one by one."""
    head = next(i for i, turn in enumerate(talk) if turn["role"] != "system")
    system, rest = talk[:head], talk[head:]
    ways = [[*system, *rest[i:]] for i in range(len(rest)) if i == 0 or rest[i]["role"] == "user"]
    fitting = [way for way in ways if tokens(*way) <= limit]
    row = row_of(*talk)
    if not fitting:
        with pytest.raises(DataError, match="longer than max_prompt_length"):
            checked([row], limit)
        return
    (found,) = checked([row], limit)
    assert found.prompt == fitting[0]
    usable = is_usable(row, TOKENIZER, limit, conversational=True, drop_old_turns=True)
    assert usable


def test_a_run_says_it_and_keeps_held_out_prompts_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    last = said("user", "what now?")
    rows: list[dict[str, Any]] = [
        {"id": "long", "prompt": list(TALK)},
        {"id": "same", "prompt": [said("user", LONG * 9), said("assistant", "ok"), last]},
        *({"id": f"short {i}", "prompt": [said("user", f"{i}?")]} for i in range(4)),
    ]
    with caplog.at_level(logging.WARNING):
        trainer = NEATTrainer(
            model,
            count_e,
            config(tmp_path / "run", max_prompt_length=tokens(*TALK) - 1, drop_old_turns=True),
            train_dataset=rows,
            eval_dataset=[{"id": "held", "prompt": [last]}],
            processing_class=TOKENIZER,
        )
    assert "1 training prompts are left out: without the oldest turns they are held" in caplog.text
    assert [row.id for row in trainer.parts.data.rows] == [
        "long",
        *(f"short {i}" for i in range(4)),
    ]
    with trainer.writing():
        trainer.open_run(None)
    trainer.parts.record_start()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["shortened_rows"] == 1


def test_rows_to_hold_out_may_be_shortened(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    data = tmp_path / "data.jsonl"
    talks = [[*TALK[:5], said("user", f"{i} and now?")] for i in range(8)]
    data.write_text("".join(json.dumps({"id": i, "prompt": t}) + "\n" for i, t in enumerate(talks)))
    script = ScriptArguments(
        model_name_or_path=str(tmp_path / "model"),
        dataset_name=str(data),
        reward_funcs=["small_trainer:count_e"],
        holdout=2,
    )
    limit = max(tokens(*talk) for talk in talks) - 8
    args = config(tmp_path / "run", max_prompt_length=limit, drop_old_turns=True, on_bad_row="skip")
    trainer = build_trainer(script, args)
    assert [len(trainer.parts.data.rows), len(trainer.parts.data.eval_rows)] == [6, 2]
    assert all(row.prompt[:2] == [TALK[0], TALK[3]] for row in trainer.parts.data.eval_rows)
