"""What a script gives the trainer: a model, an adapter, a start policy, an optimizer, arguments."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, TrainingArguments

from neat_align import NEATTrainer
from neat_align.errors import ConfigError
from neat_align.trainer.given import as_config
from small_trainer import ROWS, TOKENIZER, config, count_e, trainer, weights
from tiny import Family, save_tiny, tiny_model

IDS = [[5, 6, 7]], [[8, 9, 10, 11]]  # a prompt and an answer


def model(family: Family = "llama", vocab_size: int = len(TOKENIZER)) -> PreTrainedModel:
    return tiny_model(family, vocab_size, tokenizer=TOKENIZER)


def lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
    return LoraConfig(**{**settings, **changes})


def made(folder: Path, given: Any, **more: Any) -> NEATTrainer:
    args = config(folder, kl_weight=1.0, learning_rate=0.05)
    return NEATTrainer(given, count_e, args, ROWS, processing_class=TOKENIZER, **more)


def start_of(t: NEATTrainer) -> list[float]:
    """What the start policy says of the answer."""
    return list(t.parts.policies.start_logprobs(*IDS)[0])


# ---- the start policy ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 6]},
    ],
    ids=["bias", "bias of the adapted", "a whole module", "some tokens"],
)
def test_the_start_policy_is_the_model_that_was_passed_and_stays_it(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Also where the adapter trains weights that stay when it is switched off (LoRA's bias)."""
    plain = trainer(tmp_path / "plain", "qwen2", kl_weight=1.0)
    t = made(tmp_path / "lora", model("qwen2"), peft_config=lora(**changes))
    assert start_of(t) == pytest.approx(start_of(plain), abs=1e-5)
    before = weights(t)
    t.train()
    assert start_of(t) == pytest.approx(start_of(plain), abs=1e-5)
    assert any(not torch.equal(before[name], value) for name, value in weights(t).items())


def test_an_adapter_that_the_model_comes_with_is_part_of_the_start(tmp_path: Path) -> None:
    given = get_peft_model(model(), lora(init_lora_weights=False))
    before = list(trainer(tmp_path / "merged", model=given).parts.policies.logprobs(*IDS)[0])
    t = made(tmp_path / "run", given)
    assert start_of(t) == pytest.approx(before, abs=1e-5)
    t.train()
    assert start_of(t) == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changes_its_base_needs_a_start_policy_of_its_own(
    tmp_path: Path, method: str
) -> None:
    with pytest.raises(ConfigError, match=r"before training begins .*pass ref_model, another copy"):
        made(tmp_path, model(), peft_config=lora(init_lora_weights=method))
    t = made(tmp_path / "b", model(), peft_config=lora(init_lora_weights=method), ref_model=model())
    assert start_of(t) == pytest.approx(list(t.parts.policies.logprobs(*IDS)[0]), abs=1e-4)


def test_a_start_policy_that_is_passed_is_frozen_and_without_dropout(tmp_path: Path) -> None:
    t = made(tmp_path, model("gpt2"), ref_model=model("gpt2").train())
    with t.parts.setup.reference() as start:
        assert not any(p.requires_grad for p in start.parameters())
        assert not start.training
        assert start is not t.policy


def test_a_start_policy_may_be_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "start", "llama", seed=3)
    t = made(tmp_path / "run", model(), ref_model=str(folder))
    by_object = made(tmp_path / "b", model(), ref_model=tiny_model("llama", len(TOKENIZER), 3))
    assert start_of(t) == pytest.approx(start_of(by_object), abs=1e-5)


@pytest.mark.parametrize("vocab_size", [100, len(TOKENIZER) + 16])
def test_a_start_policy_of_another_vocabulary_is_refused(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=f"a vocabulary of {vocab_size} tokens and the model one"):
        made(tmp_path, model(), ref_model=tiny_model("llama", vocab_size))


# ---- the model and its adapter -------------------------------------------------------------------


def test_an_adapter_loaded_frozen_is_told_how_to_load_it(tmp_path: Path) -> None:
    get_peft_model(model(), lora()).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(model(), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"no weight .* trainable.*is_trainable=True"):
        made(tmp_path / "run", frozen)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"names 'nope', and no module of LlamaForCausalLM is called so"
    ):
        made(tmp_path, model(), peft_config=lora(target_modules=["nope"]))
    with pytest.raises(ConfigError, match=r'SEQ_CLS.*set task_type="CAUSAL_LM"'):
        made(tmp_path, model(), peft_config=lora(task_type="SEQ_CLS"))


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        base = model(family).base_model
        with pytest.raises(
            ConfigError, match=r"no language-modelling head: load it with AutoModel"
        ):
            made(tmp_path, base)


def test_an_adapter_of_virtual_tokens_trains_and_is_saved(tmp_path: Path) -> None:
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    t = made(tmp_path, model(), peft_config=prefix)
    before = weights(t)
    t.train()
    changed = [k for k, v in weights(t).items() if not torch.equal(before[k], v)]
    assert changed == ["prompt_encoder.default.embedding.weight"]
    t.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


# ---- a generation_config that cannot be written --------------------------------------------------


def test_contradicting_generation_flags_do_not_end_the_run_at_its_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = model()
    given.generation_config.update(temperature=0.9, top_p=0.6)
    with caplog.at_level(logging.WARNING):
        t = made(tmp_path, given)
    assert "do_sample is set to True in it" in caplog.text
    t.train()
    t.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.9, 0.6)


def test_generation_flags_that_nothing_repairs_are_refused_at_once(tmp_path: Path) -> None:
    given = model()
    given.generation_config.update(num_beams=1, num_return_sequences=1, length_penalty=2.0)
    with pytest.raises(ConfigError, match=r"length_penalty.*Correct model.generation_config"):
        made(tmp_path, given)
    given.generation_config = None
    with pytest.raises(ConfigError, match=r"set model.generation_config = GenerationConfig\(\)"):
        made(tmp_path, given)
    given.generation_config = GenerationConfig()
    made(tmp_path, given)


# ---- arguments, optimizer, Trainer's other methods -----------------------------------------------


def test_training_arguments_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"args is a TrainingArguments.*pass a NEATConfig"):
        as_config(TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    assert as_config(None).output_dir == "neat-run"


def test_an_optimizer_of_frozen_weights_is_refused_and_one_of_the_adapters_trains(
    tmp_path: Path,
) -> None:
    base = model()
    optimizer = torch.optim.SGD(base.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"none of the model's trainable weights.*only now"):
        made(tmp_path, base, peft_config=lora(), optimizers=(optimizer, None))
    adapted = get_peft_model(model(), lora())
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    t = made(tmp_path, adapted, optimizers=(optimizer, None))
    before = weights(t)
    t.train()
    assert any(not torch.equal(before[name], value) for name, value in weights(t).items())


def test_methods_of_trainer_that_would_do_something_else_are_refused(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    with pytest.raises(ConfigError, match=r"predict has no labels .*use evaluate"):
        t.predict(ROWS)
