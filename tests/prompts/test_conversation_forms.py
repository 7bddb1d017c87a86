"""Rows as axolotl, LLaMA-Factory and Alpaca have them, and what is made of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neat_align.errors import DataError
from neat_align.prompts.loading import load_rows, rows_from_dataset
from neat_align.prompts.rows import PromptRow


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def shared(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def one(row: dict[str, Any]) -> tuple[PromptRow, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (read,) = rows_from_dataset([row])
    return read, [str(w.message) for w in caught]


def refused(row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        rows_from_dataset([row])
    return str(caught.value)


USER, ANSWER = said("user", "How are you?"), said("assistant", "Fine.")


def test_sharegpt_with_an_answer() -> None:
    turns = [shared("system", "Be brief."), shared("human", "How are you?"), shared("gpt", "Fine.")]
    row, notes = one({"id": 5, "conversations": turns, "source": "web"})
    assert row.prompt == [said("system", "Be brief."), USER]
    assert (row.id, row.chosen, row.rejected, row.columns) == (
        "5",
        "Fine.",
        None,
        {"source": "web"},
    )
    assert notes == [
        "train_dataset: 1 of 1 rows are conversations (conversations): the last turn, an "
        "assistant's, is taken as chosen (the first: dataset 'train_dataset', row 0)"
    ]


def test_messages_that_end_with_the_user() -> None:
    row, notes = one({"messages": [USER, ANSWER, USER]})
    assert (row.prompt, row.chosen) == ([USER, ANSWER, USER], None)
    assert notes[0].startswith("train_dataset: 1 of 1 rows are conversations (messages) (the first")


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (shared("gpt", "Fine."), shared("gpt", "Go away.")),  # LLaMA-Factory's ranking
        (said("assistant", "Fine."), said("assistant", "Go away.")),  # axolotl's chat_template
        ([said("assistant", "Fine.")], [shared("gpt", "Go away.")]),
        ("Fine.", "Go away."),
    ],
)
def test_a_conversation_with_a_pair(chosen: Any, rejected: Any) -> None:
    given = {"conversations": [shared("human", "How are you?")], "system": "Be brief."}
    row, _ = one({**given, "chosen": chosen, "rejected": rejected})
    assert row.prompt == [said("system", "Be brief."), USER]
    assert (row.chosen, row.rejected, row.columns) == ("Fine.", "Go away.", {})


def test_tools_of_llama_factory() -> None:
    schema = {"name": "look", "description": "looks", "parameters": {"type": "object"}}
    turns = [
        shared("human", "Weather?"),
        shared("function_call", '{"name": "look", "arguments": {"at": "sky"}}'),
        shared("observation", "sunny"),
        shared("gpt", "It is sunny."),
    ]
    row, _ = one({"conversations": turns, "tools": json.dumps([schema])})
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    assert row.prompt == [
        said("user", "Weather?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        said("tool", "sunny"),
    ]
    assert row.chosen == "It is sunny."
    assert row.template_inputs.tools == [schema]


def test_alpaca() -> None:
    row, notes = one({"instruction": "Translate.", "input": "Haus", "output": "house"})
    assert (row.prompt, row.chosen, row.columns) == ("Translate.\nHaus", "house", {})
    assert "are Alpaca's: instruction and input are the prompt, output is chosen" in notes[0]
    row, _ = one({"instruction": "Hi.", "input": "", "chosen": "Hello.", "rejected": "No."})
    assert (row.prompt, row.chosen, row.rejected) == ("Hi.", "Hello.", "No.")


def test_trls_forms_stay_what_they_are() -> None:
    """UltraFeedback has prompt, whole conversations as answers, and messages beside them."""
    pair = {"chosen": [USER, ANSWER], "rejected": [USER, said("assistant", "No.")]}
    row, notes = one({"prompt": "How are you?", **pair, "messages": [USER, ANSWER]})
    assert (row.prompt, row.chosen, row.rejected, notes) == ([USER], "Fine.", "No.", [])
    row, notes = one({**pair, "messages": [USER, ANSWER]})
    assert (row.prompt, row.chosen, notes) == ([USER], "Fine.", [])
    row, _ = one({"prompt": "Say.", "instruction": "x", "system": "y"})
    assert (row.prompt, row.columns) == ("Say.", {"instruction": "x", "system": "y"})


def test_arrow_fills_in_nulls(tmp_path: Path) -> None:
    rows = [
        {"conversations": [shared("human", "a?"), shared("gpt", "b")], "instruction": None},
        {"conversations": [{**shared("human", "c?"), "weight": 1}], "instruction": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="are conversations"):
        read = load_rows(tmp_path / "a.parquet")
    assert [(r.prompt, r.chosen) for r in read] == [
        ([said("user", "a?")], "b"),
        ([said("user", "c?")], None),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": "hi"}, "conversations is 'hi'; it must be a list of turns, such as"),
        ({"messages": []}, "messages is []; it must be a list of turns"),
        ({"messages": ["hi"]}, "messages[0] is 'hi'; a turn must be an object"),
        (
            {"conversations": [shared("alien", "hi")]},
            "conversations[0].from is 'alien'; it must be one of human, user, gpt",
        ),
        ({"messages": [ANSWER]}, "messages holds nothing but an assistant's turn: drop the row"),
        ({"messages": [USER, ANSWER], "chosen": "x"}, "end the conversation with the user's turn"),
        ({"messages": [USER, said("system", "x")]}, "prompt must end with a user message"),
        (
            {"conversations": [shared("human", "a"), shared("function_call", "look()")]},
            "conversations[1].value is 'look()'; a function_call's must be JSON with name",
        ),
        ({"instruction": "a", "history": [["q", "a"]]}, "history is given beside instruction"),
        ({"instruction": "a", "output": 3}, "output is 3; it must be text"),
        ({"instruction": "a", "output": "x", "chosen": "y"}, "output and chosen are both given"),
        ({"instruction": " ", "output": "x"}, "prompt is blank"),
    ],
)
def test_what_is_wrong_is_said(row: dict[str, Any], message: str) -> None:
    assert message in refused(row)
