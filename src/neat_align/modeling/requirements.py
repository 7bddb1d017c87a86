"""What a model must be before it can be a policy, and what is switched off before it trains."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from neat_align.errors import ConfigError

# Parts of the names of what modules drop, or shake their input by, in training.
_RANDOM = ("dropout", "layerdrop", "drop_path")
# Noise of routers. Not PhiMoE's `router_jitter_noise`: it decides who is routed in evaluation, too.
_NOISE = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")


def check_policy(
    model: Any, tokenizer: Any, max_prompt_length: int, max_completion_length: int
) -> None:
    """Refuse a model that cannot continue text, or that the tokenizer or the lengths do not fit.

    Before anything is sampled. Lengths are in tokens. Raises ConfigError.
    """
    check_causal(model.config, str(model.config.name_or_path or type(model).__name__))
    rows = model.get_input_embeddings().weight.shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows > 0:  # 0: DeepSpeed's ZeRO-3 holds the weights elsewhere
        raise ConfigError(
            f"the tokenizer has token ids up to {needed - 1} and the model has embeddings for "
            f"{rows} tokens only: pass the model's own tokenizer, or call "
            "model.resize_token_embeddings(len(tokenizer)) and train the new ones"
        )
    check_context(model, max_prompt_length, max_completion_length)


def check_causal(config: Any, name: str) -> None:
    """Refuse encoders and encoder-decoders; `config` is the model's, `name` what messages call it.

    The first see the words that they should predict, the second take prompts elsewhere.
    """
    needed = "a policy continues its prompt, so name a causal (decoder-only) language model"
    if config.is_encoder_decoder:
        raise ConfigError(f"{name} is an encoder-decoder ({config.model_type}); {needed}")
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
        raise ConfigError(
            f"{name} is an encoder ({config.model_type}), which sees the words that it should "
            f"predict; {needed}"
        )


def check_context(model: Any, max_prompt_length: int, max_completion_length: int) -> None:
    """Refuse lengths that together pass the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None)
    needed = max_prompt_length + max_completion_length
    if limit is not None and needed > limit:
        raise ConfigError(
            f"max_prompt_length + max_completion_length is {needed}, over the model's context of "
            f"{limit} tokens: lower one of them"
        )


def check_trainable_weights(model: torch.nn.Module) -> None:
    """Refuse trainable weights that are held in half precision.

    AdamW at a learning rate of 1e-5 changes a weight by about 1e-5 of the usual scale a step; bf16
    keeps 8 bits, so the update rounds away and the weight never moves. Nothing fails: the run ends
    with the model it began with.
    """
    half = [
        (name, p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
    ]
    if half:
        name, dtype = half[0]
        raise ConfigError(
            f"{len(half)} trainable weights are held in {str(dtype).removeprefix('torch.')} (the "
            f"first is {name}): small updates would round away and nothing would be learned. Load "
            "the model with dtype=torch.float32 (bf16: true still computes in bf16 autocast), or "
            "train a LoRA adapter with peft_config"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("no weight of the model is trainable: unfreeze some, or pass peft_config")


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability to zero, and the noise of a mixture of experts' router.

    Of dropout modules, and those that attention, OPT's layers, routers and adapters keep as
    numbers. `self_check.check_training_forward` finds what is left.
    """
    for module in model.modules():
        is_dropout = "dropout" in type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            named = name in _NOISE or any(part in name for part in _RANDOM)
            if not named and not (is_dropout and name == "p"):
                continue
            if isinstance(value, float):
                setattr(module, name, 0.0)
            elif isinstance(value, dict):  # an adapter's, by its name
                value.update({k: 0.0 for k, v in value.items() if isinstance(v, float)})
