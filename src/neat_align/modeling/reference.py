"""The policy that training started from: a frozen copy, or the adapter switched off."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from neat_align.errors import ConfigError

# Opens the start policy: a frozen copy, or the trained model with its adapter switched off.
Reference = Callable[[], AbstractContextManager[torch.nn.Module]]


def start_policy(
    model: Any, peft_config: Any, ref_model: torch.nn.Module | None
) -> tuple[Reference, torch.nn.Module]:
    """How to open the start policy, and the model to train (with an adapter when `peft_config` is
    given).

    The start policy is `ref_model`, or the new adapter switched off, or a frozen copy. A model that
    comes with an adapter is copied: its adapter may hold something already, and switched off it
    would be a different start.
    """
    from peft import PeftModel, get_peft_model

    if ref_model is model:
        ref_model = None  # the model itself is no reference: it moves; its copy is
    adapter_is_new = False
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ConfigError(
                "the model already has an adapter and peft_config asks for another: pass one of "
                "the two"
            )
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
