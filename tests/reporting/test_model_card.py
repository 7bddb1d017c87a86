"""The model card: valid for the hub, with the run's numbers, and nothing of the machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from neat_align.files.atomic import write_json
from neat_align.modeling.demo_model import HUB_NAME
from neat_align.reporting.card_facts import DEMO_BASE, CardModel, CardWishes
from neat_align.reporting.card_texts import is_hub_name, safe_value, words
from neat_align.reporting.model_card import model_card, write_model_card
from neat_align.reporting.pages import bounds, plain, signed
from neat_align.script_arguments import ScriptArguments
from pages import HOSTILE
from run_files import BAD, build_run, change_json, poison

SCRIPT = {
    "model_name_or_path": "some-org/some-model",
    "dataset_name": "some-org/some-prompts",
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "reward_funcs": ["tone"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("of the machine") / "run")


def recorded(run: Path, **script: Any) -> None:
    model = {"name": script.get("model_name_or_path", "some-org/some-model"), "adapter": "LORA"}
    options = {"learning_rate": 1e-4, "instruction_bank": "politeness"}
    change_json(run / "run.json", script={**SCRIPT, **script}, model=model, set_options=options)


def read_back(card: ModelCard) -> ModelCard:
    """As the hub and every client of it reads a card: from its text."""
    return ModelCard(str(card), ignore_metadata_errors=False)


def test_the_metadata_is_the_hubs(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    recorded(run)
    data = read_back(model_card(run)).data
    assert data.base_model == "some-org/some-model"
    assert data.datasets == ["some-org/some-prompts"]
    assert (data.to_dict()["library_name"], data.pipeline_tag) == ("peft", "text-generation")
    assert "base_model:adapter:some-org/some-model" in data.tags
    assert data.get("base_model_relation") == "adapter"
    assert data.license is None  # nobody here knows it
    assert {r.metric_type for r in data.eval_results} == {"reward", "second_judge", "perplexity"}
    assert {r.dataset_type for r in data.eval_results} == {"some-org/some-prompts"}


def test_the_numbers_are_those_of_the_result(finished: Path) -> None:
    text = str(model_card(finished))
    result = json.loads((finished / "result.json").read_text())
    low, high = result["reward_delta_ci95"]
    row = next(line for line in text.splitlines() if line.startswith("| Held-out reward: tone"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    digits = len(cells[1].partition(".")[2])
    assert cells[1:] == [
        plain(result["reward_before"], digits),
        plain(result["reward_after"], digits),
        signed(result["reward_delta"], digits),
        bounds(low, high, digits),
    ]
    assert f"On {result['held_out_prompts']} held-out prompts" in text
    kl = next(line for line in text.splitlines() if line.startswith("| KL to the start"))
    assert plain(result["kl_per_token"], 3) in kl
    assert "arXiv:2410.12194" in text
    assert "torch 2.13.0" in text


def test_nothing_of_the_machine_and_no_answer_is_in_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SOME_API_KEY", "a-secret-of-this-machine")
    run = build_run(tmp_path / "run")
    (tmp_path / "base").mkdir()
    recorded(
        run,
        model_name_or_path=str(tmp_path / "base"),
        dataset_name=str(tmp_path / "mine.jsonl"),
        reward_funcs=["https://user:word@inside.example/score", "mine.rewards:kind"],
        lora_target_modules=["q_proj"],
    )
    change_json(
        run / "run.json",
        rewards=["https://inside.example/score", "a-secret-of-this-machine"],
        set_options={
            "instruction_bank": str(tmp_path / "bank.yaml"),
            "vllm_server": "http://10.1.1.1",
        },
    )
    text = str(model_card(run))
    assert str(tmp_path) not in text
    assert not re.search(r"/home|/tmp|/root|10\.1\.1\.1|inside\.example|a-secret", text)
    assert "`base`, a folder that is not on the hub" in text
    assert "mine.jsonl" in text
    data = read_back(model_card(run)).data
    assert (data.base_model, data.datasets, data.eval_results) == (None, None, None)
    assert data.get("base_model_relation") is None
    assert not [bad for bad in BAD if bad in text]


def test_text_from_outside_is_no_markup(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    poison(run)
    text = str(model_card(run, wishes=CardWishes(name=f"{HOSTILE}\n# heading | cell")))
    assert "<script" not in re.sub(r"\\<", "", text)
    assert "\n# heading" not in text.replace("\n# \\<", "")
    read_back(model_card(run))


def test_what_has_no_comparison_says_so(tmp_path: Path) -> None:
    run = build_run(tmp_path / "interrupted")
    for name in ("result.json", "evaluation-after.json"):
        (run / name).unlink()
    text = str(model_card(run))
    assert "There is no comparison of before and after" in text
    assert "The last KL to the start that was measured is 0.150 nats per token" in text
    assert "| Held-out reward" not in text
    write_json(tmp_path / "new" / "nothing.json", {})
    card = model_card(tmp_path / "new", CardModel("some-org/some-model"))
    assert read_back(card).data.to_dict()["library_name"] == "transformers"
    assert "A fine-tuned [some-org/some-model]" in str(card)


def test_few_prompts_are_a_caution_and_no_row_of_a_leaderboard(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", prompts=12)
    recorded(run)
    card = model_card(run)
    assert "The results are from 12 prompts only" in str(card)
    assert read_back(card).data.eval_results is None


def test_warnings_of_the_report_are_cautions(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    change_json(run / "result.json", second_judge_delta=-0.2, stopped_because="KL was 3")
    text = str(model_card(run))
    assert "which training never saw, finds the answers worse" in text
    assert "- The run stopped early: KL was 3." in text


def test_wishes_and_the_license_of_a_base_on_the_disk(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    assert model_card(run, CardModel(str(base))).data.license == "mit"
    asked = CardWishes("Mine", ("en",), "cc0-1.0", "an-org/base", ("mine",), ("an-org/data",))
    path = write_model_card(tmp_path / "out", run, CardModel(str(base)), asked)
    card = ModelCard.load(path)
    assert "# Mine\n" in card.text
    assert (card.data.license, card.data.base_model) == ("cc0-1.0", "an-org/base")
    assert (card.data.language, card.data.datasets) == (["en"], ["an-org/data"])
    assert "mine" in card.data.tags
    assert DEMO_BASE == HUB_NAME


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/data/mine.jsonl", "mine.jsonl"),
        ("C:\\Users\\me\\bank.yaml", "bank.yaml"),
        ("data/mine.jsonl", "mine.jsonl"),
        ("../up/one", "one"),
        ("org/name", "org/name"),
        ("https://host/x?token=1", "(a server's URL)"),
        ("package.module:function", "package.module:function"),
        ({"a": ["/x/y", 1]}, {"a": ["y", 1]}),
        (0.5, 0.5),
    ],
    ids=str,
)
def test_what_a_setting_shows(value: Any, shown: Any) -> None:
    assert safe_value(value) == shown


def test_a_folder_that_looks_like_a_hub_name_is_none(tmp_path: Path, monkeypatch: Any) -> None:
    assert is_hub_name("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("org/name")
    assert words("a|b\n<c> `d`") == "a\\|b \\<c\\> \\`d\\`"


def test_the_recipe_keeps_what_was_set_to_nothing(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    recorded(run, holdout=0)
    change_json(run / "run.json", set_options={"kl_weight": 0.0, "bf16": False})
    recipe = str(model_card(run)).split("```yaml\n")[1].split("```")[0]
    chosen = yaml.safe_load(recipe)
    assert (chosen["kl_weight"], chosen["bf16"], chosen["holdout"]) == (0.0, False, 0)


def test_a_run_that_was_gone_on_with_has_the_recipe_of_the_unbroken_one() -> None:
    script = ScriptArguments(model_name_or_path="m", dataset_name="d", lora_r=8, resume=True)
    assert script.chosen() == {"model_name_or_path": "m", "dataset_name": "d", "lora_r": 8}
