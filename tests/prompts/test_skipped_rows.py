"""Rows that cannot be used: an error, or left out, counted and listed."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neat_align.errors import ConfigError, DataError, PromptError
from neat_align.prompts.loading import load_rows, rows_from_dataset
from neat_align.prompts.rendering import prompt_ids
from neat_align.prompts.row_checks import as_rows, check_prompts, is_usable
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.skipped_rows import SKIPPED_FILE, BadRows, SkippedRows
from tiny import BOS, IM_END, IM_START, tiny_tokenizer

USER = {"role": "user", "content": "Hi"}
TOKENIZER = tiny_tokenizer()


def lines_of(*rows: Any) -> bytes:
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
    )


def asked(text: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], **fields}


# Every kind of row that a file can hold and a run cannot use, and what is said of it.
BAD: list[tuple[Any, str]] = [
    (b'{"prompt": [', "not valid JSON"),
    (b'{"prompt": "caf\xe9"}', "not valid UTF-8 (byte 0xe9)"),
    (b'{"prompt": [{"role": "user", "content": "\\ud83d"}]}', "lone surrogate U+D83D"),
    (["a list"], "not an object with named fields"),
    (None, "the row is null"),
    ({}, "prompt is missing"),
    ({"prompt": 5}, "prompt is 5 (int)"),
    ({"prompt": []}, "prompt is an empty list of messages"),
    (asked(" "), "prompt must end with a user message that says something"),
    ({"prompt": [USER, {"role": "assistant", "content": "x"}]}, "ends with an assistant message"),
    ({"prompt": [{"role": "critic", "content": "x"}]}, "prompt[0].role is 'critic'"),
    ({"prompt": "text among messages"}, "prompt is text, but messages at"),
    (asked("again", id="one"), "id 'one' is also that of"),
    (asked("of no id", id=1.5), "id is 1.5 (float)"),
    (asked("same", chosen="x", rejected="x"), "chosen and rejected are the same"),
    (asked("bad answer", chosen=3), "chosen is 3 (int)"),
    (asked("answers", chosen=[USER]), "chosen must be one assistant message, not user"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_every_kind_of_bad_row_is_an_error_or_left_out(
    tmp_path: Path, bad: Any, reason: str
) -> None:
    good, last = asked("Hello", id="one"), asked("Bye", id="two")
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(good, bad, last))
    with pytest.raises(DataError, match=r"on_bad_row: skip leaves such rows out") as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    skipped = SkippedRows()
    rows = load_rows(path, on_bad_row="skip", skipped=skipped)
    assert [row.id for row in rows] == ["one", "two"]
    (listed,) = skipped
    assert listed["where"] == f"{path}:2"
    assert reason in str(listed["reason"])
    assert skipped.tallies[0].said().startswith(f"{path}: 1 of 3 rows; the first: ")


def test_without_a_list_a_warning_counts_them() -> None:
    with pytest.warns(UserWarning, match=r"train_dataset: 1 of 3 rows; the first: .*row 1: prompt"):
        rows = rows_from_dataset(
            [{"prompt": "a"}, {"prompt": ""}, {"prompt": "b"}], on_bad_row="skip"
        )
    assert [row.prompt for row in rows] == ["a", "b"]


def test_a_row_that_is_left_out_leaves_no_trace() -> None:
    """Neither its form, nor its id, nor its prompt counts for the rows after it."""
    rows = [
        {"id": 1, "prompt": "text first", "chosen": "x", "rejected": "x"},
        asked("messages are the form", id=1),
        asked("messages are the form", id=True),
        asked("no repeat of it", id=2),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = rows_from_dataset(rows, on_bad_row="skip", skipped=SkippedRows())
    assert [row.id for row in kept] == ["1", "2"]


def test_no_row_that_is_good_is_an_error_also_when_bad_ones_are_skipped() -> None:
    skipped = SkippedRows()
    with pytest.raises(
        DataError, match=r"train_dataset: 2 of 2 rows cannot be used:(.|\n)*no row is left"
    ):
        rows_from_dataset([{"prompt": ""}, {"x": 1}], on_bad_row="skip", skipped=skipped)


def test_most_rows_left_out_is_said_loudly() -> None:
    skipped = SkippedRows()
    rows_from_dataset(
        [{"prompt": "a"}, {"prompt": 1}, {"prompt": 2}], on_bad_row="skip", skipped=skipped
    )
    assert "MOST ROWS WERE LEFT OUT: 2 of 3" in skipped.tallies[0].said()


def test_an_unknown_word_for_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="on_bad_row is 'drop'; it must be one of error, skip"):
        rows_from_dataset([{"prompt": "a"}], on_bad_row="drop")


def test_other_files_and_data_sets(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": " "}, {"prompt": "b"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_bytes(b'prompt,n\na,1\n" ",2\ncaf\xe9,3\none,two,three\nb,4\n')
    for name, bad in (("list.json", 1), ("a.parquet", 1), ("a.csv", 3)):
        skipped = SkippedRows()
        kept = load_rows(tmp_path / name, on_bad_row="skip", skipped=skipped)
        assert ([row.prompt for row in kept], skipped.count) == (["a", "b"], bad), name
    assert "not valid UTF-8 (byte 0xe9)" in str(list(skipped)[1])
    skipped = SkippedRows()
    for given in (datasets.Dataset.from_list(rows), iter(rows)):
        kept = rows_from_dataset(given, on_bad_row="skip", skipped=skipped)
        assert [row.prompt for row in kept] == ["a", "b"]


def test_what_is_no_row_stays_an_error(tmp_path: Path) -> None:
    """Where one row ends and the next begins cannot be told, so nothing can be left out."""
    (tmp_path / "a.csv").write_text('prompt,n\na,1\n"open,2\nb,3\n')
    (tmp_path / "a.json").write_text('[{"prompt": "a"}, {"prompt" "b"}]')
    for name, said in (("a.csv", "not valid CSV"), ("a.json", "not valid JSON")):
        with pytest.raises(DataError, match=said):
            load_rows(tmp_path / name, on_bad_row="skip", skipped=SkippedRows())


# ---- the list ------------------------------------------------------------------------------------


def test_the_file_lists_every_row_once_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    skipped = SkippedRows()
    bad = BadRows("a.jsonl", "skip", skipped)
    bad.add("a.jsonl:1", "x\ud83d", "no “good”")
    bad.add("a.jsonl:2", None, "no good, either")
    bad.settle(8)
    for _ in range(2):
        skipped.write(tmp_path)
    path = tmp_path / SKIPPED_FILE
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
        {"where": "a.jsonl:1", "id": "x\ud83d", "reason": "no “good”"},
        {"where": "a.jsonl:2", "id": None, "reason": "no good, either"},
    ]
    assert [record.message for record in caplog.records] == [
        f"2 rows are left out and listed in {path}:\n"
        "  a.jsonl: 2 of 10 rows; the first: a.jsonl:1: no “good”"
    ]


def test_nothing_left_out_writes_and_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SkippedRows().write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert caplog.records == []


def test_the_same_list_is_taken_once() -> None:
    run = SkippedRows()
    for number in (1, 1, 2):
        found = SkippedRows()
        found.add("row", number, "bad")
        run.take(found)
    assert [line["id"] for line in run] == [1, 2]


def test_rows_of_earlier_rounds_stay_when_the_run_is_taken_up(tmp_path: Path) -> None:
    first, again = SkippedRows(), SkippedRows()
    first.add("a:1", "p", "of the data")
    first.add("a:2", "q", "of a round", round_index=0)
    first.write(tmp_path)
    again.add("a:1", "p", "of the data")
    again.write(tmp_path)
    assert '"id": "q"' in (tmp_path / SKIPPED_FILE).read_text()
    again.add("a:2", "q", "of a round", round_index=0)  # the round is made again
    again.add("a:3", "r", "of the next", round_index=1)
    again.write(tmp_path)
    lines = (tmp_path / SKIPPED_FILE).read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in lines) == ["p", "q", "r"]


def test_a_row_that_is_looked_at_alone_is_judged_as_among_others_and_warned_of_with_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A held-out row is looked at before the run's own check, which says what is odd, once."""
    data = [asked("Hi", chat_template_kwargs={"foo": 1}), asked("long " * 60)]
    rows = as_rows(data, "data")
    with caplog.at_level("WARNING", "neat_align"):
        alone = [is_usable(row, TOKENIZER, 40, conversational=True) for row in rows]
    assert not caplog.records
    kept = check_prompts(rows, TOKENIZER, 40, conversational=True, on_bad_row="skip").rows
    assert [row in kept for row in rows] == alone == [True, False]
    assert "gives foo" in caplog.text


