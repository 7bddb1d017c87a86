"""Rows that OpenRLHF, axolotl and LLaMA-Factory read, held against what their documentation says.

The schemas are written from it: OpenRLHF 0.11, README "Prepare Datasets" and the keys of
`openrlhf/datasets`; axolotl, docs/rlhf.qmd, docs/dataset-formats/conversation.qmd and
docs/reward_modelling.qmd; LLaMA-Factory, data/README.md, and for the turns
`src/llamafactory/data/converter.py`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest
import yaml

from neat_align.errors import ConfigError
from neat_align.prompts.rows import Prompt
from neat_align.reporting.trainer_configs import dataset_info, trainer_config
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.export_file import ExportCounts, write_rows
from neat_align.rounds.exports import ROW_FORMS
from neat_align.rounds.trainer_rows import TRAINERS, row_shape

QUESTION: Prompt = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Hi?"}]
TURNS: Prompt = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And?"},
]
TEXT: Prompt = "Once upon"

message = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "user", "assistant"]},
        "content": {"type": "string"},
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}
answer = {**message, "properties": {**message["properties"], "role": {"const": "assistant"}}}
messages = {"type": "array", "items": message, "minItems": 1}
answers = {"type": "array", "items": answer, "minItems": 1, "maxItems": 1}
text, flag = {"type": "string", "minLength": 1}, {"type": "boolean"}


def rows(**columns: Any) -> dict[str, Any]:
    return {"type": "object", "properties": columns, "required": list(columns)}


CONVERSATIONS = {
    # --data.prompt_key + --data.chosen_key are put together before the template is applied.
    ("openrlhf", "preference"): rows(prompt=messages, chosen=answers, rejected=answers),
    ("openrlhf", "sft"): rows(prompt=messages, completion=answers),
    ("openrlhf", "reward"): rows(chosen=messages, rejected=messages),
    # chat_template.default, chatml.ultra, chat_template, bradley_terry.chat_template
    ("axolotl", "preference"): rows(messages=messages, chosen=answer, rejected=answer),
    ("axolotl", "kto"): rows(system={"type": "string"}, prompt=text, completion=text, label=flag),
    ("axolotl", "sft"): rows(messages=messages),
    ("axolotl", "reward"): rows(system={"type": "string"}, input=text, chosen=text, rejected=text),
    # Sharegpt format with the tags of the OpenAI format.
    ("llamafactory", "preference"): rows(messages=messages, chosen=answer, rejected=answer),
    ("llamafactory", "kto"): rows(messages=messages, label=flag),
    ("llamafactory", "sft"): rows(messages=messages),
    ("llamafactory", "reward"): rows(messages=messages, chosen=answer, rejected=answer),
}
TEXTS = {
    ("openrlhf", "preference"): rows(prompt=text, chosen=text, rejected=text),
    ("openrlhf", "sft"): rows(prompt=text, completion=text),
    ("openrlhf", "reward"): rows(chosen=text, rejected=text),
    # user_defined.default; the last is the instruction format of docs/dataset-formats/inst_tune.qmd
    ("axolotl", "preference"): rows(prompt=text, chosen=text, rejected=text),
    ("axolotl", "kto"): rows(prompt=text, completion=text, label=flag),
    ("axolotl", "sft"): rows(prompt=text, completion=text),
    # Alpaca format.
    ("llamafactory", "preference"): rows(prompt=text, chosen=text, rejected=text),
    ("llamafactory", "kto"): rows(prompt=text, completion=text, label=flag),
    ("llamafactory", "sft"): rows(prompt=text, completion=text),
    ("llamafactory", "reward"): rows(prompt=text, chosen=text, rejected=text),
}
ALL = [
    *((*key, prompt, schema) for key, schema in CONVERSATIONS.items() for prompt in (QUESTION,)),
    *((*key, TEXT, schema) for key, schema in TEXTS.items()),
]


def a_group(prompt: Prompt) -> CompletionGroup:
    made = [
        Completion("positive", 0, "kind", (1,), "stop", "Be kind.", 3, reward=1.0),
        Completion("negative", 0, "rude", (1,), "stop", "Be rude.", 4, reward=-1.0),
    ]
    return CompletionGroup("id", prompt, (1,), tuple(made))


def exported(
    path: Path, form: Any, trainer: Any, *prompts: Prompt
) -> tuple[ExportCounts, list[dict[str, Any]]]:
    groups = [a_group(prompt) for prompt in prompts]
    with path.open("wb") as file:
        is_lines = path.suffix == ".jsonl"
        counts = write_rows(file, groups, form, trainer=trainer, as_lines=is_lines)
    if not is_lines:
        return counts, pq.read_table(path).to_pylist()
    return counts, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("trainer", "form", "prompt", "schema"), ALL)
def test_rows_are_what_the_trainer_documents(
    tmp_path: Path, trainer: str, form: str, prompt: Prompt, schema: dict[str, Any], suffix: str
) -> None:
    counts, made = exported(tmp_path / f"rows.{suffix}", form, trainer, prompt)
    assert counts.rows == len(made) == (2 if form == "kto" else 1)
    for row in made:
        jsonschema.validate(row, schema)
        assert tuple(row) == counts.columns
        assert "margin" not in row
        told = {k: v for k, v in row.items() if not k.startswith("origin")}
        assert "Be rude." not in str(told)


def test_rows_hold_what_the_conversation_says(tmp_path: Path) -> None:
    kind, rude = ({"role": "assistant", "content": text} for text in ("kind", "rude"))

    def row(form: str, trainer: str, prompt: Prompt) -> dict[str, Any]:
        return exported(tmp_path / "rows.jsonl", form, trainer, prompt)[1][0]

    for trainer in ("axolotl", "llamafactory"):
        pair = row("preference", trainer, TURNS)
        assert (pair["messages"], pair["chosen"], pair["rejected"]) == (TURNS, kind, rude)
        assert row("sft", trainer, TURNS)["messages"] == [*TURNS, kind]
    labelled = row("kto", "llamafactory", QUESTION)
    assert (labelled["messages"], labelled["label"]) == ([*QUESTION, kind], True)
    told = row("kto", "axolotl", QUESTION)
    assert (told["system"], told["prompt"], told["completion"]) == ("You help.", "Hi?", "kind")
    compared = row("reward", "axolotl", QUESTION[1:])
    assert [compared[k] for k in ("system", "input", "chosen", "rejected")] == [
        *("", "Hi?", "kind", "rude")
    ]


@pytest.mark.parametrize(
    ("trainer", "form", "prompt", "is_read"),
    [
        ("axolotl", "kto", TURNS, False),
        ("axolotl", "reward", TURNS, False),
        ("axolotl", "preference", TURNS, True),
        ("llamafactory", "preference", TURNS, True),
        ("llamafactory", "preference", [*TURNS, TURNS[-1]], False),  # two user turns in a row
        ("llamafactory", "sft", TURNS[1:], False),  # begins with the assistant
        ("llamafactory", "kto", [QUESTION[0], *TURNS], True),
    ],
)
def test_turns_that_a_trainer_does_not_read_are_left_out_and_counted(
    tmp_path: Path, trainer: str, form: str, prompt: Prompt, *, is_read: bool
) -> None:
    counts, made = exported(tmp_path / "rows.jsonl", form, trainer, prompt, QUESTION)
    per_group = 2 if form == "kto" else 1
    assert len(made) == per_group * (2 if is_read else 1)
    assert counts.left_out == ({} if is_read else {"turns": per_group})


@pytest.mark.parametrize(
    ("trainer", "form", "conversational", "said"),
    [
        ("openrlhf", "kto", True, "no longer trains on: choose preference, sft or reward"),
        ("axolotl", "ranked", True, "none of these trainers reads: leave --for out"),
        ("axolotl", "reward", False, "axolotl's reward models read conversations"),
    ],
)
def test_what_a_trainer_does_not_read_is_said(
    trainer: Any, form: Any, said: str, *, conversational: bool
) -> None:
    with pytest.raises(ConfigError, match=said):
        row_shape(form, trainer, conversational=conversational)


# ---- what the trainers are told ------------------------------------------------------------------


def config(trainer: Any, form: Any, name: str, *, conversational: bool) -> Any:
    found = trainer_config(trainer, form, Path(name), conversational=conversational)
    assert found is not None
    return found


@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("form", ROW_FORMS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_column_that_a_trainer_is_told_of_is_in_the_rows(
    trainer: Any, form: Any, *, conversational: bool
) -> None:
    if form == "ranked":
        assert trainer_config(trainer, form, Path("a.jsonl"), conversational=conversational) is None
        return
    try:
        columns = set(row_shape(form, trainer, conversational=conversational).columns)
    except ConfigError:
        return
    told = config(trainer, form, "out/a.jsonl", conversational=conversational)
    if trainer == "openrlhf":
        words = told.text.split()
        named = [b for a, b in itertools.pairwise(words) if a.endswith("_key")]
        assert named
        assert set(named) <= columns
        assert ("--data.apply_chat_template" in words) == conversational
    elif trainer == "axolotl":
        (data,) = yaml.safe_load(told.text)["datasets"]
        assert (data["path"], data["ds_type"]) == ("out/a.jsonl", "json")
        if not isinstance(data["type"], str):
            fields = {v for k, v in data["type"].items() if k.startswith("field_")}
            assert fields
            assert fields <= columns
    elif trainer == "llamafactory":
        settings = yaml.safe_load(told.text)
        ((name, content),) = told.files
        assert name == "dataset_info.json"
        assert settings["dataset_dir"] == "out"
        info = json.loads(content)[settings["dataset"]]
        assert set(info["columns"].values()) <= columns
    else:
        assert 'load_dataset("json", data_files="out/a.jsonl"' in told.text


def test_llama_factorys_description_is_as_its_readme_has_it() -> None:
    """data/README.md: sharegpt preference data with the tags of the OpenAI format; alpaca KTO."""
    assert dataset_info("preference", "a.jsonl", conversational=True) == {
        "file_name": "a.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    assert dataset_info("kto", "a.parquet", conversational=False) == {
        "file_name": "a.parquet",
        "columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"},
    }
