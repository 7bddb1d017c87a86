"""What users rely on: the names, the cost of importing, the snippet in the README, and every
recipe.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import neat_align
from neat_align.cli.evaluate import evaluate_held_out
from neat_align.cli.expand import write_expansion
from neat_align.cli.options import parse_options, recipe_path
from neat_align.demo.rows import demo_rows
from neat_align.errors import ConfigError
from neat_align.pipeline import load_data, run_training
from neat_align.script_arguments import ScriptArguments
from tiny import FAMILIES, Family, save_tiny

ROOT = Path(__file__).resolve().parent.parent
# compare-*.yaml are comparisons: tests/test_comparison_spec.py.
RECIPES = sorted(
    p.stem for p in recipe_path("demo").parent.glob("*.yaml") if not p.stem.startswith("compare-")
)


def test_every_public_name_exists() -> None:
    assert sorted(neat_align.__all__) == neat_align.__all__
    for name in neat_align.__all__:
        assert getattr(neat_align, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        neat_align.nothing  # noqa: B018


def seconds(*command: str) -> float:
    """The best of three runs, because the machine may be busy."""
    best = float("inf")
    for _ in range(3):
        start = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        best = min(best, time.monotonic() - start)
    return best


def test_importing_costs_little_and_help_answers_at_once() -> None:
    loaded = (
        "import sys, neat_align; assert 'torch' not in sys.modules and 'transformers' not in "
        "sys.modules"
    )
    assert seconds(sys.executable, "-c", loaded) - seconds(sys.executable, "-c", "pass") < 0.3
    assert seconds(sys.executable, "-m", "neat_align.cli", "--help") < 1.0


def tiny_recipe(name: str, folder: Path, family: Family, **changes: Any) -> list[str]:
    """A shipped recipe, cut down to a tiny random model and a few short completions."""
    model = save_tiny(folder / f"model-{family}", family)
    data = folder / "data.jsonl"
    rows = [
        {
            "chosen": f"\n\nHuman: What is {i}?\n\nAssistant: A kind answer, {i}.",
            "rejected": f"\n\nHuman: What is {i}?\n\nAssistant: You fool, {i}.",
        }
        for i in range(8)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": data,
        "as_conversations": "true",
        "judge_funcs": "vader",
        "output_dir": folder / "run",
        "holdout": 2,
        "prompts_per_round": 4,
        "num_train_epochs": 2,
        "max_prompt_length": 300,
        "max_completion_length": 8,
        "drift_prompts": 2,
        "max_kl": 1000,
        "min_pair_fraction": 0,
        "bf16": "false",
        "disable_tqdm": "true",
        **changes,
    }
    recipe = yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))
    if recipe.get("use_peft"):
        settings["lora_target_modules"] = "c_attn" if family == "gpt2" else "q_proj"
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize(
    "family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_on_every_family(tmp_path: Path, name: str, family: Family) -> None:
    settings, config = parse_options(tiny_recipe(name, tmp_path, family), recipe_path(name))
    result = run_training(settings, config)
    assert result["steps"] >= 1
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {
        "run.json",
        "result.json",
        "report.html",
        "metrics.jsonl",
        "model",
        "rounds",
    }
    assert json.loads((run / "result.json").read_text())["held_out_prompts"] == 2


def test_the_readme_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's Python, as written, with a tiny model under the name that it uses."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    code = next(b for b in blocks if "NEATTrainer" in b)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    save_tiny(tmp_path / "my-model", "llama")
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": [{"role": "user", "content": f"Say something about {i}."}]} for i in range(6)
    ]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), scope)
    assert (tmp_path / "runs" / "mine" / "model" / "model.safetensors").is_file()


def test_the_snippet_that_decodes_without_training_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python of docs/using.md, as written, with a tiny model under the name that it uses."""
    text = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    code = next(b for b in blocks if "contrast_processor" in b)
    save_tiny(tmp_path / "my-model", "llama")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "using.md", "exec"), scope)
    assert len(scope["answers"]) == 2
    assert all(scope["answers"])
    assert scope["contrast"]._seen.shape[0] == 2  # it was asked


