"""Number types: where autocast goes, and which weights cannot learn."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch


def autocast(device_type: str, dtype: torch.dtype | None) -> torch.autocast:
    """torch's autocast in `dtype`; None computes in the weights' own type."""
    return torch.autocast(device_type, dtype or torch.bfloat16, enabled=dtype is not None)


@contextlib.contextmanager
def inference(model: torch.nn.Module, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """No gradients, no dropout, and autocast when a type is given, while this is open.

    The model's training flag is put back afterwards. The head is given contiguous states. A model
    that keeps only some logits hands it a slice, and without gradients torch multiplies a
    non-contiguous slice as a batch, with the head's weight expanded once a row: for 64 rows of a
    49k-token vocabulary on a CPU that took 8 s and 3.4 GiB instead of 24 ms
    (scripts/measure_head.py).
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device.type
    head = cast("Any", model).get_output_embeddings()
    contiguous = head.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(), *inputs[1:])
    )
    try:
        with torch.no_grad(), autocast(device, autocast_dtype):
            yield
    finally:
        contiguous.remove()
        model.train(was_training)


@contextlib.contextmanager
def casting_once(module: torch.nn.Module) -> Iterator[None]:
    """While open, autocast casts each frozen fp32 weight once instead of in every forward pass.

    Only inside of `inference`. autocast keeps the cast of a weight that requires a gradient, and
    where no gradients are recorded nothing else reads that flag; so the numbers are the same. The
    casts take half the weights' memory until autocast is closed.
    """
    frozen = [p for p in module.parameters() if p.dtype is torch.float32 and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def frozen_casts(head: torch.nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """The frozen fp32 weights of the linear layer under a LoRA adapter in autocast's type, by name.

    To call `head` with in chunks, and again in the backward pass: autocast itself would cast the
    weights in each. Empty where autocast is off, and for any other head, which may do more with its
    weights than multiply by them (as DoRA does, which takes their norm).
    """
    from peft.tuners.lora import Linear

    kind = device.type
    if not torch.is_autocast_enabled(kind) or not isinstance(head, Linear):
        return {}
    if type(head.get_base_layer()) is not torch.nn.Linear or head.lora_variant:
        return {}
    dtype = torch.get_autocast_dtype(kind)
    return {
        name: weight.detach().to(dtype)
        for name, weight in head.named_parameters()
        if name.startswith("base_layer.")
        and weight.dtype is torch.float32
        and not weight.requires_grad
    }


def half_precision_copy(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A frozen copy of a policy in `dtype`, adapters merged, for sampling only.

    On a CPU autocast converts activations back and forth and runs an adapter as two more layers; a
    merged half-precision copy samples faster for half the weights' memory. It is the same policy up
    to rounding.
    """
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    inner = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    copied: torch.nn.Module = copy.deepcopy(inner)
    copied = extract_model_from_parallel(copied, keep_fp32_wrapper=False)
    if isinstance(copied, PeftModel):
        # Merging does not look at whether the adapter is switched on; a copy of the start policy
        # must leave it out.
        switched_off = copied.get_model_status().enabled is False
        base: Any = copied.unload() if switched_off else copied.merge_and_unload()
        copied = cast("torch.nn.Module", base)
    # Parameters only: a rotary embedding's frequencies are a buffer, and in half precision late
    # positions would run together.
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype)
    return copied.requires_grad_(False).eval()
