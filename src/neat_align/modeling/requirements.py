"""What a model must be before it can be a policy, and what is switched off before it trains."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from neat_align.errors import ConfigError, one_line
from neat_align.modeling.shared_prefix import unwrapped, virtual_tokens
from neat_align.modeling.text_config import context_length, text_config

logger = logging.getLogger(__name__)

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
    name = str(model.config.name_or_path or type(model).__name__)
    check_causal(model.config, name)
    if model.get_output_embeddings() is None:
        raise ConfigError(
            f"{name} is a {type(model).__name__}, which has no language-modelling head: load it "
            "with AutoModelForCausalLM"
        )
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
    text = text_config(config)
    decodes = getattr(text, "is_decoder", False) or getattr(text, "causal", False)
    if text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
        raise ConfigError(
            f"{name} is an encoder ({text.model_type}), which sees the words that it should "
            f"predict; {needed}"
        )


def check_reference(ref_model: Any, model: Any) -> None:
    """Refuse a start policy whose vocabulary has another size than the model's.

    KL and contrast distillation compare the two token by token. Raises ConfigError.
    """
    theirs, ours = (text_config(m.config).vocab_size for m in (ref_model, model))
    if theirs != ours:
        raise ConfigError(
            f"ref_model has a vocabulary of {theirs} tokens and the model one of {ours}: KL, dpo, "
            "kto, npo and contrast distillation compare them token by token, so pass the model "
            "that this one came from"
        )


def settle_generation_config(model: Any) -> None:
    """Make the model's generation_config one that can be saved, or refuse it.

    transformers refuses to write one whose flags contradict each other, which would end the run at
    its first checkpoint. Sampling here does not read it. One that has a temperature or top_p but
    not `do_sample`, as some published models have, is given `do_sample`. Raises ConfigError.
    """
    settings = model.generation_config
    if settings is None:
        if not model.can_generate():
            return  # none is written
        raise ConfigError(
            "the model's generation_config is None, and no checkpoint could be written: set "
            "model.generation_config = GenerationConfig()"
        )
    if _why_not_saved(settings) is None:
        return
    was = settings.do_sample
    settings.do_sample = True
    reason = _why_not_saved(settings)
    if reason is not None:
        settings.do_sample = was
        raise ConfigError(
            "the model's generation_config cannot be saved, and no checkpoint could be written: "
            f"{reason}. Correct model.generation_config"
        )
    logger.warning(
        "the model's generation_config sets temperature, top_p or top_k but not do_sample, and "
        "could not be saved: do_sample is set to True in it"
    )


def _why_not_saved(settings: Any) -> str | None:
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return one_line(error)
    return None


def context_of(model: torch.nn.Module) -> int | None:
    """The most tokens, prompt and completion together, that a row may have; None: no limit.

    What an adapter puts in front of every prompt takes its part of the model's context.
    """
    limit = context_length(unwrapped(model).config)
    return None if limit is None else limit - virtual_tokens(model)


def check_context(
    model: torch.nn.Module, max_prompt_length: int, max_completion_length: int
) -> None:
    """Refuse lengths that together pass the model's context."""
    limit, virtual = context_of(model), virtual_tokens(model)
    needed = max_prompt_length + max_completion_length
    if limit is not None and needed > limit:
        less = f" (the adapter takes {virtual} more)" if virtual else ""
        raise ConfigError(
            f"max_prompt_length + max_completion_length is {needed}, over the model's context of "
            f"{limit} tokens{less}: lower one of them"
        )


def check_trainable_weights(model: torch.nn.Module) -> None:
    """Refuse trainable weights that are held in half precision.

    AdamW at a learning rate of 1e-5 changes a weight by about 1e-5 of the usual scale a step; bf16
    keeps 8 bits, so the update rounds away and the weight never moves. Nothing fails: the run ends
    with the model it began with.
    """
    half = [(name, p.dtype) for name, p in model.named_parameters() if p.requires_grad and _half(p)]
    if half:
        name, dtype = half[0]
        raise ConfigError(
            f"{len(half)} trainable weights are held in {str(dtype).removeprefix('torch.')} (the "
            f"first is {name}): small updates would round away and nothing would be learned. Load "
            "the model with dtype=torch.float32 (bf16: true still computes in bf16 autocast), or "
            "train a LoRA adapter with peft_config"
        )
    from peft import PeftModel

    if isinstance(model, PeftModel):  # any other frozen model may be evaluated and sampled from
        check_learns(model)


def check_learns(model: torch.nn.Module) -> None:
    """Refuse to train a model of which no weight is trainable. Raises ConfigError."""
    if not is_trained(model):
        raise ConfigError(
            "no weight of the model is trainable: unfreeze some, or pass peft_config; load an "
            "adapter that is to be trained on with PeftModel.from_pretrained(…, is_trainable=True)"
        )


def is_trained(model: torch.nn.Module) -> bool:
    """Whether any weight of the model is trainable."""
    return any(p.requires_grad for p in model.parameters())


def frozen_if_half(model: torch.nn.Module) -> torch.nn.Module:
    """The model, frozen where it holds weights in half precision: they cannot be trained."""
    if any(map(_half, model.parameters())):
        model.requires_grad_(False)
    return model


def _half(parameter: torch.nn.Parameter) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


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
