from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neat_align.config import NEATConfig
from neat_align.files.atomic import (
    append_json_line,
    read_json,
    sha256_of,
    write_atomic,
    write_json,
    write_table,
)
from neat_align.files.secrets import redacted
from neat_align.runs.record import write_run_record


class Interrupted(BaseException):
    """Like KeyboardInterrupt: no subclass of Exception."""


# ---- whole or not at all -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError, Interrupted])
@pytest.mark.parametrize("existing", [b"old", None])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, error: type[BaseException], existing: bytes | None
) -> None:
    path = tmp_path / "file.bin"
    if existing is not None:
        path.write_bytes(existing)

    def fail(file: IO[bytes]) -> None:
        file.write(b"half of the new")
        file.flush()
        raise error("the disk is full")

    with pytest.raises(error):
        write_atomic(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == (["file.bin"] if existing is not None else [])
    assert not path.exists() or path.read_bytes() == existing


def test_a_write_that_cannot_be_renamed_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "taken", lambda file: file.write(b"x"))
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def look(file: IO[bytes]) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    write_atomic(path, look)
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_folders_are_made_and_files_are_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomic(path, lambda file: file.write(b"x"))
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}])
def test_what_is_not_json_is_refused_and_the_old_file_stays(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, value)
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["facts.json"]


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"text": "é 🙂 \x00 \u2028", "numbers": [1, 2.5, None], "path": Path("x/y")}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == {**value, "path": "x/y"}
    assert "🙂" in (tmp_path / "a.json").read_text("utf-8")


def test_a_lone_surrogate_does_not_stop_a_record(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"text": "\ud83d"})
    assert read_json(tmp_path / "a.json") == {"text": "\ud83d"}


def test_lines_are_appended_one_object_each(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    append_json_line(path, {"step": 1, "note": "two\nlines"})
    append_json_line(path, {"step": 2})
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
        {"step": 1, "note": "two\nlines"},
        {"step": 2},
    ]


def test_tables_come_back_and_hashes_are_of_the_bytes(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    write_table(tmp_path / "t.parquet", table)
    assert pq.read_table(tmp_path / "t.parquet").equals(table)
    (tmp_path / "abc").write_bytes(b"abc")
    assert (
        sha256_of(tmp_path / "abc")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


# ---- secrets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hub_token",
        "push_to_hub_token",
        "HF_TOKEN",
        "api_key",
        "apiKey",
        "OPENAI_API_KEY",
        "api-key",
        "api_keys",
        "aws_secret_access_key",
        "client_secret",
        "db_password",
        "Authorization",
        "credentials",
    ],
)
def test_values_under_secret_keys_are_masked_wherever_they_are(key: str) -> None:
    planted = "hf_PLANTED"
    plain = {
        key: planted,
        "nested": [{"deep": {key: planted, "kept": "k"}}],
        "more": {key: [planted, {"x": planted}]},
    }
    cleaned = redacted(plain)
    assert planted not in json.dumps(cleaned)
    assert cleaned[key] == "[redacted]"
    assert cleaned["nested"][0]["deep"]["kept"] == "k"
    assert plain[key] == planted  # a copy


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("include_num_input_tokens_seen", "no"),
        ("tokenizer_name", "gpt2"),
        ("secretary", "Ann"),
        ("max_tokens", 5),
        ("keyboard", "qwerty"),
        ("hub_token", None),
        ("hub_token", ""),
        ("use_token", True),
    ],
)
def test_settings_and_empty_values_are_kept(key: str, value: Any) -> None:
    assert redacted({key: value}) == {key: value}


def test_run_json_holds_no_secret_and_keeps_the_settings(tmp_path: Path) -> None:
    args = NEATConfig(
        output_dir=str(tmp_path / "run"),
        hub_token="hf_PLANTED",
        use_cpu=True,
        include_num_input_tokens_seen="no",
    )
    write_run_record(tmp_path, args, ["vader"], {})
    text = (tmp_path / "run.json").read_text("utf-8")
    assert "hf_PLANTED" not in text
    config = json.loads(text)["config"]
    masked = {k for k, v in config.items() if v == "[redacted]"}
    assert masked <= {"hub_token", "push_to_hub_token"}
    assert (
        config["include_num_input_tokens_seen"]
        == cast("Any", args).to_dict()["include_num_input_tokens_seen"]
    )
