"""From a recipe and the command line to settings: which source wins, and where a wrong value is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from neat_align import ConfigError, NEATConfig
from neat_align.cli.option_names import ELSEWHERE, SPELLINGS
from neat_align.cli.options import options_from, parse_options
from neat_align.config.unsupported import SCRIPT_OPTIONS
from neat_align.script_arguments import ScriptArguments


def parsed(folder: Path, text: str, *arguments: str) -> tuple[ScriptArguments, NEATConfig]:
    recipe = folder / "r.yaml"
    recipe.write_text(text, encoding="utf-8")
    return parse_options(["--output_dir", str(folder / "run"), *arguments], recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ntemperature: [1, 2]\n", "r.yaml:2: temperature takes one value"),
        ("seed: 1\nbf16: maybe\n", "r.yaml:2: bf16: Truthy value expected: got maybe"),
        ("seed: 1\nlr_scheduler_type: cosin\n", "r.yaml:2: lr_scheduler_type: invalid choice"),
        ("seed: 1\nreward_funcs: [[a]]\n", "r.yaml:2: reward_funcs holds a list; it must be text"),
        (
            "lr_scheduler_kwargs: {a: 2024-01-01}\n",
            "r.yaml:1: lr_scheduler_kwargs holds a mapping that is no JSON",
        ),
        ("reward_funcs: [vader, --seed, 3]\n", "r.yaml:1: reward_funcs lists '--seed'"),
        ("seed: 1\n\nholdout: -1\n", "r.yaml:3: holdout is -1"),
        ("beta: 3.0\nranking_loss: hinge\n", "r.yaml:1: beta is set but ranking_loss"),
        ("3: 4\n", "r.yaml:1: unknown option '3'"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parsed(tmp_path, text)


def test_a_wrong_value_of_the_command_line_is_named_without_a_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^learning_rate: invalid float value: 'fast': correct"):
        parsed(tmp_path, "seed: 1\n", "--learning-rate", "fast")


def test_the_command_line_wins_over_a_wrong_recipe(tmp_path: Path) -> None:
    _, config = parsed(tmp_path, "learning_rate: fast\n", "--learning-rate", "1e-3")
    assert config.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("recipe", "words", "length"),
    [
        ("num_train_epochs: 2\nmax_steps: 7\n", "--data_passes 1", (3.0, -1, 1.0)),
        ("data_passes: 2\n", "--num-train-epochs 5", (5.0, -1, None)),
        ("data_passes: 2\n", "--max_steps=7", (3.0, 7, None)),
        ("data_passes: 0.5\n", "", (3.0, -1, 0.5)),
    ],
)
def test_the_command_lines_way_to_say_how_long_wins_over_the_recipes(
    tmp_path: Path, recipe: str, words: str, length: tuple[float, int, float | None]
) -> None:
    _, config = parsed(tmp_path, recipe, *words.split())
    assert (config.num_train_epochs, config.max_steps, config.data_passes) == length


def test_two_ways_to_say_how_long_in_one_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r":1: data_passes is 1 and num_train_epochs is 2, and"):
        parsed(tmp_path, "data_passes: 1\nnum_train_epochs: 2\n")
    with pytest.raises(ConfigError, match="data_passes is 1 and max_steps is 4"):
        parsed(tmp_path, "seed: 1\n", "--data_passes", "1", "--max_steps", "4")


def test_mappings_lists_and_switches_of_a_recipe(tmp_path: Path) -> None:
    text = (
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 0.1, more: [1, x]}\n"
        "reward_funcs: vader\nreward_weights: [1, 1e-1]\nbf16: false\nlora_target_modules: []\n"
        "run_name: 2024-01-01\nmodel_revision: 1234567\nmax_kl:\nreport_to: [none]\n"
    )
    script, config = parsed(tmp_path, text)
    assert config.lr_scheduler_kwargs == {"min_lr": 0.1, "more": [1, "x"]}
    assert script.reward_funcs == ["vader"]
    assert config.reward_weights == [1.0, 0.1]
    assert config.bf16 is False
    assert script.lora_target_modules is None
    assert (config.run_name, script.model_revision) == ("2024-01-01", "1234567")
    assert config.max_kl is None
    assert config.report_to == []


def test_a_mapping_on_the_command_line_is_json_and_a_switch_needs_no_value(tmp_path: Path) -> None:
    words = ["--lr_scheduler_kwargs", '{"min_lr": 0.1}', "--use-peft", "--no_bf16"]
    script, config = parsed(tmp_path, "bf16: true\n", *words)
    assert config.lr_scheduler_kwargs == {"min_lr": 0.1}
    assert script.use_peft is True
    assert config.bf16 is False


@pytest.mark.parametrize(
    "words",
    [["--data", "d.jsonl", "--model=demo"], ["--dataset-name", "d.jsonl", "--model", "demo"]],
)
def test_the_short_names_mean_the_long_ones(tmp_path: Path, words: list[str]) -> None:
    recipe = "model: other\ndataset: other.jsonl\nbank: politeness\nrewards: [vader]\n"
    script, config = parsed(tmp_path, recipe, *words)
    assert (script.model_name_or_path, script.dataset_name) == ("demo", "d.jsonl")
    assert (config.instruction_bank, script.reward_funcs) == ("politeness", ["vader"])


def test_one_option_under_two_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--model and --model_name_or_path are one option"):
        parsed(tmp_path, "seed: 1\n", "--model", "a", "--model-name-or-path", "b")
    with pytest.raises(
        ConfigError, match=r"r\.yaml:3: dataset_name and data are one option \(data"
    ):
        parsed(tmp_path, "dataset_name: a\nseed: 1\ndata: b\n")
    with pytest.raises(ConfigError, match=r"the settings: model_name_or_path and model are one"):
        options_from({"model_name_or_path": "a", "model": "b"})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("base_model", "model_name_or_path"),
        ("lora_rank", "lora_r"),
        ("max_new_tokens", "max_completion_length"),
        ("modle", "model"),
        ("learning_rat", "learning_rate"),
    ],
)
def test_a_name_of_another_library_is_understood_in_the_message(
    tmp_path: Path, name: str, meant: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"r\.yaml:1: unknown option '{name}'; did you mean '{meant}'"
    ):
        parsed(tmp_path, f"{name}: 1\n")
    with pytest.raises(ConfigError, match=rf"unknown option '{name}'; did you mean '{meant}'"):
        parsed(tmp_path, "seed: 1\n", f"--{name}", "1")


def test_every_name_of_elsewhere_leads_to_an_option_and_is_none_itself() -> None:
    known = {f.name for kind in (ScriptArguments, NEATConfig) for f in fields(kind)}
    assert {*ELSEWHERE.values(), *SPELLINGS} <= known
    spelled = [spelling for spellings in SPELLINGS.values() for spelling in spellings]
    assert len(spelled) == len(set(spelled))
    assert not {*ELSEWHERE, *spelled} & {f.name for f in fields(ScriptArguments)}
    assert not {*spelled} & known
    assert not {*ELSEWHERE} & (known - {*SCRIPT_OPTIONS})
