"""Numbers of each token that need its whole distribution, from the head's inputs, chunk by chunk.

What stands in the way of a loss over the vocabulary is memory: 1,000 tokens of a 49k vocabulary
are 200 MB of logits, and a divergence holds several such tables. Here a chunk of tokens has its
logits, its value and its gradient before the next one begins. That works because a token's value
depends on nothing but its own input: the gradient of the sum is every token's own direction, as
small as the input, and is kept for the backward pass. A head that learns too gets its gradient the
usual way, by computing every chunk again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from neat_align.modeling.chunked_head import parts

# (the chunk's inputs, where they are among all) → one number a token
ChunkValues: TypeAlias = Callable[[Tensor, slice], Tensor]


def values_in_chunks(
    inputs: Float[Tensor, "n width"], value_of: ChunkValues, rows: int, *, frozen_head: bool
) -> Float[Tensor, " n"]:
    """`value_of` of all inputs, `rows` of them at a time.

    The value of a token must depend on its own input only. `frozen_head`: nothing that `value_of`
    computes with wants a gradient, but for its inputs.
    """
    slices = parts(len(inputs), rows)
    if not torch.is_grad_enabled():
        values = [value_of(inputs[part], part) for part in slices]
    elif frozen_head:
        return cast("Tensor", _ByDirection.apply(inputs, value_of, slices))  # type: ignore[no-untyped-call]
    else:
        values = [
            cast("Tensor", checkpoint(value_of, inputs[part], part, use_reentrant=False))
            for part in slices
        ]
    return torch.cat([inputs.new_zeros(0, dtype=torch.float32), *values])


class _ByDirection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, value_of: ChunkValues, slices: list[slice]) -> Tensor:
        directions = torch.empty_like(inputs)
        values = []
        for part in slices:
            with torch.enable_grad():
                leaf = inputs[part].detach().requires_grad_()
                value = value_of(leaf, part)
                (directions[part],) = torch.autograd.grad(value.sum(), leaf)
            values.append(value.detach())
        ctx.save_for_backward(directions)
        return torch.cat([inputs.new_zeros(0, dtype=torch.float32), *values])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (directions,) = ctx.saved_tensors
        return (directions * outputs[0][:, None]).to(directions.dtype), None, None
