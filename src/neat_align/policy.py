"""The model that learns, its tokenizer, and the policy it started from."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import find_adapter_config_file

from neat_align.errors import ConfigError
from neat_align.logprobs import Reference

logger = logging.getLogger(__name__)


# No code that comes with a model is run, and no pickle is read.
SAFE_LOADING: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}


def load_policy(name: str) -> PreTrainedModel:
    """A causal language model by name or path, with fp32 weights. The adapter in an adapter folder is merged into its base.

    Merged, it is a model like any other: a run that trained an adapter can be evaluated, and trained on.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **SAFE_LOADING)
    if find_adapter_config_file(name) is not None:
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=torch.float32, **SAFE_LOADING).merge_and_unload().requires_grad_(True)
        model.config.name_or_path = name
    return cast("PreTrainedModel", model)


def load_tokenizer(model: Any, tokenizer: Any = None) -> Any:
    """The given tokenizer or the model's own; eos serves as pad where there is none (masks go by length)."""
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no eos_token, so no answer could end: set tokenizer.eos_token")
    if tokenizer.pad_token_id is None:
        logger.warning("the tokenizer has no pad token: %r is used for padding", tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def start_policy(model: Any, peft_config: Any, ref_model: torch.nn.Module | None) -> tuple[Reference, torch.nn.Module]:
    """How to open the start policy, and the model to train (with an adapter when `peft_config` is given).

    The start policy is `ref_model`, or the new adapter switched off, or a frozen copy. A model that comes with an adapter
    is copied: its adapter may hold something already, and switched off it would be a different start.
    """
    from peft import PeftModel, get_peft_model

    if ref_model is model:
        ref_model = None  # the model itself is no reference: it moves; its copy is
    adapter_is_new = False
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ConfigError("the model already has an adapter and peft_config asks for another: pass one of the two")
        model = get_peft_model(model, peft_config)
        adapter_is_new = True
    if ref_model is not None:
        frozen = ref_model
    elif adapter_is_new:

        @contextlib.contextmanager
        def adapter_off() -> Iterator[torch.nn.Module]:
            with model.disable_adapter():
                yield model

        return adapter_off, model
    else:
        frozen = copy.deepcopy(model)
    frozen.requires_grad_(False).eval()

    @contextlib.contextmanager
    def frozen_copy() -> Iterator[torch.nn.Module]:
        frozen.to(next(model.parameters()).device)
        yield frozen

    return frozen_copy, model


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability to zero: of dropout modules, and those that attention and OPT's layers keep as numbers."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def check_context(model: Any, max_prompt_length: int, max_completion_length: int) -> None:
    """Refuse lengths that together pass the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None)
    needed = max_prompt_length + max_completion_length
    if limit is not None and needed > limit:
        raise ConfigError(
            f"max_prompt_length + max_completion_length is {needed}, over the model's context of {limit} tokens: lower one of them"
        )
