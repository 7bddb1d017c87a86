"""`tools` and `chat_template_kwargs`: read from rows and options, and in every rendering."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console

from neat_align import ConfigError, NEATTrainer
from neat_align.cli.options import options_from, parse_options
from neat_align.cli.probe_options import ProbeSettings
from neat_align.cli.probe_run import run_probe
from neat_align.errors import DataError, PromptError
from neat_align.prompts.loading import load_rows, rows_from_dataset
from neat_align.prompts.rendering import prompt_ids, prompt_text
from neat_align.prompts.row_checks import as_rows, check_prompts
from neat_align.prompts.rows import PromptRow, TemplateInputs
from neat_align.runs.run_key import fingerprint
from neat_align.sampling.transformers_sampler import TransformersSampler
from small_trainer import config, count_e
from template_families import FAMILIES, QWEN3_TOK
from tiny import CHATML, save_tiny, tiny_model, tiny_tokenizer

ASK = [{"role": "user", "content": "What is 1 + 2?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
OTHER = {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {}}}}
# Writes all that it is given where every prompt begins.
SHOWS = (
    "{{ 'T[' }}{% for t in tools or [] %}{{ (t.function or t).name }}{% endfor %}"
    "{{ '] M=' ~ (mood if mood is defined else '-') ~ '\n' }}" + CHATML
)


def shows() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = SHOWS
    return tokenizer


def inputs_of(**columns: Any) -> TemplateInputs:
    (row,) = rows_from_dataset([{"prompt": ASK, **columns}])
    return row.template_inputs


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([TOOL], [TOOL]),
        (json.dumps([TOOL, OTHER]), [TOOL, OTHER]),
        ([json.dumps(TOOL)], [TOOL]),
        ([OTHER], [OTHER]),
        ([{"type": "web_search"}], [{"type": "web_search"}]),
        ([], None),  # Llama's template writes that there are tools for an empty list
        (None, None),
        ("", None),
        ([{**OTHER, "strict": None}], [OTHER]),
    ],
)
def test_tools_are_read_in_the_forms_that_data_sets_have(given: Any, read: Any) -> None:
    assert inputs_of(tools=given).tools == read


def test_nulls_that_arrow_put_in_are_taken_out() -> None:
    rows = [
        {"prompt": ASK, "tools": [TOOL], "chat_template_kwargs": {"mood": "x"}},
        {"prompt": ASK, "tools": [OTHER], "chat_template_kwargs": {"loud": True}},
        {"prompt": ASK, "tools": None, "chat_template_kwargs": None},
    ]
    read = rows_from_dataset(Dataset.from_list(rows))
    assert [r.template_inputs.tools for r in read] == [[TOOL], [OTHER], None]
    assert [r.template_inputs.kwargs for r in read] == [{"mood": "x"}, {"loud": True}, {}]
    assert "tools" in read[0].columns  # for reward functions, as it came


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv"])
def test_files_hold_them(tmp_path: Path, name: str) -> None:
    row = {"prompt": ASK, "tools": [TOOL], "chat_template_kwargs": {"mood": "x"}}
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_text(json.dumps(row) + "\n")
    elif name.endswith("csv"):
        Dataset.from_list(
            [{**row, "prompt": "Hi", "tools": json.dumps([TOOL]), "chat_template_kwargs": ""}]
        ).to_csv(str(path))
    else:
        Dataset.from_list([row]).to_parquet(str(path))
    (read,) = load_rows(path)
    assert read.template_inputs.tools == [TOOL]
    assert read.template_inputs.kwargs == ({} if name.endswith("csv") else {"mood": "x"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": TOOL}, r"row 0: tools is \{.*it must be a list of JSON schemas, one a tool"),
        ({"tools": "[{"}, r"tools is the text '\[\{', which is no JSON"),
        ({"tools": "add"}, r"tools is the text 'add', which is no JSON"),
        ({"tools": ["add"]}, r"tools\[0\] is the text 'add', which is no JSON"),
        ({"tools": [3]}, r"tools\[0\] is 3; it must be a tool's JSON schema, such as"),
        ({"tools": [TOOL, {"a": 1}]}, r"tools\[1\] is \{'a': 1\}; it must be a tool's JSON schema"),
        ({"tools": [len]}, r"tools\[0\] is a function; .*get_json_schema makes it"),
        ({"tools": [{"name": "a", "x": {1, 2}}]}, r"tools\[0\] is no JSON .*set"),
        ({"chat_template_kwargs": ["a"]}, r"chat_template_kwargs is \['a'\]; it must be an object"),
        ({"chat_template_kwargs": "no"}, r"chat_template_kwargs is the text 'no', which is no JS"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            r"holds 'tokenize', which is no variable .* \(neat-align sets it\): take it out",
        ),
        ({"chat_template_kwargs": {"tools": []}}, r"holds 'tools', .*give a tools column"),
        ({"chat_template_kwargs": {"chat_template": ""}}, r"set tokenizer\.chat_template"),
    ],
)
def test_wrong_forms_are_named(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        inputs_of(**columns)


def test_rows_with_other_tools_are_other_rows() -> None:
    rows = rows_from_dataset(
        [{"prompt": ASK, "tools": t} for t in ([TOOL], [OTHER], None)]
        + [{"prompt": ASK, "chat_template_kwargs": {"mood": "x"}}]
    )
    assert len({row.id for row in rows}) == 4
    assert not any("-" in row.id for row in rows)  # none is a repetition
    prints = [
        fingerprint([PromptRow("1", ASK, None, None, {}, "", r.template_inputs)]) for r in rows
    ]
    assert len(set(prints)) == 4


# ---- rendering -----------------------------------------------------------------------------------


def test_a_prompt_is_what_apply_chat_template_gives_with_them() -> None:
    inputs = TemplateInputs([TOOL], {"mood": "calm"})
    expected = shows().apply_chat_template(
        ASK,
        tools=[TOOL],
        mood="calm",
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert prompt_ids(shows(), ASK, inputs=inputs) == expected
    assert prompt_text(shows(), ASK, inputs=inputs).startswith("T[add] M=calm\n")


def test_thinking_is_turned_off() -> None:
    off = prompt_text(QWEN3_TOK, ASK, inputs=TemplateInputs(kwargs={"enable_thinking": False}))
    assert off.endswith("assistant\n<think>\n\n</think>\n\n")
    on = prompt_text(QWEN3_TOK, ASK, inputs=TemplateInputs(kwargs={"enable_thinking": True}))
    assert on.endswith("assistant\n")


def test_what_tools_and_variables_spell_stays_text() -> None:
    tokenizer = shows()
    tool = {"name": "a<|im_end|>"}
    ids = prompt_ids(tokenizer, ASK, inputs=TemplateInputs([tool], {"mood": "<|im_start|>"}))
    plain = prompt_ids(tokenizer, ASK, inputs=TemplateInputs([{"name": "a"}], {"mood": "b"}))
    for token in ("<|im_end|>", "<|im_start|>"):
        i = tokenizer.convert_tokens_to_ids(token)
        assert ids.count(i) == plain.count(i)
    assert tokenizer.decode(ids).startswith("T[a<|im_end|>] M=<|im_start|>\n")
    named = {"name": "a", "parameters": {"<|im_end|>": 1}}
    with pytest.raises(PromptError, match=r"name of a field .* token '<\|im_end\|>': rename"):
        prompt_ids(tokenizer, ASK, inputs=TemplateInputs([named]))


# ---- checks of rows ------------------------------------------------------------------------------


def checked(rows: list[dict[str, Any]], tokenizer: Any, *, conversational: bool = True) -> None:
    check_prompts(as_rows(rows, "data"), tokenizer, 999, conversational=conversational)


def test_tools_that_the_template_does_not_read_are_refused() -> None:
    with pytest.raises(
        PromptError, match=r"row 1: prompt: the chat template .* not read tools, so"
    ):
        checked([{"prompt": ASK}, {"prompt": ASK, "tools": [TOOL]}], tiny_tokenizer())
    checked([{"prompt": ASK}, {"prompt": ASK, "tools": [TOOL]}], shows())


def test_tools_of_a_text_prompt_are_refused() -> None:
    with pytest.raises(PromptError, match=r"row 0: prompt: tools are for a chat template, and the"):
        checked([{"prompt": "Hi", "tools": [TOOL]}], shows(), conversational=False)


def test_variables_that_the_template_does_not_read_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        checked([{"prompt": ASK, "chat_template_kwargs": {"mod": "x", "mood": "y"}}], shows())
    assert "of 1 rows gives mod, which the chat template of" in caplog.text
    assert "gives mood" not in caplog.text


# ---- conversations with tools --------------------------------------------------------------------

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WITH_CALL = [
    *ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "add", "content": '3 "three"'},
]


def test_calls_of_tools_and_their_results_reach_the_template() -> None:
    rows = [{"prompt": WITH_CALL}, {"prompt": ASK}]
    for data in (rows, Dataset.from_list(rows)):
        read = rows_from_dataset(data)
        checked(data, QWEN3_TOK)
        text = prompt_text(QWEN3_TOK, read[0].prompt)
        assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
        assert '<tool_response>\n3 "three"\n</tool_response>' in text
        assert read[1].prompt == ASK


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (WITH_CALL[:2] + ASK, r"drops or changes the assistant turn's call .* prompt\[1\] \('add'"),
        (
            [*ASK, {"role": "assistant", "content": "x"}, WITH_CALL[2]],
            r"tool turn's call or result of a tool prompt\[2\] .* template has tools",
        ),
    ],
)
def test_a_template_that_leaves_calls_and_results_out_is_refused(turns: Any, message: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "{{ '<|im_start|>' + message['role']",
        "{{ '' if message['role'] == 'tool' else '<|im_start|>' + message['role']",
    ).replace("message['content'] +", "(message['content'] if message['role'] != 'tool' else '') +")
    with pytest.raises(PromptError, match=message):
        checked([{"prompt": turns}], tokenizer)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "assistant", "content": "", "tool_calls": "add"}, r"tool_calls is 'add'; a call"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, r"tool_calls\[0\] is \{'id': '1'\}"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, r"also has tool_calls, which"),
        ({"role": "assistant", "content": None}, r"content is null; it must be text"),
        (
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]},
            r"content has parts of type image; neat-align trains on text",
        ),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, r"or a list of text parts"),
    ],
)
def test_wrong_turns_are_named(message: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        rows_from_dataset([{"prompt": [*ASK, message, *ASK]}])


def test_text_parts_are_joined_and_thoughts_go_to_the_template() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image": None}]
    answer = {"role": "assistant", "content": parts, "reasoning_content": "hm", "thinking": None}
    (row,) = rows_from_dataset(
        [{"prompt": [*ASK, answer, *ASK], "chosen": [{"role": "assistant", "content": parts}]}]
    )
    assert row.prompt[1] == {"role": "assistant", "content": "a b", "reasoning_content": "hm"}
    assert row.chosen == "a b"
    with pytest.raises(DataError, match=r"chosen has tool_calls, which would be lost: write into"):
        rows_from_dataset([{"prompt": ASK, "chosen": [WITH_CALL[1]]}])


# ---- the option, and a whole run -----------------------------------------------------------------


def test_the_option_is_json_on_the_command_line_and_a_mapping_in_recipes(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--chat_template_kwargs", '{"date": "2024", "a": 1}']
    assert parse_options(words, None)[1].chat_template_kwargs == {"date": "2024", "a": 1}
    recipe = {"output_dir": str(tmp_path), "chat_template_kwargs": {"date": "2024", "a": [1]}}
    assert options_from(recipe)[1].chat_template_kwargs == {"date": "2024", "a": [1]}
    with pytest.raises(ConfigError, match="chat_template_kwargs is 'x'; it must be a JSON object"):
        config(tmp_path, chat_template_kwargs="x")
    with pytest.raises(ConfigError, match=r"chat_template_kwargs is \[1\]; it must be a mapping"):
        config(tmp_path, chat_template_kwargs="[1]")


ROWS = [
    {
        "prompt": [{"role": "user", "content": f"What is {i} + 2?"}],
        "chosen": [{"role": "assistant", "content": f"thank you {i}"}],
        "rejected": [{"role": "assistant", "content": "I hate it"}],
        "tools": [TOOL] if i % 2 else None,
        "chat_template_kwargs": {"mood": "own"} if i % 3 == 0 else None,
    }
    for i in range(12)
]


def expected_start(prompt: str) -> str:
    i = int(prompt.split("What is ")[1].split()[0])
    return f"T[{'add' * (i % 2)}] M={'own' if i % 3 == 0 else 'option'}\n"


class Heard:
    """A sampler's and a scorer's inputs, as text."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def look(self, tokenizer: Any, ids: Any) -> None:
        self.prompts.append(tokenizer.decode(list(ids)))


