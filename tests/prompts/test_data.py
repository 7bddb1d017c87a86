"""What data.py reads, and what it refuses and how it says so."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neat_align.errors import DataError
from neat_align.prompts.loading import load_rows, rows_from_dataset
from neat_align.prompts.row_forms import to_conversation
from neat_align.prompts.rows import PromptRow, is_conversational

USER = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
SYSTEM = {"role": "system", "content": "Be brief."}
REAL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def write(path: Path, *rows: Any) -> Path:
    path.write_bytes(
        b"".join(
            (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
        )
    )
    return path


def refused(source: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(source, **options)
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_stray_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# ---- forms ---------------------------------------------------------------------------------------


def test_a_text_row(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"id": 7, "prompt": "Hi", "chosen": " a", "rejected": " b", "topic": "x"},
        b"",
        {"prompt": "Bye"},
    )
    with_id, without = load_rows(path)
    assert with_id == PromptRow("7", "Hi", " a", " b", {"topic": "x"}, f"{path}:1")
    assert (without.chosen, without.rejected, without.columns, without.where) == (
        None,
        None,
        {},
        f"{path}:3",
    )
    assert not is_conversational([with_id, without])
    assert not is_conversational([])


def test_prompt_id_and_messages() -> None:
    row = {"prompt_id": "p", "prompt": [SYSTEM, USER], "chosen": [BLUE], "rejected": [GREEN]}
    (read,) = rows_from_dataset([row])
    assert read == PromptRow(
        "p", [SYSTEM, USER], "It is blue.", "It is green.", {}, "dataset 'train_dataset', row 0"
    )
    assert is_conversational([read])
    assert to_conversation(read) is read


def test_answers_as_text_beside_a_conversation() -> None:
    (read,) = rows_from_dataset([{"prompt": [USER], "chosen": "It is blue."}])
    assert (read.prompt, read.chosen, read.rejected) == ([USER], "It is blue.", None)


def test_content_ids_are_stable_and_unique() -> None:
    rows = [{"prompt": "a", "x": 1}, {"prompt": "b"}]
    first, second = rows_from_dataset(rows)
    assert first.id == "915732a3799c5856"  # written down: a change of ids would change every seed
    assert [r.id for r in rows_from_dataset(rows[::-1], name="other")] == [second.id, first.id]
    with pytest.warns(UserWarning, match="repeat an earlier prompt"):
        again = rows_from_dataset([*rows, rows[0]])
    assert [r.id for r in again] == [first.id, second.id, f"{first.id}-2"]


# Left, what TRL's documentation and its rule (`extract_prompt`) give; made by hand.
@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("Q: sky?\nA: blue", "Q: sky?\nA: green", ("Q: sky?\nA:", " blue", " green")),
        ("Q: sky?\nblue", "Q: sky?\ngreen", ("Q: sky?\n", "blue", "green")),
        ("2+2=4", "2+2=5", ("2+2=", "4", "5")),
        ("a  b", "a  c", ("a ", " b", " c")),
        ([USER, BLUE], [USER, GREEN], ([USER], "It is blue.", "It is green.")),
        (
            [SYSTEM, USER, BLUE],
            [SYSTEM, USER, GREEN],
            ([SYSTEM, USER], "It is blue.", "It is green."),
        ),
        (
            [USER, BLUE, USER, BLUE],
            [USER, BLUE, USER, GREEN],
            ([USER, BLUE, USER], "It is blue.", "It is green."),
        ),
    ],
)
def test_implicit_prompt_as_trl_reads_it(chosen: Any, rejected: Any, expected: Any) -> None:
    (row,) = rows_from_dataset([{"chosen": chosen, "rejected": rejected}])
    assert (row.prompt, row.chosen, row.rejected) == expected


def test_a_text_prompt_beside_whole_conversations_gives_way_to_them() -> None:
    (row,) = rows_from_dataset(
        [{"prompt": "What color?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}]
    )
    assert (row.prompt, row.chosen, row.rejected) == ([USER], "It is blue.", "It is green.")


def test_a_split_inside_a_word_is_warned_of() -> None:
    with pytest.warns(
        UserWarning, match=r"1 of 1 rows have no prompt field, and what .* ends inside a word"
    ):
        (row,) = rows_from_dataset([{"chosen": "The sky is blue", "rejected": "The sky is black"}])
    assert (row.prompt, row.chosen) == ("The sky is bl", "ue")  # TRL's rule, to the letter


# ---- transcripts ---------------------------------------------------------------------------------

ONE_TURN = "\n\nHuman: Hi\n\nAssistant:"
TWO_TURNS = ONE_TURN + " Hello.\n\nHuman: Help\n\nAssistant:"


def test_whole_transcripts() -> None:
    (row,) = rows_from_dataset(
        [{"chosen": TWO_TURNS + " Yes, gladly.", "rejected": TWO_TURNS + " Yes, no."}]
    )
    assert (row.prompt, row.chosen, row.rejected) == (TWO_TURNS, "Yes, gladly.", "Yes, no.")
    talk = to_conversation(row)
    assert talk.prompt == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Help"},
    ]
    assert talk == replace(row, prompt=talk.prompt)


def test_transcripts_that_part_early_keep_the_prompt_without_the_answers() -> None:
    pair = {
        "chosen": TWO_TURNS + " Yes.",
        "rejected": ONE_TURN + " Go away.\n\nHuman: Why?\n\nAssistant: So.",
    }
    with pytest.warns(
        UserWarning,
        match=r"1 of 1 rows have a .* answer that goes on with more Human/Assistant turns",
    ):
        (row,) = rows_from_dataset([pair])
    assert (row.prompt, row.chosen, row.rejected) == (ONE_TURN, None, None)


def test_an_answer_with_a_second_assistant_mark_is_left_out() -> None:
    # HH-RLHF holds such: a turn without its blank line, so that the mark is inside the answer.
    pair = {"prompt": ONE_TURN, "chosen": "Yes.  Human: Why?\n\nAssistant: So.", "rejected": "No."}
    with pytest.warns(UserWarning, match="goes on with more Human/Assistant turns"):
        (row,) = rows_from_dataset([pair])
    assert (row.prompt, row.chosen, row.rejected) == (ONE_TURN, None, None)
    (row,) = rows_from_dataset([{**pair, "prompt": "Write a chat log."}])
    assert row.chosen == pair["chosen"]


def test_transcripts_that_share_no_turn() -> None:
    with pytest.raises(
        DataError,
        match=r"row 0: chosen and rejected are transcripts that differ before their first "
        r"Assistant turn",
    ):
        rows_from_dataset(
            [{"chosen": ONE_TURN + " a", "rejected": "\n\nHuman: Ho\n\nAssistant: a"}]
        )


def test_blank_answers_are_left_out_with_a_count(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"chosen": ONE_TURN + " a", "rejected": ONE_TURN + " "},
        {"prompt": "x", "chosen": "c", "rejected": "d"},
    )
    with pytest.warns(
        UserWarning,
        match=r"1 of 2 rows have a blank chosen or rejected answer; .* left out \(the first: "
        r".*a\.jsonl:1\)",
    ):
        rows = load_rows(path)
    assert [(r.prompt, r.chosen, r.rejected) for r in rows] == [
        (ONE_TURN, None, None),
        ("x", "c", "d"),
    ]


@pytest.mark.parametrize(
    ("text", "roles", "last"),
    [
        ("Tell me a joke", ["user"], "Tell me a joke"),
        (" spaces stay ", ["user"], " spaces stay "),
        ("Human: A Novel. Review it.", ["user"], "Human: A Novel. Review it."),
        (
            "Sum this up:\n\nHuman: a\n\nAssistant: b",
            ["user"],
            "Sum this up:\n\nHuman: a\n\nAssistant: b",
        ),
        ("Human: a\n\nAssistant:", ["user"], "a"),
        ("\n\nHuman: a", ["user"], "a"),
        ("Be kind.\n\nHuman: a\n\nAssistant: ", ["system", "user"], "a"),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", ["user"], "a\n\nb"),
        ("\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant:", ["user"], "a\n\nb"),
    ],
)
def test_to_conversation(text: str, roles: list[str], last: str) -> None:
    (row,) = rows_from_dataset([{"prompt": text}])
    assert row.prompt == text
    messages = to_conversation(row).prompt
    assert isinstance(messages, list)
    assert ([m["role"] for m in messages], messages[-1]["content"]) == (roles, last)


def test_real_transcripts_agree_with_the_split_file() -> None:
    whole, split = REAL / "hh_harmless_dev_transcripts.jsonl", REAL / "hh_harmless_dev.jsonl"
    if not (whole.exists() and split.exists()):
        pytest.skip("the HH-RLHF development files are not beside this checkout")
    with pytest.warns(UserWarning, match="1 of 1148 rows repeat an earlier prompt"):
        a = load_rows(whole)
    with pytest.warns(UserWarning, match="1 of 1148 rows repeat an earlier prompt"):
        b = load_rows(split)
    assert len(a) == len(b) == 1148
    same = sum(
        (x.prompt, x.chosen, x.rejected) == (y.prompt, y.chosen, y.rejected)
        for x, y in zip(a, b, strict=True)
    )
    assert same >= 0.99 * len(a)
    assert all(x.chosen and x.rejected for x in a)
    assert all(
        m["content"].strip() for x in a for m in to_conversation(x).prompt if isinstance(m, dict)
    )


# ---- refusals ------------------------------------------------------------------------------------

GOOD = {"prompt": "fine"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"prompt": "x"', "not valid JSON at column"),
        (b"\xff\xfe", "not valid UTF-8 (byte 0xff): save the file as UTF-8"),
        (b'{"prompt": "caf\xe9"}', "not valid UTF-8 (byte 0xe9)"),
        (b'{"prompt": "a \\ud83d b"}', "'prompt' holds the lone surrogate U+D83D"),
        (b'{"prompt": "a", "tags": [{"t": "\\udc00"}]}', "'tags' holds the lone surrogate U+DC00"),
        (b'{"prompt": "a", "\\udc00": 1}', "'\\udc00' holds the lone surrogate U+DC00"),
        ([1, 2], "the row is [1, 2], not an object with named fields"),
        ("text", "the row is 'text', not an object"),
        (None, "the row is null, not an object"),
        ({}, "prompt is missing (the row has no fields)"),
        (
            {"text": "x", "label": 1},
            "prompt is missing (the row has text, label): give prompt, or both chosen and rejected",
        ),
        ({"chosen": "x"}, "prompt is missing (the row has chosen)"),
        ({"prompt": None}, "prompt is null; it must be text or a list of messages"),
        ({"prompt": None, "chosen": "a b", "rejected": "a c"}, "prompt is null"),
        ({"prompt": 5}, "prompt is 5 (int); it must be text"),
        ({"prompt": ""}, "prompt is blank ('')"),
        ({"prompt": " \n\t"}, "prompt is blank (' \\n\\t'): write one, or drop the row"),
        (
            {"prompt": '[{"role": "user", "content": "x"}]'},
            "prompt is a list of messages written as text",
        ),
        (
            {"prompt": "[{'content': 'x', 'role': 'user'}]"},
            "prompt is a list of messages written as text",
        ),
        (
            {"prompt": ONE_TURN + " Sure."},
            "prompt is a transcript that does not end with a Human turn: split the last Assistant "
            "turn off",
        ),
        (
            {"prompt": "\n\nHuman: \n\nAssistant:"},
            "prompt is a transcript that does not end with a Human turn",
        ),
        ({"prompt": "x", "id": True}, "id is True (bool); it must be text or a whole number"),
        ({"prompt": "x", "prompt_id": 1.5}, "prompt_id is 1.5 (float)"),
        ({"prompt": "x", "id": " "}, "id is ' '"),
        (
            {"prompt": "x", "chosen": 3},
            "chosen is 3 (int); it must be text or a list with one assistant message",
        ),
        (
            {"prompt": "x", "chosen": "same", "rejected": "same"},
            "chosen and rejected are the same, so there is nothing to prefer: drop",
        ),
        (
            {"chosen": ONE_TURN + " a", "rejected": ONE_TURN + " a"},
            "chosen and rejected are the same",
        ),
        (
            {"chosen": ONE_TURN + " a", "rejected": ONE_TURN + "  a"},
            "chosen and rejected are the same",
        ),
        (
            {"chosen": "a b", "rejected": None},
            "rejected is null; without a prompt, chosen and rejected must be both text or both "
            "messages",
        ),
        ({"chosen": "a b", "rejected": [USER, BLUE]}, "rejected is [{'role': 'user'"),
        (
            {"chosen": "Yes", "rejected": "No"},
            "prompt is missing, and chosen and rejected share no beginning: add a prompt field",
        ),
        (
            {"chosen": " Yes", "rejected": " No"},
            "prompt is missing, and chosen and rejected share no beginning",
        ),
        (
            {"chosen": "It is", "rejected": "It is blue"},
            "one is the beginning of the other, so the prompt's end cannot be told",
        ),
    ],
)
def test_a_bad_row_of_text_data(tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, bad)
    text = refused(path)
    assert text.startswith(f"{path}:2: ")
    assert message in text


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": []}, "prompt is an empty list of messages"),
        (
            {"prompt": ["hi"]},
            "prompt[0] is 'hi'; a message must be an object with role and content",
        ),
        (
            {"prompt": [{"from": "human", "value": "hi"}]},
            "prompt[0].role is null; it must be one of system, user, assistant",
        ),
        (
            {"prompt": [USER, BLUE, {"role": "function", "content": "x"}]},
            "prompt[2].role is 'function'; it must be one of",
        ),
        (
            {"prompt": [{"role": "user", "content": None}]},
            "prompt[0].content is null; it must be text",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]},
            "prompt[0].content has parts of type image; neat-align trains on text",
        ),
        ({"prompt": [{"role": "user"}]}, "prompt[0].content is null"),
        ({"prompt": [{**USER, "name": "Bob"}]}, "prompt[0] also has name, which would be lost"),
        (
            {"prompt": [USER, BLUE]},
            "prompt ends with an assistant message: split it off into chosen",
        ),
        (
            {"prompt": [SYSTEM]},
            "prompt must end with a user message that says something, not {'role': 'system'",
        ),
        (
            {"prompt": [{"role": "user", "content": " "}]},
            "prompt must end with a user message that says something",
        ),
        (
            {"prompt": [USER], "chosen": [BLUE, GREEN]},
            "chosen must be one assistant message, not assistant, assistant",
        ),
        (
            {"prompt": [USER], "chosen": [USER, BLUE]},
            "chosen must be one assistant message, not user, assistant: move earlier turns",
        ),
        ({"prompt": [USER], "rejected": []}, "rejected must be one assistant message, not nothing"),
        (
            {"prompt": [USER], "rejected": [USER]},
            "rejected must be one assistant message, not user",
        ),
        (
            {"chosen": [USER, BLUE, GREEN], "rejected": [USER, GREEN]},
            "chosen must be one assistant message, not assistant, assistant",
        ),
        (
            {"chosen": [USER], "rejected": [USER, GREEN]},
            "chosen must be one assistant message, not nothing",
        ),
        (
            {"chosen": [USER, BLUE, BLUE], "rejected": [USER, BLUE, GREEN]},
            "prompt ends with an assistant message",
        ),
        (
            {"chosen": [BLUE], "rejected": [GREEN]},
            "chosen and rejected share no first message to be the prompt",
        ),
        (
            {"prompt": "x", "chosen": [BLUE], "rejected": [GREEN]},
            "chosen and rejected share no first message to be the prompt",
        ),
        ({"chosen": [USER, BLUE], "rejected": [USER, BLUE]}, "chosen and rejected are the same"),
        ({"prompt": "now text"}, "prompt is text, but messages at "),
    ],
)
def test_a_bad_row_of_conversations(tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"prompt": [USER]}, bad)
    text = refused(path)
    assert text.startswith(f"{path}:2: ")
    assert message in text


def test_answers_in_two_forms() -> None:
    with pytest.raises(
        DataError,
        match=r"row 1: chosen is text, but messages at dataset 'train_dataset', row 0: use one "
        r"form",
    ):
        rows_from_dataset(
            [
                {"prompt": [USER], "chosen": [BLUE]},
                {"prompt": [SYSTEM, USER], "chosen": "It is blue."},
            ]
        )


def test_ids_must_be_unique(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"})
    said, advice = refused(path).split("\n  ")
    assert (
        said
        == f"{path}:2: id '1' is also that of {path}:1: make ids unique, or leave the field out"
    )
    assert advice == "(on_bad_row: skip leaves such rows out, counts them and lists them)"


def test_repeated_prompts_are_counted_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"prompt": p, "n": n} for n, p in enumerate("abaa")))
    with pytest.warns(UserWarning, match="repeat") as caught:
        assert len(load_rows(path)) == 4
    assert [str(w.message) for w in caught] == [
        f"{path}: 2 of 4 rows repeat an earlier prompt; they are kept and weigh more: drop them "
        f"if that is not meant (the first: {path}:3)"
    ]


def test_errors_are_gathered_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, b"{", *({"prompt": n} for n in range(7)))
    lines = refused(path).split("\n  ")
    assert lines[0] == f"{path}: 8 of 9 rows cannot be used:"
    assert [line.startswith(f"{path}:{n}: ") for n, line in enumerate(lines[1:6], 2)] == [True] * 5
    assert lines[6:] == [
        "… and 3 more",
        "(on_bad_row: skip leaves such rows out, counts them and lists them)",
    ]


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_no_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content in (b"", b"\n \n", b"\xef\xbb\xbf"):
        path.write_bytes(content)
        assert refused(path) == f"{path}: no rows: it is empty; a row with a prompt is needed"
    with pytest.raises(DataError, match="train_dataset: no rows"):
        rows_from_dataset([])


def test_files_that_are_not_there_or_not_readable(tmp_path: Path) -> None:
    assert "there is no such file or folder" in refused(tmp_path / "none")
    assert "there is no such file or folder" in refused("none.jsonl")
    assert "there is no such file or folder" in refused("./a/b/none")
    text = tmp_path / "a.txt"
    text.write_text("x")
    assert (
        refused(text)
        == f"{text}: files of type .txt are not read; use one of .jsonl, .json, .parquet, .csv, as "
        "it is or packed (.gz, .bz2, .xz, .zst, .lz4)"
    )
    broken = tmp_path / "a.parquet"
    broken.write_bytes(b"PAR1 no")
    assert f"{broken}: cannot be read as Parquet" in refused(broken)
    good = write(tmp_path / "a.jsonl", GOOD)
    assert "has no splits: remove split" in refused(good, split="test")
    assert "limit is 0; it must be 1 or more" in refused(good, limit=0)


def test_byte_order_mark_separators_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + '{"prompt": "a\u2028b\x85"}\r\n{"prompt": "c"}\nbroken'.encode()
    )
    assert [r.prompt for r in load_rows(str(path), limit=2)] == ["a\u2028b\x85", "c"]
    assert f"{path}:3: not valid JSON" in refused(path)


def test_json_lists_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD, {"prompt": "x"}], indent=1))
    assert [(r.prompt, r.where) for r in load_rows(path)] == [
        ("fine", f"{path}, row 0"),
        ("x", f"{path}, row 1"),
    ]
    path.write_text(json.dumps([GOOD, {"prompt": 1}]))
    assert refused(path).startswith(f"{path}, row 1: prompt is 1 (int)")
    path.write_text('[\n{"prompt": "a"},\n{"prompt" "b"}]')
    assert refused(path).startswith(f"{path}:3: not valid JSON at column 11")
    path.write_bytes(b'[\n{"prompt": "\xff"}]')
    assert refused(path).startswith(f"{path}:2: not valid UTF-8 (byte 0xff)")
    write(path, GOOD, {"prompt": "x"})
    assert [r.where for r in load_rows(path)] == [f"{path}:1", f"{path}:2"]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        '\ufeffid,prompt,chosen,rejected,note\n1,"two\nlines",c,,\n\n,"x, y",c,d,n\n'.encode()
    )
    first, second = load_rows(path)
    assert first == PromptRow("1", "two\nlines", "c", None, {"note": ""}, f"{path}:2")
    assert (second.prompt, second.rejected, second.columns["note"], second.where) == (
        "x, y",
        "d",
        "n",
        f"{path}:5",
    )
    for content, where, message in (
        (b"", 1, "the header is []; it must name prompt"),
        (
            b"hello,there\nx,y\n",
            1,
            "the header is ['hello', 'there']; it must name prompt, or chosen and rejected",
        ),
        (b"prompt,prompt\nx,y\n", 1, "no column twice"),
        (b"prompt,a\nx,y\nx\n", 3, "1 fields where the header has 2"),
        (b'prompt,a\nx,y\n"x"z,y\n', 3, "not valid CSV"),
        (b"prompt\nx\n\xff\n", 3, "not valid UTF-8 (byte 0xff)"),
        (b"prompt,a\nx,y\n ,y\n", 3, "prompt is blank (' ')"),
    ):
        path.write_bytes(content)
        assert refused(path).startswith(f"{path}:{where}: ")
        assert message in refused(path)
    path.write_bytes(b"prompt\n")
    assert refused(path) == f"{path}: no rows: it is empty; a row with a prompt is needed"


def test_parquet_columns_come_from_the_file_only(tmp_path: Path) -> None:
    folder = tmp_path / "year=2024"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([GOOD]), folder / "a.parquet")
    assert [(r.columns, r.where) for r in load_rows(folder / "a.parquet")] == [
        ({}, f"{folder / 'a.parquet'}, row 0")
    ]


def test_datasets(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(
        [{"prompt": [USER], "n": 1}, {"prompt": [SYSTEM, USER], "n": 2}]
    )
    expected = [([USER], {"n": 1}), ([SYSTEM, USER], {"n": 2})]
    assert [(r.prompt, r.columns) for r in rows_from_dataset(one.with_format("numpy"))] == expected
    assert [(r.prompt, r.columns) for r in rows_from_dataset(one.to_iterable_dataset())] == expected
    one.save_to_disk(tmp_path / "one")
    rows = load_rows(tmp_path / "one", limit=1)
    assert [(r.prompt, r.where) for r in rows] == [([USER], f"dataset '{tmp_path / 'one'}', row 0")]
    assert "holds one data set without splits: remove split" in refused(
        tmp_path / "one", split="train"
    )
    both = datasets.DatasetDict({"test": one.select([1]), "train": one.select([0])})
    both.save_to_disk(tmp_path / "both")
    assert [r.columns["n"] for r in load_rows(tmp_path / "both")] == [1]
    assert [r.columns["n"] for r in load_rows(tmp_path / "both", split="test")] == [2]
    assert "there is no split 'dev'; set split to one of test, train" in refused(
        tmp_path / "both", split="dev"
    )
    datasets.DatasetDict({"a": one, "b": one}).save_to_disk(tmp_path / "ab")
    assert "there is no split 'train'; set split to one of a, b" in refused(tmp_path / "ab")
    with pytest.raises(
        DataError, match="train_dataset is a dict of test, train; it must be one data set"
    ):
        rows_from_dataset(both)
    with pytest.raises(
        DataError,
        match=r"eval_dataset is 'x.jsonl'; it must be one data set .* read a file with load_rows",
    ):
        rows_from_dataset("x.jsonl", name="eval_dataset")


def test_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.load

    asked = []

    def fake(name: str, split: str | None = None) -> Any:
        asked.append((name, split))
        if name == "no/where":
            raise FileNotFoundError("no such data set")
        one = datasets.Dataset.from_list([GOOD])
        return one if split else datasets.DatasetDict({"train": one})

    monkeypatch.setattr(datasets.load, "load_dataset", fake)
    assert load_rows("some/data.set")[0].where == "dataset 'some/data.set', row 0"
    assert load_rows("some/data.set", split="train[:1]")[0].prompt == "fine"
    assert asked == [("some/data.set", None), ("some/data.set", "train[:1]")]
    assert (
        refused("no/where")
        == "no/where: there is no such file, and it cannot be loaded as a data set: no such data "
        "set"
    )


# ---- round trips ---------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["\0", "a\0b", "👩‍👩‍👧 🇨🇭", "\ufeffx", "\r\n\x85\u2029"]
)
says_something = texts.filter(lambda t: bool(t.strip()))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(says_something, says_something, says_something, texts), min_size=1, max_size=4
    ),
    st.booleans(),
    st.booleans(),
)
def test_any_text_survives(
    tmp_path: Path, items: list[tuple[str, str, str, str]], talk: bool, escape: bool
) -> None:
    rows: list[dict[str, Any]] = []
    for n, (prompt, chosen, rejected, other) in enumerate(items):
        message = [{"role": "user", "content": prompt}]
        rows.append(
            {
                "id": n,
                "prompt": message if talk else f"{n}{prompt}",
                "chosen": f"+{chosen}",
                "rejected": f"-{rejected}",
                "other": other,
            }
        )
    (tmp_path / "a.jsonl").write_bytes(
        b"".join(json.dumps(r, ensure_ascii=escape).encode() + b"\n" for r in rows)
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of repeated prompts
            read = load_rows(tmp_path / name)
        assert [
            {
                "id": int(r.id),
                "prompt": r.prompt,
                "chosen": r.chosen,
                "rejected": r.rejected,
                **r.columns,
            }
            for r in read
        ] == rows


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(says_something.filter(lambda t: "[" not in t and not t.startswith("\ufeff")))
def test_any_text_survives_csv(tmp_path: Path, text: str) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["prompt"], [text]])
    assert [r.prompt for r in load_rows(tmp_path / "a.csv")] == [text]


def test_the_import_is_light() -> None:
    code = (
        "import sys, neat_align.prompts.loading; print([m for m in ('torch', 'datasets', "
        "'transformers', 'pyarrow') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