def test_precedence_is_defaults_then_recipe_then_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    # YAML reads 1e-5 without a dot as text; it is a number all the same.
    recipe.write_text(
        "learning_rate: 1e-5\nprompts_per_round: 7\nreward_funcs: [vader, contrast]\nuse_peft: "
        "true\n",
        encoding="utf-8",
    )
    settings, config = parse_options(
        ["--prompts_per_round", "9", "--output_dir", str(tmp_path)], recipe
    )
    assert config.learning_rate == 1e-5
    assert config.prompts_per_round == 9
    assert config.num_positive == 1
    assert settings.reward_funcs == ["vader", "contrast"]
    assert settings.use_peft is True


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (
            "prompts_per_rund: 3\n",
            [],
            "unknown option 'prompts_per_rund'; did you mean 'prompts_per_round'",
        ),
        ("", ["--beat", "3"], "command line: unknown option 'beat'; did you mean 'beta'"),
        ("- a\n- b\n", [], "a recipe is a mapping"),
        ("a: [\n", [], "not valid YAML"),
        ("", ["stray"], "'stray' belongs to no option"),
    ],
)
def test_unknown_settings_are_refused_by_name(
    tmp_path: Path, text: str, arguments: list[str], message: str
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text or "seed: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_options(arguments, recipe)


def test_a_missing_recipe_names_the_ones_that_ship(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe at .*demo, .*hh-full"):
        parse_options([], tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("form", "suffix"), [("ranked", ".jsonl"), ("preference", ".parquet"), ("groups", ".parquet")]
)
def test_expand_writes_a_data_set(tmp_path: Path, form: str, suffix: str) -> None:
    import datasets

    settings, config = parse_options(tiny_recipe("demo", tmp_path, "llama"), recipe_path("demo"))
    output = tmp_path / f"out{suffix}"
    write_expansion(settings, config, output, form)
    loaded = datasets.load_dataset(
        "json" if suffix == ".jsonl" else "parquet",
        data_files=str(output),
        cache_dir=str(tmp_path),
        split="train",
    )
    assert len(loaded) == 4
    wanted = {"ranked": "completions", "preference": "chosen", "groups": "completion_ids"}[form]
    assert {"prompt", wanted} <= set(loaded.column_names)
    if form == "ranked":
        assert loaded[0]["rewards"] == sorted(loaded[0]["rewards"], reverse=True)


def test_a_finished_expansion_is_not_written_out_as_if_it_were_new(tmp_path: Path) -> None:
    words = tiny_recipe("demo", tmp_path, "llama")
    write_expansion(*parse_options(words, recipe_path("demo")), tmp_path / "a.jsonl", "ranked")
    with pytest.raises(ConfigError, match="holds a finished expansion"):
        write_expansion(
            *parse_options([*words, "--temperature", "1.0"], recipe_path("demo")),
            tmp_path / "b.jsonl",
            "ranked",
        )
    write_expansion(
        *parse_options([*words, "--resume", "true"], recipe_path("demo")),
        tmp_path / "b.jsonl",
        "ranked",
    )
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_expansion_without_rewards_ranks_by_origin(tmp_path: Path) -> None:
    write_expansion(
        *parse_options(tiny_recipe("no-reward", tmp_path, "llama"), recipe_path("no-reward")),
        tmp_path / "out.jsonl",
        "preference",
    )
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows
    assert all(
        r["origin_chosen"] in ("positive", "chosen")
        and r["origin_rejected"] in ("negative", "rejected")
        for r in rows
    )


def test_a_run_is_not_resumed_with_another_reward(tmp_path: Path) -> None:
    words = tiny_recipe("demo", tmp_path, "llama")
    run_training(*parse_options(words, recipe_path("demo")))
    with pytest.raises(
        ConfigError,
        match=r"other settings:\n  rewards was \[\['vader', 1.0\]\] and is \[\['contrast', 1.0\]\]",
    ):
        run_training(
            *parse_options(
                [*words, "--resume", "true", "--reward_funcs", "contrast"], recipe_path("demo")
            )
        )


def test_evaluate_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, config = parse_options(tiny_recipe("demo", tmp_path, "qwen2"), recipe_path("demo"))
    evaluate_held_out(settings, config)
    assert "eval_reward" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "run" / "evaluation.json").read_text())["rewards"]) == 2


def test_training_and_held_out_prompts_do_not_overlap() -> None:
    train_rows, held_out = demo_rows("train"), demo_rows("heldout")
    assert len(train_rows) == 256
    assert len(held_out) == 64
    assert all(row.chosen for row in held_out)
    assert not {str(r.prompt) for r in train_rows} & {str(r.prompt) for r in held_out}


def test_the_demo_takes_the_options_of_any_other_data(tmp_path: Path) -> None:
    train_rows, shipped = demo_rows("train"), demo_rows("heldout")
    assert load_data(ScriptArguments(dataset_name="demo")) == (train_rows, shipped)
    rows, held_out = load_data(ScriptArguments(dataset_name="demo", holdout=16, dataset_limit=5))
    assert rows == train_rows[:5]
    assert held_out == shipped[::4]
    assert load_data(ScriptArguments(dataset_name="demo", holdout=0))[1] == []
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": [{"role": "user", "content": "What now?"}]}\n', encoding="utf-8")
    assert (
        len(load_data(ScriptArguments(dataset_name="demo", eval_dataset_name=str(other)))[1]) == 1
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset_train_split": "train"},
            "dataset_train_split is 'train', but the demo's prompts have no splits: take it out",
        ),
        ({"dataset_limit": 0}, "dataset_limit is 0; it must be 1 or more, or unset for every row"),
        (
            {"eval_dataset_split": "test"},
            "eval_dataset_split is 'test', but there is no eval_dataset_name for it to be a split "
            "of",
        ),
    ],
)
def test_options_that_the_demos_data_cannot_have_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_data(ScriptArguments(dataset_name="demo", **options))


def test_settings_without_a_model_or_data_are_refused() -> None:
    from neat_align import NEATConfig
    from neat_align.pipeline import build_trainer

    with pytest.raises(ConfigError, match="model_name_or_path is missing"):
        build_trainer(ScriptArguments(), NEATConfig(output_dir="x"))
    with pytest.raises(ConfigError, match="dataset_name is missing"):
        build_trainer(ScriptArguments(model_name_or_path="demo"), NEATConfig(output_dir="x"))