def test_every_rendering_of_a_run_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling plain and under instructions, contrast, evaluation, drift, likelihoods, layout."""
    tokenizer, heard = shows(), Heard()
    sample = TransformersSampler.sample

    def listened(self: Any, requests: Any, *rest: Any, **named: Any) -> Any:
        for request in requests:
            heard.look(tokenizer, request.prompt_ids)
        return sample(self, requests, *rest, **named)

    monkeypatch.setattr(TransformersSampler, "sample", listened)
    columns: list[dict[str, Any]] = []

    def reward(completions: Any, **given: Any) -> list[float]:
        columns.append({k: given[k] for k in ("tools", "chat_template_kwargs")})
        return count_e(given.pop("prompts"), completions, given.pop("completion_ids"))

    t = NEATTrainer(
        tiny_model("llama", len(tokenizer), tokenizer=tokenizer),
        [reward, "contrast"],
        config(
            tmp_path,
            num_plain=1,
            drift_prompts=2,
            chat_template_kwargs={"mood": "option"},
            save_strategy="no",
        ),
        ROWS,
        ROWS[:3],
        processing_class=tokenizer,
    )
    rendered: list[str] = []
    contrast = t.parts.scored_by.rewards[1].function
    score = contrast.score

    def scored(prompts: Any, completions: Any) -> Any:
        rendered.extend(tokenizer.decode(list(p)) for p in prompts)
        return score(prompts, completions)

    object.__setattr__(contrast, "score", scored)
    t.train()
    t.evaluate()
    t.evaluate(ROWS[3:5])
    assert len(heard.prompts) > 40
    assert len(rendered) > 40
    for prompt in (*heard.prompts, *rendered):
        assert prompt.startswith(expected_start(prompt)), prompt
    assert {c for given in columns for c in map(json.dumps, given["tools"])} == {
        "null",
        json.dumps([TOOL]),
    }
    groups = t.rounds.groups
    assert all(tokenizer.decode(g.prompt_ids).startswith("T[") for g in groups)


def test_a_resumed_run_may_not_change_them(tmp_path: Path) -> None:
    def build(rows: Any, kwargs: Any) -> NEATTrainer:
        return NEATTrainer(
            tiny_model("llama", 384),
            count_e,
            config(tmp_path, chat_template_kwargs=kwargs),
            rows,
            processing_class=shows(),
        )

    key = build(ROWS, {"mood": "a"}).parts.run_key()
    assert build(ROWS, {"mood": "a"}).parts.run_key() == key
    assert build(ROWS, {"mood": "b"}).parts.run_key()["options"] != key["options"]
    other = [{**row, "tools": [OTHER]} for row in ROWS]
    assert build(other, {"mood": "a"}).parts.run_key()["training data"] != key["training data"]


def test_the_option_needs_conversations_and_a_template_that_reads_it(tmp_path: Path) -> None:
    def build(rows: Any, **kwargs: Any) -> None:
        NEATTrainer(
            tiny_model("llama", 384),
            count_e,
            config(tmp_path, chat_template_kwargs=kwargs),
            rows,
            processing_class=shows(),
        )

    with pytest.raises(PromptError, match="chat_template_kwargs are for a chat template, and the"):
        build([{"prompt": f"Hi {i}"} for i in range(8)], mood="x")
    with pytest.raises(PromptError, match=r"gives mod, which the chat template of .* never reads"):
        build(ROWS, mod="x")
    with pytest.raises(ConfigError, match="holds 'max_length', which is no variable"):
        build(ROWS, max_length=3)


@pytest.mark.parametrize("reward", ["vader", "contrast"])
def test_a_probe_gives_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: str
) -> None:
    if reward == "vader":
        pytest.importorskip("vaderSentiment")
    folder = save_tiny(tmp_path / "model", "llama")
    shows().save_pretrained(folder)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer, heard, sample = shows(), Heard(), TransformersSampler.sample

    def listened(self: Any, requests: Any, *rest: Any, **named: Any) -> Any:
        for request in requests:
            heard.look(tokenizer, request.prompt_ids)
        return sample(self, requests, *rest, **named)

    monkeypatch.setattr(TransformersSampler, "sample", listened)
    settings = ProbeSettings(
        "politeness",
        str(folder),
        str(data),
        reward=reward,
        prompts=8,
        samples=1,
        max_completion_length=3,
        chat_template_kwargs='{"mood": "option"}',
    )
    run_probe(settings, None, Console(quiet=True), disable_progress=True)
    assert len(heard.prompts) > 8
    for prompt in heard.prompts:
        assert prompt.startswith(expected_start(prompt)), prompt


def test_all_families_are_the_same_without_them() -> None:
    for tokenizer in FAMILIES.values():
        assert prompt_ids(tokenizer, ASK) == prompt_ids(tokenizer, ASK, inputs=TemplateInputs())
