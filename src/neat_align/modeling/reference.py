"""The policy that training started from: a frozen copy, or the adapter switched off."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from neat_align.errors import ConfigError
from neat_align.modeling.shared_prefix import adds_virtual_tokens

# Opens the start policy: a frozen copy, or the trained model with its adapter switched off.
Reference = Callable[[], AbstractContextManager[torch.nn.Module]]


def start_policy(
    model: Any, peft_config: Any, ref_model: torch.nn.Module | None
) -> tuple[Reference, torch.nn.Module]:
    """How to open the start policy, and the model to train.

    With `peft_config` the model to train is `model` with a new adapter. The start policy is
    `ref_model`, or the new adapter switched off, or a frozen copy. A model that comes with an
    adapter is copied: its adapter may hold something already, and switched off it would be a
    different start. Raises ConfigError for two adapters.
    """
    from peft import PeftModel, get_peft_model

    if peft_config is not None and isinstance(model, PeftModel):
        raise ConfigError(
            "the model already has an adapter and peft_config asks for another: pass one of the two"
        )
    # The model itself is no reference: it moves, and its copy does not.
    given = None if ref_model is model else ref_model
    trained = model if peft_config is None else get_peft_model(model, peft_config)
    if given is not None:
        return _frozen(given, trained), trained
    if peft_config is not None:
        return _adapter_off(trained), trained
    try:
        start = copy.deepcopy(trained)
    except RuntimeError as error:
        # torch copies no weight that is computed from another: peft ties adapters in this way.
        raise ConfigError(
            "the start policy cannot be copied from the model "
            f"({' '.join(str(error).split())[:200]}): pass the model without its adapter and "
            "peft_config, or pass ref_model"
        ) from error
    return _frozen(start, trained), trained


def _adapter_off(trained: Any) -> Reference:
    if adds_virtual_tokens(trained):
        # The model below knows nothing of them.
        return lambda: contextlib.nullcontext(trained.get_base_model())

    @contextlib.contextmanager
    def adapter_off() -> Iterator[torch.nn.Module]:
        with trained.disable_adapter():
            yield trained

    return adapter_off


def _frozen(start: torch.nn.Module, trained: torch.nn.Module) -> Reference:
    """`start` without gradients or dropout; opened, it is on the device of the trained model."""
    start.requires_grad_(False).eval()

    @contextlib.contextmanager
    def frozen() -> Iterator[torch.nn.Module]:
        start.to(next(trained.parameters()).device)
        yield start

    return frozen
