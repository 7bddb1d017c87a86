"""A model's weights by name, whole, also where ranks hold parts of them.

Under FSDP2 and DeepSpeed's ZeRO-3 to gather a weight is a collective call. Weights are gathered one
after the other, so that no rank holds more than one of them beside its own parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

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
    zero = {n: p for n, p in model.named_parameters(remove_duplicate=False) if "ds_id" in vars(p)}
    # Before a state dict is made FSDP2 puts back what a forward pass has left gathered.
    for name, value in model.state_dict().items():
        if names is not None and name not in names:
            continue
        if name in zero:
            with _gathered(zero[name]):
                whole = zero[name].detach().to(dtype=dtype, copy=True)
        else:
            own = value.detach()
            cast = own.to(dtype) if dtype is not None and own.is_floating_point() else own
            # Cast before it is gathered: half the bytes travel.
            whole = cast.full_tensor() if isinstance(cast, DTensor) else cast
        yield name, whole


def _gathered(parameter: torch.nn.Parameter) -> contextlib.AbstractContextManager[None]:
    """While open, a parameter of ZeRO-3's is whole on every rank."""
    from deepspeed.zero import GatheredParameters

    context: contextlib.AbstractContextManager[None] = GatheredParameters([parameter])
    return context
