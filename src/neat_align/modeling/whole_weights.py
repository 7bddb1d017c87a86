"""A model's weights by name, whole, also where ranks hold parts of them.

Under FSDP2 and DeepSpeed's ZeRO-3 to gather a weight is a collective call. Weights are gathered one
after the other, so that no rank holds more than one of them beside its own parts.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def whole_weights(
    model: torch.nn.Module,
    names: Collection[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of what is in the model's state dict, or of `names` in it, one at a time.

    On the model's device; floating-point numbers in `dtype` (None: their own). Where ranks hold
    parts of the weights every rank has to go through all that this gives, with the same arguments.
    What it gives may be the model's own memory: read it, and copy what is kept.
    """
    zero = _of_zero_3(model)
    # Before a state dict is made FSDP2 puts back what a forward pass has left gathered.
    for name, value in model.state_dict().items():
        if names is not None and name not in names:
            continue
        if name in zero:
            with _gathered(zero[name]):
                whole = _in(zero[name].detach(), dtype).clone()
        else:
            # In its type before it is gathered: half the bytes travel.
            part = _in(value.detach(), dtype)
            whole = part.full_tensor() if isinstance(part, DTensor) else part
        yield name, whole


@dataclass(frozen=True)
class Form:
    """Name, number type and whole shape of a weight."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def weight_forms(
    model: torch.nn.Module,
    names: Collection[str] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Form]:
    """What `whole_weights` gives with the same arguments, in order; nothing is gathered."""
    zero = _of_zero_3(model)
    found = []
    for name, value in model.state_dict().items():
        if names is None or name in names:
            # DeepSpeed keeps what was the parameter's shape.
            shape = getattr(zero[name], "ds_shape") if name in zero else value.shape  # noqa: B009
            kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
            found.append(Form(name, kind, tuple(shape)))
    return found


def _of_zero_3(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that ZeRO-3 divides."""
    every = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in every if "ds_id" in vars(parameter)}


def _in(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _gathered(parameter: torch.nn.Parameter) -> contextlib.AbstractContextManager[None]:
    """While open, a parameter of ZeRO-3's is whole on every rank."""
    deepspeed: Any = importlib.import_module("deepspeed")  # not everybody has it
    context: contextlib.AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [parameter]
    )
    return context
