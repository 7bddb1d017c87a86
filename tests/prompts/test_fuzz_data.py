"""Whatever bytes are in a file that a user names: it is read, or refused by a typed error.

The error names the file.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neat_align.cli.compare_file import read_spec
from neat_align.cli.options import parse_options, read_recipe
from neat_align.comparison.spec import parse_spec
from neat_align.errors import ConfigError, DataError, NEATError, PromptError
from neat_align.files.yaml import read_yaml
from neat_align.prompts.instruction_banks import load_bank
from neat_align.prompts.loading import load_rows
from neat_align.script_arguments import ScriptArguments

# The time an example may take; generous, because the machine may be busy, and far below a reader
# that hangs.
FUZZ = settings(
    max_examples=150,
    deadline=timedelta(seconds=20),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "How are you?", "chosen": " Fine.", "rejected": " Go away.", "n": 1},
    {
        "id": "b",
        "prompt": "What is 👩‍👩‍👧?",
        "chosen": " A family.",
        "rejected": " Nothing.",
        "n": 2,
    },
]
TALK: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello"}],
    }
]


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


CSV = b'id,prompt,chosen,rejected\n1,"How, are you?",fine,no\n2,"two\nlines",a,b\n'
VALID: dict[str, list[bytes]] = {
    ".jsonl": [lines(ROWS), lines(TALK), b"\xef\xbb\xbf" + lines(ROWS)],
    ".json": [json.dumps(ROWS, indent=1).encode(), json.dumps(TALK).encode(), lines(ROWS)],
    ".csv": [CSV, b"\xef\xbb\xbf" + CSV],
    ".parquet": [
        parquet(ROWS),
        parquet(TALK),
        parquet(ROWS, compression="none", use_dictionary=False),
    ],
}
PIECES = [
    b"\0",
    b"\xff",
    b"[",
    b"{",
    b'"',
    b"'",
    b"\\ud800",
    b"*a",
    b"&a ",
    b": ",
    b"\n- ",
    b"1e999",
]
BANK = (
    b"name: mine\ndescription: d\npairs:\n  - positive: Be good.\n    negative: 'Be bad.'\n  - "
    b"{positive: a, negative: b}\n"
)
SPEC = (
    b"name: mine\nsettings: {holdout: 1, learning_rate: 1e-5}\nseeds: [0, 1]\nstrengths: [{beta: "
    b"1.0}]\nkl_target: 0.1\n"
    b"methods:\n  base:\n  neat: {beta: 2.0}\n  other: {like: neat, description: d}\n"
)
LIKE = b"like: compare-demo\nsettings: {holdout: 1}\nmethods: {neat: {beta: 2.0}}\n"
RECIPE = (
    b"model_name_or_path: demo\nreward_funcs: [vader]\nlearning_rate: "
    b"1e-5\nnum_train_epochs: 2\nuse_peft: true\n"
)


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid file with pieces overwritten, cut out, doubled, or cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at, n = draw(st.integers(0, len(data))), draw(st.integers(0, 12))
        how = draw(st.sampled_from(["overwrite", "insert", "delete", "double", "cut", "flip"]))
        if how == "overwrite":
            data[at : at + n] = draw(st.binary(max_size=12))
        elif how == "insert":
            data[at:at] = draw(st.sampled_from(PIECES))
        elif how == "delete":
            del data[at : at + n]
        elif how == "double":
            data[at:at] = data[at : at + n]
        elif how == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[at:]
    return bytes(data)


def holds(read: Callable[[], object], error: type[NEATError], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = name
        try:
            read()
        except error as refused:
            said = str(refused)
        assert name in said
        assert len(said) < 20_000
        said.encode()  # a message can be printed and logged


@pytest.mark.parametrize("suffix", VALID)
@FUZZ
@given(data=st.data())
def test_any_bytes_in_a_data_file(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    raw = data.draw(st.binary(max_size=400) | mutated(VALID[suffix]))
    path = tmp_path / f"fuzzed{suffix}"
    path.write_bytes(raw)
    holds(lambda: load_rows(path), DataError, f"fuzzed{suffix}")


WORDS = st.text(st.characters(), max_size=8) | st.sampled_from(["user", "assistant", "Hi"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@FUZZ
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["prompt", "chosen", "rejected", "id", "prompt_id", "n"]), VALUES
        ),
        max_size=3,
    )
)
def test_any_json_in_a_data_file(tmp_path: Path, rows: list[Any]) -> None:
    """Well-formed files with values of any type in the fields that are read."""
    path = tmp_path / "fuzzed.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    holds(lambda: load_rows(path), DataError, "fuzzed.jsonl")


@FUZZ
@given(raw=st.binary(max_size=300) | mutated([BANK]))
def test_any_bytes_in_an_instruction_bank(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "fuzzed.yaml"
    path.write_bytes(raw)
    holds(lambda: load_bank(str(path)), PromptError, "fuzzed.yaml")


@FUZZ
@given(raw=st.binary(max_size=300) | mutated([SPEC, LIKE]))
def test_any_bytes_in_a_comparison(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "fuzzed.yaml"
    path.write_bytes(raw)
    holds(lambda: read_spec(path), ConfigError, "fuzzed.yaml")


@FUZZ
@given(
    arguments=st.lists(
        st.sampled_from(
            ["--seeds", "--methods", "--beta", "--beta=1", "neat", "dpo", "0", "[", "--", "-"]
        )
        | WORDS,
        max_size=6,
    )
)
def test_any_arguments_of_a_comparison(tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "fuzzed.yaml"
    path.write_bytes(SPEC)
    holds(lambda: read_spec(path, arguments), ConfigError, "")


METHODS = st.dictionaries(st.sampled_from(["base", "neat", "../x"]) | SCALARS, VALUES)
OPTIONAL = dict.fromkeys(("name", "settings", "seeds", "strengths", "kl_target", "methds"), VALUES)


@FUZZ
@given(raw=st.fixed_dictionaries({"methods": METHODS}, optional=OPTIONAL))
def test_any_plain_data_as_a_comparison(raw: dict[str, Any]) -> None:
    holds(lambda: parse_spec(raw, "fuzzed.yaml"), ConfigError, "fuzzed.yaml")


@FUZZ
@given(raw=st.binary(max_size=300) | mutated([RECIPE]))
def test_any_bytes_in_a_recipe(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "fuzzed.yaml"
    path.write_bytes(raw)
    known = {*ScriptArguments.__dataclass_fields__, "learning_rate", "num_train_epochs"}
    holds(lambda: read_recipe(path, known), ConfigError, "fuzzed.yaml")


@settings(FUZZ, max_examples=40)
@given(raw=mutated([RECIPE]))
def test_any_recipe_as_settings(tmp_path: Path, raw: bytes) -> None:
    """What can be read also becomes settings, or a ConfigError.

    That may speak of an option, not of the file.
    """
    path = tmp_path / "fuzzed.yaml"
    path.write_bytes(raw)
    holds(lambda: parse_options(["--output_dir", str(tmp_path / "run")], path), ConfigError, "")


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
# Merge keys copy what their aliases name while the values are made.
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "with its aliases (*name) written out it holds more than 1,000,000"),
        (MERGED, "with its aliases (*name) written out it holds more than 1,000,000"),
        ("pairs: &a [*a]\n", "with its aliases (*name) written out"),
        ("[" * 5000, "not valid YAML"),
        ("name: 2024-13-45\n", "not valid YAML (month must be in 1..12)"),
        ('name: "\\ud83d"\n', "a text holds the lone surrogate U+D83D"),
        (
            "name: a\nname: b\n",
            "fuzzed.yaml:2: 'name' is also on line 1, and only one could count: keep one",
        ),
        ("pairs:\n- positive: a\n  positive: b\n", "fuzzed.yaml:3: 'positive' is also on line 2"),
        ("a: 1\n---\nb: 2\n", "fuzzed.yaml:2: not valid YAML"),
        ("name: !!python/object/apply:os.system [ls]\n", "fuzzed.yaml:1: not valid YAML"),
        ("x: *y\n", "fuzzed.yaml:1: not valid YAML (found undefined alias"),
    ],
)
def test_yaml_that_would_hang_run_code_or_lose_a_key(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "fuzzed.yaml"
    path.write_text(text, encoding="utf-8")
    for read, error in (
        (load_bank, PromptError),
        (lambda p: read_yaml(Path(p), ConfigError), ConfigError),
    ):
        with pytest.raises(error) as caught:
            read(str(path))
        assert message in str(caught.value)
