"""Which configuration is the language model's, and how long its rows may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from peft import PromptTuningConfig, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel

from neat_align import ConfigError
from neat_align.modeling.requirements import check_causal, check_context, context_of
from neat_align.modeling.text_config import context_length, text_config
from small_trainer import ROWS, TOKENIZER, logged, trainer
from tiny import random_model, tiny_model

V = len(TOKENIZER)
IDS: dict[str, Any] = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
LLAMA: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **IDS,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA_TEXT: dict[str, Any] = {
    **LLAMA,
    "head_dim": 8,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}


def gemma3() -> PreTrainedModel:
    config = hf.Gemma3Config(
        text_config=GEMMA_TEXT,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    return random_model(config)


def gemma4() -> PreTrainedModel:
    config = hf.Gemma4Config(
        text_config=GEMMA_TEXT
        | {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8},
        vision_config=None,
        audio_config=None,
        image_token_id=5,
        boi_token_id=6,
        eoi_token_id=7,
    )
    return random_model(config)


def llava() -> PreTrainedModel:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**LLAMA),
        vision_config=hf.CLIPVisionConfig(**VISION),
        image_token_index=5,
    )
    return hf.LlavaForConditionalGeneration(config).float()


def mistral3() -> PreTrainedModel:
    config = hf.Mistral3Config(
        text_config=hf.MistralConfig(**LLAMA),
        vision_config=hf.PixtralVisionConfig(**VISION),
        image_token_index=5,
    )
    return hf.Mistral3ForConditionalGeneration(config).float()


def bloom() -> PreTrainedModel:
    return random_model(hf.BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2, **IDS))


def mamba() -> PreTrainedModel:
    config = hf.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4, **IDS)
    return random_model(config)


def mpt() -> PreTrainedModel:
    config = hf.MptConfig(vocab_size=V, d_model=16, n_layers=1, n_heads=2, max_seq_len=256, **IDS)
    return random_model(config)


def rwkv() -> PreTrainedModel:
    config = hf.RwkvConfig(
        vocab_size=V,
        hidden_size=16,
        attention_hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=16,
        context_length=256,
        **IDS,
    )
    return random_model(config)


def falcon() -> PreTrainedModel:
    config = hf.FalconConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True, **IDS
    )
    return random_model(config)


CONTEXTS = {
    bloom: None,
    mamba: None,
    mpt: 256,
    rwkv: 256,
    falcon: 2048,
    gemma3: 256,
    gemma4: 256,
    llava: 256,
    mistral3: 256,
}


@pytest.mark.parametrize("make", CONTEXTS, ids=lambda make: make.__name__)
def test_a_model_with_another_or_no_context_trains_a_round_with_drift_measured(
    make: Any, tmp_path: Path
) -> None:
    """Red before: an AttributeError in the evaluation of the data's answers, or context -1."""
    model = make()
    assert context_of(model) == CONTEXTS[make]
    t = trainer(tmp_path, model=model, rows=ROWS[:2], prompts_per_round=2, drift_prompts=1)
    t.train()
    assert any("loss" in line for line in logged(tmp_path))
    assert any("drift/kl" in line for line in logged(tmp_path))
    assert t.policy.config.get_text_config().vocab_size == V


@pytest.mark.parametrize("make", [gemma3, llava, mpt, rwkv], ids=lambda make: make.__name__)
def test_lengths_over_a_context_that_stands_elsewhere_are_refused(
    make: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is 464, over the model's context of 256 tokens"):
        trainer(tmp_path, model=make(), max_prompt_length=400, max_completion_length=64)


def test_virtual_tokens_take_their_part_of_the_context(tmp_path: Path) -> None:
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    model = get_peft_model(tiny_model("gpt2", V, tokenizer=TOKENIZER), adapter)
    assert context_of(model) == 512 - 8
    check_context(model, 500, 4)
    expected = r"is 505, over the model's context of 504 tokens \(the adapter takes 8 more\)"
    with pytest.raises(ConfigError, match=expected):
        check_context(model, 500, 5)
    # An adapter that the trainer adds, too.
    with pytest.raises(ConfigError, match="the adapter takes 8 more"):
        trainer(
            tmp_path,
            "gpt2",
            peft_config=adapter,
            max_prompt_length=500,
            max_completion_length=10,
        )


def rope(**parameters: Any) -> PreTrainedConfig:
    return hf.LlamaConfig(**LLAMA, rope_parameters={"rope_theta": 10000.0, **parameters})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.GPT2Config(n_positions=128), 128),
        (hf.GPTJConfig(n_positions=96), 96),
        (hf.CTRLConfig(n_positions=64), 64),
        (hf.OPTConfig(max_position_embeddings=77), 77),
        (hf.BloomConfig(seq_length=2048), 2048),  # the hub's checkpoints say it so
        (hf.PreTrainedConfig(max_sequence_length=512), 512),
        (hf.PreTrainedConfig(n_ctx=300), 300),
        (hf.PreTrainedConfig(max_position_embeddings=None, seq_length=100), 100),
        (hf.PreTrainedConfig(), None),
        (rope(rope_type="default"), 256),
        # Linear and dynamic: max_position_embeddings stays what the model was trained on.
        (rope(rope_type="linear", factor=4.0), 1024),
        (rope(rope_type="dynamic", factor=2.0), 512),
        # YaRN: the factor over the original length, whichever of the two conventions is followed.
        (rope(rope_type="yarn", factor=4.0), 1024),
        (rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), 256),
        (rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=256), 1024),
        # Llama 3: max_position_embeddings is the stretched length already.
        (
            rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
            256,
        ),
        # Gemma 3: only the layers that see everything are stretched.
        (
            hf.Gemma3TextConfig(
                **GEMMA_TEXT,
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                },
            ),
            256,
        ),
    ],
)
def test_the_context_by_whatever_name(config: PreTrainedConfig, expected: int | None) -> None:
    assert context_length(config) == expected


def test_a_model_of_several_language_models_is_refused() -> None:
    config = hf.PreTrainedConfig()
    config.decoder, config.text_config = hf.LlamaConfig(), hf.LlamaConfig()
    with pytest.raises(ConfigError, match="several language models, and a policy is one"):
        text_config(config)


@pytest.mark.parametrize("config", [hf.T5Config(), hf.WhisperConfig(), hf.T5GemmaConfig()])
def test_encoder_decoders_are_still_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(ConfigError, match="the model is an encoder-decoder"):
        check_causal(config, "the model")
