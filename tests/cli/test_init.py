"""`neat-align init`: what it finds is so, what it writes runs, and its comments are true."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from neat_align.cli.init import write_recipe
from neat_align.cli.options import parse_options
from neat_align.errors import ConfigError, DataError
from neat_align.pipeline import build_trainer, run_training
from neat_align.prompts.loading import rows_from_dataset
from neat_align.prompts.row_forms import to_conversation, to_text
from tiny import CHATML, MAX_POSITIONS, NO_SYSTEM, save_tiny

TEXTS = [f"What do you say to number {i}{' and more' * (i % 3)}?" for i in range(12)]
NONE: dict[str, Any] = {"bank": "politeness", "reward": "", "split": None, "measure": False}


def turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def row_of(text: str, *, messages: bool, pairs: bool) -> dict[str, Any]:
    def answer(words: str) -> Any:
        return [{"role": "assistant", "content": words}] if messages else words

    own = {"chosen": answer(f"thank you {text}"), "rejected": answer("I hate it")}
    return {"prompt": turns(text) if messages else text, **(own if pairs else {})}


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "chat": str(save_tiny(folder / "chat", "llama")),
        "base": str(save_tiny(folder / "base", "gpt2", template="none")),
    }


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def comment_of(recipe: str, option: str) -> str:
    """The lines of comment in front of an option, as one."""
    before = recipe.split(f"\n{option}:")[0].splitlines()
    lines = []
    while before and before[-1].startswith("# "):
        lines.append(before.pop()[2:])
    return " ".join(reversed(lines))


QUICK = [("chat", True, True), ("base", True, False), ("chat", False, False)]
KINDS = [
    pytest.param(*kind, marks=() if kind in QUICK else pytest.mark.slow)
    for kind in product(("chat", "base"), (True, False), (True, False))
]


@pytest.mark.parametrize(("kind", "messages", "pairs"), KINDS)
def test_the_recipe_fits_model_and_data_and_its_comments_are_true(
    models: dict[str, str],
    here: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    messages: bool,
    pairs: bool,
) -> None:
    data = written(
        here / "mine.jsonl", [row_of(t, messages=messages, pairs=pairs) for t in [*TEXTS, TEXTS[0]]]
    )
    write_recipe(models[kind], data, Path("recipe.yaml"), **NONE)
    out, recipe = capsys.readouterr().out, Path("recipe.yaml").read_text()
    options = yaml.safe_load(recipe)
    # what was found
    assert f"13 rows of {'messages' if messages else 'text'}" in out
    assert ("all with chosen and rejected" if pairs else "no answers of their own") in out
    assert "1 repeat an earlier one" in out
    assert ("no chat template" in out) == (kind == "base")
    # the form that the model takes
    assert options.get("as_conversations", False) is (kind == "chat" and not messages)
    assert options.get("as_texts", False) is (kind == "base" and messages)
    # lengths, by the tokenizer itself
    tokenizer = AutoTokenizer.from_pretrained(models[kind])
    lengths = []
    for text in TEXTS:
        asked = f"\n\nHuman: {text}\n\nAssistant:" if messages else text
        if kind == "chat":
            asked = tokenizer.apply_chat_template(
                turns(text), tokenize=False, add_generation_prompt=True
            )
        lengths.append(len(tokenizer(asked, add_special_tokens=False)["input_ids"]))
    why = comment_of(recipe, "max_prompt_length")
    assert f"the longest prompt of 13 rows has {max(lengths)}," in why
    assert f"The model's context is {MAX_POSITIONS}." in why
    assert max(lengths) <= options["max_prompt_length"] < max(lengths) + 16
    # what is done
    script, args = parse_options([], Path("recipe.yaml"))
    trainer = build_trainer(script, args)
    made = trainer.parts.data
    assert len(made.eval_rows) == options["holdout"] == 3
    assert "Of 12 different prompts" in comment_of(recipe, "holdout")
    assert made.skipped.count == 0
    plan = trainer.parts.plan
    assert f"# {plan.rounds} rounds of {plan.prompts_per_round} prompts, " in recipe
    assert f" {plan.completions} sampled answers, {plan.optimizer_steps} optimizer steps." in recipe
    assert args.needs_pairs == pairs
    assert ("distil_weight" in options) != pairs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "messages", "pairs"),
    [("chat", True, False), ("chat", False, True), ("base", True, True), ("base", False, False)],
)
def test_the_recipe_runs(
    models: dict[str, str], here: Path, kind: str, messages: bool, pairs: bool
) -> None:
    rows = [row_of(t, messages=messages, pairs=pairs) for t in TEXTS]
    write_recipe(models[kind], written(here / "mine.jsonl", rows), Path("recipe.yaml"), **NONE)
    shorter = ["--max_completion_length=12", "--max_kl=100", "--disable_tqdm=true"]
    script, args = parse_options(shorter, Path("recipe.yaml"))
    result = run_training(script, args)
    assert result["rounds"] == 2
    assert result["held_out_prompts"] == 3
    assert result["notices"] == []
    assert Path("runs/mine/model/adapter_config.json").is_file()
    write_recipe(models[kind], "mine.jsonl", Path("second.yaml"), **NONE)  # the first run is there
    assert yaml.safe_load(Path("second.yaml").read_text())["output_dir"] == "runs/mine-2"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "messages"), [("base", True)])
def test_a_placement_is_measured_where_that_is_asked_for(
    models: dict[str, str], here: Path, kind: str, messages: bool
) -> None:
    rows = [row_of(t, messages=messages, pairs=False) for t in TEXTS]
    path = written(here / "mine.jsonl", rows)
    pair = {"positive": "Say it in a kind way.", "negative": "Say it in a rude way."}
    (here / "bank.yaml").write_text(yaml.safe_dump({"pairs": [pair]}), encoding="utf-8")
    asked = {**NONE, "bank": "bank.yaml", "measure": True}
    write_recipe(models[kind], path, Path("recipe.yaml"), **asked)
    recipe = Path("recipe.yaml").read_text()
    why = comment_of(recipe, "instruction_placement")
    found = re.findall(r"(\w+): gap [+-]\d+\.\d\d, \d of \d pairs work", why)
    assert sorted(found) == ["affix", "system", "user_suffix"]
    assert why.startswith("Measured on 12 prompts by contrast")
    assert found[0] == yaml.safe_load(recipe)["instruction_placement"]


def test_an_answer_is_given_the_room_that_the_context_leaves_and_what_is_too_long_is_left_out(
    models: dict[str, str], here: Path
) -> None:
    texts = [*TEXTS, "x " * 700]
    path = written(here / "mine.jsonl", [row_of(t, messages=True, pairs=False) for t in texts])
    write_recipe(models["chat"], path, Path("recipe.yaml"), **NONE)
    recipe = Path("recipe.yaml").read_text()
    options = yaml.safe_load(recipe)
    assert options["on_bad_row"] == "skip"
    assert "1 are too long for it." in comment_of(recipe, "max_prompt_length")
    assert options["max_prompt_length"] + options["max_completion_length"] <= MAX_POSITIONS
    script, args = parse_options([], Path("recipe.yaml"))
    made = build_trainer(script, args).parts.data
    assert (len(made.rows) + len(made.eval_rows), made.skipped.count) == (12, 1)
    long = written(here / "long.jsonl", [row_of("x " * 700, messages=True, pairs=False)])
    with pytest.raises(ConfigError, match=r"the shortest prompt of .*long.jsonl has [\d,]+ tokens"):
        write_recipe(models["chat"], long, Path("other.yaml"), **NONE)


@pytest.mark.slow
def test_a_template_without_a_system_turn_is_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(here / "model", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHATML
    tokenizer.chat_template = NO_SYSTEM
    tokenizer.save_pretrained(folder)
    path = written(here / "mine.jsonl", [row_of(TEXTS[0], messages=True, pairs=True)])
    write_recipe(str(folder), path, Path("recipe.yaml"), **{**NONE, "reward": "vader"})
    assert "a chat template, with no system turn" in capsys.readouterr().out
    recipe = Path("recipe.yaml").read_text()
    why = comment_of(recipe, "instruction_placement")
    assert why.startswith("Not measured; affix can be had, too; the chat template does not take s")
    options = yaml.safe_load(recipe)
    assert options["holdout"] == 0
    assert options["reward_funcs"] == ["vader"]
    assert "rank_by" not in options
    assert build_trainer(*parse_options([], Path("recipe.yaml"))).parts.plan.rounds == 2


def test_what_is_there_is_not_overwritten(models: dict[str, str], here: Path) -> None:
    Path("recipe.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"recipe\.yaml is there already: choose another --output"
    ):
        write_recipe(models["chat"], "demo", Path("recipe.yaml"), **NONE)
    assert Path("recipe.yaml").read_text() == "mine"
    asked = {**NONE, "split": "test", "measure": True}
    with pytest.raises(ConfigError, match="measure probes the train split only"):
        write_recipe(models["chat"], "demo", Path("other.yaml"), **asked)


# ---- messages as text ----------------------------------------------------------------------------

_WORDS = st.text("abc .", min_size=1, max_size=12).map(str.strip).filter(bool)


@settings(max_examples=40)
@given(st.lists(_WORDS, min_size=1, max_size=4), st.none() | _WORDS)
def test_messages_as_text_and_back(words: list[str], system: str | None) -> None:
    roles = ["user", "assistant"] * 3
    said = words if len(words) % 2 else words[:-1] or ["a"]
    messages = [{"role": r, "content": w} for r, w in zip(roles, said, strict=False)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    (row,) = rows_from_dataset([{"prompt": messages}])
    text = to_text(row)
    assert str(text.prompt).endswith(f"\n\nHuman: {said[-1]}\n\nAssistant:")
    assert to_conversation(text).prompt == messages
    assert to_text(text) is text


def test_a_transcript_has_no_form_for_calls_of_tools() -> None:
    called = [
        *turns("And now?"),
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "1"},
    ]
    (row,) = rows_from_dataset([{"prompt": called}])
    with pytest.raises(DataError, match="tools or thoughts, which need a chat template"):
        to_text(row)
