"""Models and adapters of unusual kinds through a whole round: they train right, or say why not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, MixtralConfig, PreTrainedModel, RwkvConfig

from neat_align.errors import ConfigError
from neat_align.modeling import precision
from neat_align.modeling.loading import load_renamed_weights
from neat_align.modeling.precision import half_precision_copy
from neat_align.sampling.protocol import SampleRequest, SamplingParams
from small_trainer import ROWS, TOKENIZER, assert_same_weights, logged, trainer, weights
from tiny import alone, random_model, tiny_model

PROMPTS = [tuple(range(20, 29)), (7, 9, 11), tuple(range(40, 54))]


@pytest.fixture(autouse=True)
def _warnings_are_said_again() -> None:
    precision._say_once.cache_clear()


def mixtral(**asked: Any) -> PreTrainedModel:
    return random_model(
        MixtralConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            num_local_experts=4,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
            **asked,
        )
    )


KINDS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "adaption prompt": peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2
    ),
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_cannot_be_merged_trains(
    tmp_path: Path, kind: str, bf16: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """By default a CPU samples from a merged half-precision copy, which there is none of."""
    t = trainer(tmp_path, peft_config=KINDS[kind], bf16=bf16, negative_policy="initial")
    t.train()
    assert ("is not merged into the copy that samples" in caplog.text) == bf16
    policies = t.parts.policies
    requests = [SampleRequest(p, i) for i, p in enumerate(PROMPTS)]
    drawn = policies.sampler().sample(requests, SamplingParams(6))
    scored = policies.logprobs(PROMPTS, [s.token_ids for s in drawn])
    for p, s, row in zip(PROMPTS, drawn, scored, strict=True):
        expected = alone(t.policy.eval(), p, s.token_ids)
        assert row == pytest.approx(expected, abs=0.3 if bf16 else 1e-3)
        assert s.logprob == pytest.approx(sum(expected), abs=0.5 if bf16 else 1e-3)


def test_lora_is_merged_in_a_run_under_autocast(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Accelerate's autocast around the policy must not be taken for another model."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=64, target_modules="all-linear")
    t = trainer(tmp_path, peft_config=lora, bf16=True, num_train_epochs=2)
    t.train()
    assert "is not merged" not in caplog.text
    copied = half_precision_copy(t.policy, torch.bfloat16)
    assert copied is not None
    assert not isinstance(copied, peft.PeftModel)


def test_a_router_loss_that_nobody_adds_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    t = trainer(tmp_path, model=mixtral(output_router_logits=True), num_train_epochs=2)
    t.train()
    assert caplog.text.count("asks for a load balancing loss: NEAT adds none") == 1
    assert t.parts.policies.layout == "packed"
    assert t.policy.config.output_router_logits is True


def test_router_jitter_is_off_while_the_policy_learns(tmp_path: Path) -> None:
    """The first step's policy is the one that sampled: KL to the start is 0."""
    t = trainer(tmp_path, model=mixtral(router_jitter_noise=0.3), kl_weight=0.1)
    t.train()
    first = next(line for line in logged(tmp_path) if "loss/kl" in line)
    assert abs(first["loss/kl"]) < 1e-5


def test_noise_in_training_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    model.get_input_embeddings().register_forward_hook(
        lambda module, _, out: out + torch.rand_like(out) * 0.1 if module.training else out
    )
    with pytest.raises(ConfigError, match="LlamaForCausalLM computes something else in training"):
        trainer(tmp_path, model=model)


def test_a_model_that_cannot_be_packed_is_compared_with_itself_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """RWKV reads no mask, and mixes the rows of a batch while it decodes."""
    torch.manual_seed(0)
    model = random_model(RwkvConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    t = trainer(tmp_path, model=model, prefix_sharing="off", negative_policy="initial")
    assert t.parts.policies.known_way.way == "one_row"
    assert t.parts.policies.known_start_way.way == "one_row"
    said = [r.message for r in caplog.records if "RwkvForCausalLM" in r.message]
    assert len(said) == 1
    assert "nats per token apart" in said[0]
    drawn = t.parts.policies.sampler().sample(
        [SampleRequest(p, i) for i, p in enumerate(PROMPTS)], SamplingParams(6)
    )
    for p, s in zip(PROMPTS, drawn, strict=True):
        expected = sum(alone(t.policy.eval(), p, s.token_ids))
        assert s.logprob == pytest.approx(expected, abs=1e-3)


def test_a_model_that_autocast_breaks_is_told_to_go_without(tmp_path: Path) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)

    def strict(module: torch.nn.Module, inputs: Any, out: torch.Tensor) -> None:
        if out.dtype != torch.float32:
            raise RuntimeError("Index put requires the source and destination dtypes match")

    model.model.layers[0].mlp.register_forward_hook(strict)
    with pytest.raises(ConfigError, match=r"fails when it computes in bfloat16.*set bf16"):
        trainer(tmp_path / "half", model=model, bf16=True)
    trainer(tmp_path / "whole", model=model, bf16=False)


def gemma3() -> PreTrainedModel:
    """With pictures, as Gemma 3 4B is: its weights have other names on the disk."""
    text = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    pictures = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    return random_model(
        Gemma3Config(text_config=text, vision_config=pictures, mm_tokens_per_image=1)
    )


@pytest.mark.parametrize(("made", "shard_size"), [(gemma3, None), (mixtral, "100KB")])
def test_weights_that_are_saved_under_other_names_are_gone_on_with(
    made: Callable[[], PreTrainedModel],
    shard_size: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if shard_size is not None:
        save = partialmethod(PreTrainedModel.save_pretrained, max_shard_size=shard_size)
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    short = {"prompts_per_round": 4, "num_train_epochs": 2}
    whole = trainer(tmp_path / "whole", model=made(), **short)
    whole.train()
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(cut / "checkpoint-4")
    resumed = trainer(cut, model=made(), **short)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(whole, resumed)
    assert logged(cut)[-2] == logged(tmp_path / "whole")[-2]


def test_the_best_model_is_loaded_although_its_weights_have_other_names(tmp_path: Path) -> None:
    t = trainer(
        tmp_path,
        model=gemma3(),
        prompts_per_round=4,
        num_train_epochs=2,
        eval_dataset=ROWS[:2],
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_perplexity",
        greater_is_better=True,
        learning_rate=1e-2,
    )
    t.train()
    best = Path(str(t.state.best_model_checkpoint))
    assert best.name == "checkpoint-2"
    saved = type(t.policy).from_pretrained(best)  # type: ignore[attr-defined]
    for name, weight in saved.state_dict().items():
        assert torch.equal(weight, weights(t)[name]), name


def test_a_checkpoint_without_some_of_the_weights_is_refused(tmp_path: Path) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path)
    kept = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "layers.0" in k}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="does not hold the weights of this Mixtral"):
        load_renamed_weights(model, tmp_path)
