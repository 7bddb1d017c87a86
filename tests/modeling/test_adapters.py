"""Adapter folders: merged where that changes nothing, else left an adapter; what does not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, MambaConfig, OPTConfig

from neat_align.errors import ConfigError
from neat_align.modeling import precision
from neat_align.modeling.loading import load_policy
from neat_align.modeling.precision import half_precision_copy
from neat_align.modeling.self_check import showing_adapter
from tiny import random_model, tiny_tokenizer

VOCAB = 384
IDS = torch.tensor([[5, 6, 7, 8, 9, 30, 5, 6]])
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def base_folder(folder: Path, *, tied: bool = False) -> Path:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    random_model(config).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    return folder / "base"


def trained(base: Path, config: Any) -> Any:
    """A PEFT model whose adapter has an effect, as if it had been trained."""
    torch.manual_seed(0)
    model: Any = get_peft_model(load_policy(str(base)), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval()


def logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits[:, -IDS.shape[1] :].float().log_softmax(-1)


@pytest.fixture(autouse=True)
def _warnings_are_said_again() -> None:
    precision._say_once.cache_clear()


MERGED = {
    "lora": peft.LoraConfig(**TASK, target_modules="all-linear"),
    "dora": peft.LoraConfig(**TASK, target_modules=["q_proj"], use_dora=True),
    "head": peft.LoraConfig(**TASK, target_modules=["q_proj", "lm_head"]),
    "embeddings": peft.LoraConfig(**TASK, target_modules=["q_proj", "embed_tokens"]),
    "saved head": peft.LoraConfig(**TASK, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved embeddings": peft.LoraConfig(
        **TASK, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    ),
    "single tokens": peft.LoraConfig(
        **TASK, target_modules=["q_proj"], trainable_token_indices=[5, 6]
    ),
    "ia3": peft.IA3Config(
        **TASK, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": peft.LoHaConfig(**TASK, target_modules=["q_proj"]),
    "vera": peft.VeraConfig(**TASK, target_modules=["q_proj"], r=4),
}
UNMERGED = {
    "prompt tuning": peft.PromptTuningConfig(**TASK, num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(**TASK, num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix tuning": peft.PrefixTuningConfig(**TASK, num_virtual_tokens=4),
    "adaption prompt": peft.AdaptionPromptConfig(**TASK, adapter_len=4, adapter_layers=2),
    "lora bias": peft.LoraConfig(**TASK, target_modules=["q_proj"], lora_bias=True),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", MERGED | UNMERGED)
def test_a_loaded_adapter_says_what_it_said_when_it_was_saved(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    """Merged into weights that the head shares with the embeddings, it would be another model."""
    model = trained(base_folder(tmp_path, tied=tied), (MERGED | UNMERGED)[kind])
    expected = logprobs(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded: Any = load_policy(str(tmp_path / "adapter"))
    torch.testing.assert_close(logprobs(loaded), expected, rtol=0, atol=1e-4)
    assert isinstance(loaded, peft.PeftModel) == (kind in UNMERGED)
    assert any(p.requires_grad for p in loaded.parameters())
    assert loaded.config.name_or_path == str(tmp_path / "adapter")
    loaded.save_pretrained(tmp_path / "again")
    again = load_policy(str(tmp_path / "again"))
    torch.testing.assert_close(logprobs(again), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", MERGED | UNMERGED)
def test_the_copy_that_samples_is_the_same_policy(
    tmp_path: Path, kind: str, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained(base_folder(tmp_path, tied=tied), (MERGED | UNMERGED)[kind])
    copied = half_precision_copy(model, torch.float32)
    torch.testing.assert_close(logprobs(copied), logprobs(model), rtol=0, atol=1e-4)
    stays = kind in UNMERGED or (tied and kind in ("head", "embeddings"))
    assert isinstance(copied, peft.PeftModel) == stays
    assert ("is not merged into the copy that samples" in caplog.text) == stays
    half = half_precision_copy(model, torch.bfloat16)
    assert half is not None
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert float((logprobs(half) - logprobs(model)).abs().mean()) < 0.1


def test_a_state_space_model_samples_what_its_adapter_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its head shares the embeddings, which its usual adapters train."""
    mamba = random_model(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2))
    targets = ["x_proj", "embeddings", "in_proj"]
    model: Any = get_peft_model(mamba, peft.LoraConfig(**TASK, target_modules=targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    copied = half_precision_copy(model.eval(), torch.float32)
    torch.testing.assert_close(logprobs(copied), logprobs(model), rtol=0, atol=1e-4)
    assert "is not merged into the copy that samples" in caplog.text


@pytest.mark.parametrize("kind", ["saved head", "saved embeddings", "single tokens", "loha"])
def test_the_copy_of_the_start_policy_has_nothing_of_the_adapter(tmp_path: Path, kind: str) -> None:
    model = trained(base_folder(tmp_path), MERGED[kind])
    with model.disable_adapter():
        expected = logprobs(model)
        copied = half_precision_copy(model, torch.float32)
    torch.testing.assert_close(logprobs(copied), expected, rtol=0, atol=1e-4)
    assert float((logprobs(model) - expected).abs().max()) > 0.05


def test_a_model_that_cannot_be_copied_is_sampled_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """peft ties an adapter of the head to that of the embeddings by computing it from that."""
    config = peft.LoraConfig(**TASK, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = trained(base_folder(tmp_path, tied=True), config)
    assert half_precision_copy(model, torch.bfloat16) is None
    assert "sampled from the policy itself" in caplog.text


@pytest.mark.parametrize("kind", MERGED | UNMERGED)
def test_an_adapter_without_effect_shows_and_is_put_back(tmp_path: Path, kind: str) -> None:
    config = (MERGED | UNMERGED)[kind]
    torch.manual_seed(0)
    model: Any = get_peft_model(load_policy(str(base_folder(tmp_path))), config).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    new = logprobs(model)
    with model.disable_adapter():
        without = logprobs(model)
    with showing_adapter(model):
        assert float((logprobs(model) - without).abs().max()) > 1e-3
    assert torch.equal(logprobs(model), new)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


# ---- what does not fit ---------------------------------------------------------------------------


def settings_of(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


ADDED = {
    "lora": peft.LoraConfig(**TASK, target_modules=["q_proj"]),
    "saved": peft.LoraConfig(
        **TASK, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "saved embeddings": MERGED["saved embeddings"],
    "single tokens": peft.LoraConfig(
        **TASK, target_modules=["q_proj"], trainable_token_indices=[VOCAB + 6, VOCAB + 11]
    ),
    "both": peft.LoraConfig(**TASK, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "prompt tuning": UNMERGED["prompt tuning"],
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ADDED)
def test_an_adapter_with_added_tokens_brings_their_embeddings(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    base: Any = load_policy(str(base_folder(tmp_path, tied=tied)))
    torch.manual_seed(0)
    base.resize_token_embeddings(VOCAB + 16)
    model: Any = get_peft_model(base, copy.deepcopy(ADDED[kind]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    ids = torch.tensor([[5, VOCAB + 6, 7, VOCAB + 11]])
    model.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    settings_of(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    loaded: Any = load_policy(str(tmp_path / "adapter")).eval()
    assert loaded.config.vocab_size == VOCAB + 16
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_added_tokens_whose_rows_were_not_saved_are_told_with_both_sizes(
    tmp_path: Path, target: str
) -> None:
    base: Any = load_policy(str(base_folder(tmp_path)))
    base.resize_token_embeddings(VOCAB + 16)
    model: Any = get_peft_model(base, peft.LoraConfig(**TASK, target_modules=[target]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=target == "embed_tokens")
    settings_of(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(
        ConfigError,
        match=rf"a vocabulary of {VOCAB + 16} tokens, and its base model .* has {VOCAB}: it does "
        r"not hold the embeddings.*Save the resized base model",
    ):
        load_policy(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_type": "TELEPATHY"},
            r"is of the kind TELEPATHY, which peft [\d.]+ does not have \(it has .*LORA.*\): "
            "upgrade peft",
        ),
        (
            {"task_type": "SEQ_CLS"},
            "was trained for the task SEQ_CLS, and a policy continues text: choose an adapter of a "
            "causal language model",
        ),
        ({"r": "many"}, "does not fit its base model|is broken, or of another version of peft"),
        ({"base_model_name_or_path": None}, "does not say which model it belongs to"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_told_why(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = trained(base_folder(tmp_path), MERGED["lora"])
    model.save_pretrained(tmp_path / "adapter")
    settings_of(tmp_path / "adapter", **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        load_policy(str(tmp_path / "adapter"))
    assert "trained on another one" not in str(caught.value) or "r" in changes


def test_an_adapter_of_a_kind_that_the_model_does_not_take_is_not_told_of_another(
    tmp_path: Path,
) -> None:
    """Adaption prompts are made for the attention of Llama, Mistral and GPT-2."""
    model = trained(base_folder(tmp_path), UNMERGED["adaption prompt"])
    model.save_pretrained(tmp_path / "adapter")
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 32}
    other = OPTConfig(**shape, num_attention_heads=4, word_embed_proj_dim=32)
    random_model(other).save_pretrained(tmp_path / "other")
    settings_of(
        tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "other"), target_modules=None
    )
    with pytest.raises(ConfigError, match="cannot put an adapter of the kind") as caught:
        load_policy(str(tmp_path / "adapter"))
    assert "trained on another one" not in str(caught.value)


def test_a_damaged_adapter_is_told_so(tmp_path: Path) -> None:
    model = trained(base_folder(tmp_path), MERGED["lora"])
    model.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors is damaged"):
        load_policy(str(tmp_path / "adapter"))
