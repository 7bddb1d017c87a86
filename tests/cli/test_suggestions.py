"""A wrong name: what was probably meant, and whether it was a path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from neat_align.cli.dry_run import planned
from neat_align.cli.options import parse_options
from neat_align.errors import ConfigError, NEATError, PromptError, RewardError, did_you_mean
from neat_align.files.paths import is_likely_path, is_surely_path
from neat_align.modeling.loading import load_policy
from neat_align.modeling.target_modules import check_target_modules
from neat_align.prompts.instruction_banks import load_bank
from neat_align.prompts.loading import load_rows
from neat_align.rewards.resolve import resolve_rewards
from small_trainer import trainer
from tiny import save_tiny, tiny_model


def test_the_nearest_name_is_meant_whatever_its_case() -> None:
    assert did_you_mean("VADR", ["vader", "contrast"]) == "did you mean 'vader'?"
    assert did_you_mean("Q_PROJ", ["q_proj"]) == "did you mean 'q_proj'?"
    assert did_you_mean("adamw", ["AdamW", "adamw_torch", "sgd"], most=2) == (
        "did you mean 'AdamW' or 'adamw_torch'?"
    )
    assert did_you_mean("xyz", ["vader"]) == ""
    assert did_you_mean(None, []) == ""


@settings(max_examples=25)
@given(name=st.text(max_size=8), known=st.lists(st.text(max_size=8), max_size=5))
def test_only_known_names_are_suggested(name: str, known: list[str]) -> None:
    said = did_you_mean(name, known)
    lowered = [word.lower() for word in known]
    if not said:
        assert not difflib.get_close_matches(name.lower(), lowered, n=1)
    else:
        assert said.removeprefix("did you mean ").removesuffix("?") in [repr(w) for w in known]


WRONG: list[tuple[Callable[[], Any], type[NEATError], str]] = [
    (lambda: resolve_rewards("vadr", None), RewardError, "did you mean 'vader'?"),
    (lambda: resolve_rewards("Contrasts", None), RewardError, "did you mean 'contrast'?"),
    (
        lambda: resolve_rewards("statistics:fmeam", None),
        RewardError,
        "module 'statistics' has no 'fmeam'; did you mean 'fmean'?",
    ),
    (
        lambda: parse_options([], Path("quickstrt.yaml")),
        ConfigError,
        "there is no recipe at quickstrt.yaml; did you mean 'quickstart'?; these ship: ",
    ),
    (lambda: load_bank("politness"), PromptError, "Did you mean 'politeness'?"),
    (
        lambda: parse_options(["--report_to", "tensorbord"], None),
        ConfigError,
        "report_to names 'tensorbord'; did you mean 'tensorboard'?",
    ),
]


@pytest.mark.parametrize(("ask", "error", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_name_is_told_what_was_meant(
    ask: Callable[[], Any], error: type[NEATError], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ask()


# ---- modules of an adapter -----------------------------------------------------------------------


def test_a_misspelt_module_among_others_is_refused_and_not_left_out(tmp_path: Path) -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_prj"])
    message = (
        "lora_target_modules (target_modules of peft_config) names 'v_prj', and no module of "
        "LlamaForCausalLM is called so; did you mean 'v_proj'? Its layers are embed_tokens, "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        trainer(tmp_path, peft_config=adapter)
    folder = save_tiny(tmp_path / "model", "gpt2")
    words = f"--model_name_or_path={folder} --dataset_name=demo --use_peft --bf16=false"
    given = [*words.split(), "--lora_target_modules", "q_proj", "--max_prompt_length=200"]
    with pytest.raises(ConfigError, match=r"names 'q_proj', .*Its layers are wte, wpe, c_attn"):
        planned(*parse_options(given, None))


@pytest.mark.parametrize(
    "target_modules",
    ["all-linear", ".*q_proj", ["q_proj"], ["self_attn.q_proj"], ["model.layers.0.mlp.up_proj"]],
    ids=["all", "pattern", "name", "end", "path"],
)
def test_what_peft_finds_is_found(target_modules: Any) -> None:
    with torch.device("meta"):
        model = tiny_model("llama", 384)
    check_target_modules(model, LoraConfig(target_modules=target_modules))


# ---- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "surely"),
    [
        ("./mine", True),
        ("../mine", True),
        ("~/mine", True),
        ("/models/mine", True),
        ("a/b/c", True),
        ("mine/", True),
        ("prompts.jsonl", True),
        ("data/prompts.parquet", True),
        ("owner/name", False),
        ("gpt2", False),
        ("Qwen/Qwen2.5-0.5B-Instruct", False),
        ("meta-llama/Llama-3.1-8B", False),
    ],
)
def test_what_is_written_as_only_paths_are(name: str, surely: bool) -> None:
    assert is_surely_path(name) is surely
    assert is_likely_path(name) is surely


def test_a_path_with_nothing_there_is_called_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_likely_path("models/mine")
    for name in ("./mine", "models/a/b", "~/no/such/model", str(tmp_path / "mine")):
        there = rf"the model {re.escape(name)}: there is no such file or folder.*: check the path"
        with pytest.raises(ConfigError, match=there):
            parse_options([f"--model_name_or_path={name}"], None)
    with pytest.raises(ConfigError, match=re.escape(f"(there is {tmp_path / 'models'})")):
        parse_options(["--model_name_or_path=models/a/b"], None)
    with pytest.raises(ConfigError, match="no such folder in models, and no such model on the hub"):
        load_policy("models/mine")
    with pytest.raises(RewardError, match=r"the reward \./rm: there is no such file or folder"):
        resolve_rewards("./rm", None)
    for name in ("./prompts", "models/a/b", "models/x.jsonl", "prompts.json"):
        with pytest.raises(NEATError, match="there is no such file"):
            load_rows(name)
