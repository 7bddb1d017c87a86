"""How recipes and command lines name the data: TRL's names, one data set or a mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neat_align.cli.options import options_from, parse_options
from neat_align.errors import ConfigError
from neat_align.pipeline import load_data
from neat_align.prompts.dataset_config import DatasetConfig
from neat_align.script_arguments import ScriptArguments

MIXTURE = """\
holdout: 2
as_conversations: true
datasets:
  - path: {folder}/a.jsonl
    columns: {{prompt: question, chosen: good, rejected: bad}}
    fraction: 0.75
  - path: {folder}/b.jsonl
    split: train[:10]
    fraction: 0.25
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    a = [{"id": i, "question": f"a{i}?", "good": "g", "bad": "b"} for i in range(40)]
    b = [{"id": i, "prompt": [{"role": "user", "content": f"b{i}?"}]} for i in range(20)]
    for name, rows in (("a", a), ("b", b)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "recipe.yaml").write_text(MIXTURE.format(folder=tmp_path))
    return tmp_path


def parsed(folder: Path, *words: str) -> ScriptArguments:
    return parse_options(["--output_dir", "x", *words], folder / "recipe.yaml")[0]


def test_a_recipe_mixes_data_sets(folder: Path) -> None:
    script = parsed(folder)
    assert script.datasets[1] == DatasetConfig(
        f"{folder}/b.jsonl", split="train[:10]", fraction=0.25
    )
    assert script.data_title == "a.jsonl + b.jsonl"
    rows, held_out = load_data(script)
    # Ten of b, and of a until b's eleventh would be due.
    assert len(rows) + len(held_out) == 10 + 32
    assert sum(row.id.startswith("2:") for row in (*rows, *held_out)) == 10
    assert {row.chosen for row in rows} == {"g", None}
    assert all(row.prompt[0]["role"] == "user" for row in rows)  # type: ignore[index]
    again = load_data(parsed(folder))
    assert again == (rows, held_out)


def test_an_entry_on_the_command_line_is_a_path_or_json(folder: Path) -> None:
    entry = json.dumps({"path": f"{folder}/a.jsonl", "columns": {"prompt": "question"}})
    script = parsed(folder, "--datasets", f"{folder}/b.jsonl", entry)
    assert [source.path for source in script.datasets] == [f"{folder}/{n}.jsonl" for n in "ba"]
    assert len(load_data(script)[0]) == 58
    one = options_from({"output_dir": "x", "datasets": f"{folder}/b.jsonl"})[0]
    assert one.datasets == [DatasetConfig(f"{folder}/b.jsonl")]


def test_one_data_set_has_columns_and_held_out_data_its_own(folder: Path) -> None:
    given = {
        "output_dir": "x",
        "dataset_name": f"{folder}/a.jsonl",
        "dataset_columns": {"prompt": "question", "chosen": "good"},
        "dataset_train_split": "train[25%:]",
        "eval_dataset_name": f"{folder}/a.jsonl",
        "eval_dataset_columns": '{"prompt": "question"}',
        "eval_dataset_split": "train[:5]",
    }
    rows, held_out = load_data(options_from(given)[0])
    assert [row.id for row in rows] == [str(i) for i in range(10, 40)]
    assert (rows[0].chosen, rows[0].rejected, rows[0].columns) == ("g", None, {"bad": "b"})
    assert [(row.prompt, row.chosen) for row in held_out] == [(f"a{i}?", None) for i in range(5)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_name": "x"}, "dataset_name is 'x' and datasets lists a mixture: leave it out"),
        ({"dataset_columns": {"prompt": "x"}}, "(in datasets, it is each entry's columns)"),
        ({"dataset_train_split": "train"}, "(in datasets, it is each entry's split)"),
        ({"datasets": ["a", {"path": "b", "fraction": 1}]}, "datasets: a has no fraction and oth"),
        ({"datasets": [{"path": "demo"}]}, "datasets names demo, whose prompts are in no mixture"),
        ({"datasets": [{"path": "a", "wight": 1}]}, "datasets[0] has 'wight', which is not read"),
        ({"eval_dataset_columns": {"prompt": "x"}}, "but there is no eval_dataset_name for it"),
        ({"eval_dataset_config": "en"}, "eval_dataset_config is 'en', but there is no eval_data"),
        ({"dataset_columns": "question"}, "dataset_columns is 'question'; it must be a JSON obj"),
    ],
)
def test_what_cannot_be_meant(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options_from({"output_dir": "x", "datasets": ["a.jsonl"], **changes})
    assert said in str(caught.value).replace("leave dataset_name out", "leave it out")


def test_the_recipes_line_is_named(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("    fraction: 0.25\n", ""))
    with pytest.raises(ConfigError, match=rf"^{recipe}:3: datasets: .*b\.jsonl has no fraction"):
        parsed(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dataset_config": "en"}, "dataset_config is 'en', but the demo's prompts have no config"),
        ({"dataset_columns": {"prompt": "x"}}, "the demo's prompts have no other columns"),
        ({"dataset_streaming": True}, "dataset_streaming is true, and only expand streams"),
    ],
)
def test_the_demos_prompts_are_what_they_are(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_data(ScriptArguments(dataset_name="demo", **options))


def test_the_recipe_of_the_documentation_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "using.md").read_text()
    _, _, rest = text.partition("### Several data sets\n\n```yaml\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(rest.partition("```")[0])
    script = parse_options(["--output_dir", "x"], recipe)[0]
    assert [source.fraction for source in script.datasets] == [0.75, 0.25]
    assert script.as_conversations