def test_a_long_list_does_not_grow_in_memory(tmp_path: Path) -> None:
    skipped = SkippedRows()
    bad = BadRows("data", "skip", skipped)
    tracemalloc.start()
    try:
        for i in range(20_000):
            bad.add(f"data, row {i}", f"id-{i}", "reason " * 20)
        assert tracemalloc.get_traced_memory()[0] < 2.5e6
    finally:
        tracemalloc.stop()
    bad.settle(1)
    skipped.write(tmp_path)
    assert len((tmp_path / SKIPPED_FILE).read_text().splitlines()) == 20_000


# ---- prompts, tokenizer and template -------------------------------------------------------------


def row(name: str, prompt: Any) -> PromptRow:
    return PromptRow(name, prompt, None, None, {}, f"data, row {name}")


def test_prompts_that_a_tokenizer_refuses_are_left_out() -> None:
    rows = [
        row("good", [USER]),
        row("long", [{"role": "user", "content": "x" * 500}]),
        row("text", "text"),
        row("system", [{"role": "system", "content": "Be kind."}, USER]),
        row("refused", [USER, {"role": "assistant", "content": "raise"}, USER]),
        row("good, too", [USER, {"role": "assistant", "content": "yes"}, USER]),
    ]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{% if m.content == 'raise' %}"
        "{{ raise_exception('no such turn') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    skipped = SkippedRows()
    usable = check_prompts(
        rows, tokenizer, 100, conversational=True, on_bad_row="skip", skipped=skipped
    )
    assert [r.id for r in usable.rows] == ["good", "good, too"]
    assert list(usable.lengths) == [len(prompt_ids(tokenizer, r.prompt)) for r in usable.rows]
    found = {line["id"]: str(line["reason"]) for line in skipped}
    assert list(found) == ["long", "text", "system", "refused"]
    assert found["long"].endswith("tokens, over max_prompt_length=100")
    assert "prompt is text, but messages in the training data" in found["text"]
    assert "drops or changes the system turn prompt[0]" in found["system"]
    assert "no such turn" in found["refused"]
    with pytest.raises(PromptError, match=r"row refused: prompt: .*on_bad_row: skip"):
        check_prompts([rows[0], rows[4]], tokenizer, 100, conversational=True)
    with pytest.raises(DataError, match=r"1 prompts are longer .*on_bad_row: skip.*never cut"):
        check_prompts(rows[:2], tokenizer, 100, conversational=True)
    with pytest.raises(DataError, match="no row is left"):
        check_prompts(
            rows[1:3], tokenizer, 100, conversational=True, on_bad_row="skip", skipped=skipped
        )


def test_the_first_good_rows_are_looked_for_and_no_more() -> None:
    rows = [row(str(i), [USER] if i % 2 else "text") for i in range(10)]
    skipped = SkippedRows()
    usable = check_prompts(
        rows, TOKENIZER, 100, conversational=True, on_bad_row="skip", skipped=skipped, most=3
    )
    assert ([r.id for r in usable.rows], skipped.count) == (["1", "3", "5"], 3)
    assert check_prompts(rows[1:2], TOKENIZER, 100, conversational=True, most=0).rows == []


@pytest.mark.parametrize("bos", [False, True])
def test_prompts_tokenised_together_have_the_lengths_of_prompts_tokenised_alone(bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    texts = ["Hi", "é" * 30, f"what does {IM_END} mean?", IM_START, "a b\n" * 40, "\u2028x"]
    if bos:
        texts.append(f"{BOS}begins with it")
    prompts: list[Any] = [[{"role": "user", "content": t}] for t in texts]
    prompts += [[{"role": "system", "content": t}, USER] for t in texts]
    for kind, conversational in ((prompts, True), (texts, False)):
        rows = [row(str(i), p) for i, p in enumerate(kind)] * 40  # over one batch
        usable = check_prompts(rows, tokenizer, 10_000, conversational=conversational)
        assert list(usable.lengths) == [len(prompt_ids(tokenizer, r.prompt)) for r in rows]


# ---- work as the data grows ----------------------------------------------------------------------


class Counting:
    """A tokenizer that counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0
        self.inner = tiny_tokenizer()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def start(count: int, folder: Path) -> tuple[float, int]:
    """Peak bytes a row of reading and checking this many rows, and calls of the tokenizer."""
    path = folder / f"{count}.jsonl"
    with path.open("w") as file:
        for i in range(count):
            file.write(json.dumps(asked(f"{i} " + "word " * 60, chosen="yes", rejected="no")))
            file.write("\n")
    tokenizer = Counting()
    tracemalloc.start()
    try:
        rows = load_rows(path)
        peak = tracemalloc.get_traced_memory()[1]
        check_prompts(rows, tokenizer, 400, conversational=True)
    finally:
        tracemalloc.stop()
    return peak / count, tokenizer.calls


def test_memory_and_calls_are_linear_in_the_rows(tmp_path: Path) -> None:
    (few, few_calls), (many, many_calls) = start(200, tmp_path), start(2_000, tmp_path)
    assert many < 1.15 * few
    # 300 characters of prompt, and what objects cost: no second copy of the text beside the rows.
    assert many < 1_350
    assert (few_calls, many_calls) == (1, 8)
