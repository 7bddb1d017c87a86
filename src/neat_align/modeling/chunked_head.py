"""Log-probabilities of chosen tokens from hidden states, without ever holding the logits.

The head's matrix product and the log-softmax run over a chunk of states at a time and run again in
the backward pass, where the chunk's softmax turns into the gradient in place and the weight's
gradient adds up in one buffer. (Checkpointing each chunk instead gives the same numbers, but every
chunk then makes a gradient of the whole vocabulary matrix, and the log-softmax three more passes
over the chunk: a fifth of a training step on a CPU.) Two cases do not run again. A head that is not
trained, as under LoRA: what a state's gradient is per unit of its output's is as small as the
state, and is kept. And on a CPU so few states that the same of the product is small, too: it is
kept from the forward to the backward pass, in the product's own type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at a time. 24 MiB of fp32 stay under the size at which a CPU's allocator takes fresh
# pages from the system for every chunk; a GPU wants fewer, larger products.
CPU_CHUNK_LOGITS = 6 * 2**20
GPU_CHUNK_LOGITS = 128 * 2**20
# Bytes of gradients at the product that a CPU keeps rather than making the product again.
KEPT_BYTES = 128 * 2**20


@dataclass(frozen=True)
class LogitTail:
    """What a model family does to the head's output.

    Cohere and Granite scale it, then Gemma bounds it to ±cap by tanh.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
        """The final logits."""
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """States whose logits are held at a time."""
    held = CPU_CHUNK_LOGITS if device.type == "cpu" else GPU_CHUNK_LOGITS
    return max(1, held // vocabulary)


def chosen_logprobs(
    states: Float[Tensor, "n dim"],
    weight: Float[Tensor, "vocab dim"],
    bias: Float[Tensor, " vocab"] | None,
    ids: Int[Tensor, " n"],
    tail: LogitTail,
    rows: int,
) -> Float[Tensor, " n"]:
    """log softmax(tail(states · weightᵀ + bias))[ids] in nats, `rows` states at a time.

    The product is computed in autocast's type where autocast is on; the log-softmax in fp32, or in
    fp64 for fp64 states.
    """
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        return _ChosenLogprobs.apply(states, weight, bias, ids, tail, rows, dtype)  # type: ignore[no-any-return, no-untyped-call]


class _ChosenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        tail: LogitTail,
        rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        head = (weight.to(dtype), None if bias is None else bias.to(dtype))
        frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        out, normalizers = [], []
        directions = torch.empty_like(states) if frozen else None
        kept = None
        if not frozen and any(ctx.needs_input_grad[:3]) and _is_kept(len(ids), weight, dtype):
            kept = states.new_empty(len(ids), len(weight), dtype=dtype)
        for part in parts(len(ids), rows):
            logits = _final_logits(states[part].to(dtype), head, tail)
            normalizers.append(logits.logsumexp(-1))
            out.append(logits.gather(-1, ids[part, None]).squeeze(-1) - normalizers[-1])
            if directions is None and kept is None:
                continue
            unit = torch.ones_like(normalizers[-1])
            grad_product = _grad_product(logits, normalizers[-1], ids[part], unit, tail)
            if directions is not None:
                directions[part] = grad_product.to(dtype) @ head[0]
            if kept is not None:
                kept[part] = grad_product
        empty = states.new_zeros(0, dtype=wide_dtype(dtype))
        if directions is not None:
            ctx.save_for_backward(directions)
        elif kept is not None:
            ctx.save_for_backward(states, weight, bias, kept)
        else:
            ctx.save_for_backward(states, weight, bias, ids, torch.cat([empty, *normalizers]))
        ctx.frozen, ctx.tail, ctx.rows, ctx.dtype = frozen, tail, rows, dtype
        ctx.kept = kept is not None
        return torch.cat([empty, *out])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(outputs[0].device.type, enabled=False):
            return _backward(ctx, *outputs)


def _backward(ctx: Any, grad: Float[Tensor, " n"]) -> tuple[Tensor | None, ...]:
    if ctx.frozen:
        (directions,) = ctx.saved_tensors
        return (directions * grad[:, None]).to(directions.dtype), None, None, None, None, None, None
    if ctx.kept:
        return (*_of_kept(ctx, grad), None, None, None, None)
    states, weight, bias, ids, normalizers = ctx.saved_tensors
    tail, dtype = ctx.tail, ctx.dtype
    wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    head = (weight.to(dtype), None if bias is None else bias.to(dtype))
    grad_states = torch.empty_like(states) if wants_states else None
    grad_weight = torch.zeros_like(weight) if wants_weight else None
    grad_bias = torch.zeros_like(bias) if wants_bias else None
    for some in parts(len(ids), _held_rows(ctx.rows, weight, dtype)):
        numbers = range(len(ids))[some]
        held = states.new_empty(len(numbers), len(weight), dtype=dtype)
        for chunk in parts(len(numbers), ctx.rows):
            part = slice(some.start + chunk.start, min(some.stop, some.start + chunk.stop))
            logits = _final_logits(states[part].to(dtype), head, tail)
            grad_product = _grad_product(logits, normalizers[part], ids[part], grad[part], tail)
            held[chunk] = grad_product
            if grad_bias is not None:
                grad_bias += grad_product.sum(0)
        if grad_states is not None:
            grad_states[some] = held @ head[0]
        if grad_weight is not None:
            _add_product(grad_weight, held, states[some].to(dtype))
    return grad_states, grad_weight, grad_bias, None, None, None, None


def _held_rows(rows: int, weight: Tensor, dtype: torch.dtype) -> int:
    """States whose gradients at the product are multiplied together, in chunks of `rows`.

    On a CPU as many as `KEPT_BYTES` hold: adding a product to the weight's gradient goes through
    all of it.
    """
    fit = KEPT_BYTES // (len(weight) * dtype.itemsize) if weight.device.type == "cpu" else 0
    return max(rows, fit - fit % rows)


def _is_kept(states: int, weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.device.type == "cpu" and states * len(weight) * dtype.itemsize <= KEPT_BYTES


def _of_kept(ctx: Any, grad: Float[Tensor, " n"]) -> list[Tensor | None]:
    """Gradients of states, weight and bias from those at the product per unit of the output's."""
    states, weight, bias, kept = ctx.saved_tensors
    wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    grads: list[Tensor | None] = [None, None, None]
    if wants_states:
        grads[0] = ((kept @ weight.to(kept.dtype)) * grad[:, None]).to(states.dtype)
    if wants_weight:
        grads[1] = (kept.T @ (states * grad[:, None]).to(kept.dtype)).to(weight.dtype)
    if wants_bias:
        grads[2] = (grad.to(kept.dtype) @ kept).to(bias.dtype)
    return grads


def _grad_product(
    logits: Float[Tensor, "n vocab"],
    normalizers: Float[Tensor, " n"],
    ids: Int[Tensor, " n"],
    grad: Float[Tensor, " n"],
    tail: LogitTail,
) -> Float[Tensor, "n vocab"]:
    """The gradient at the head's matrix product, written over the final logits.

    grad · d log p_y / d product, where d log p_y = (1[y] − p) · d logits, and then back through
    the tail.
    """
    slope = None if tail.cap is None else 1 - (logits / tail.cap) ** 2
    grad_product = logits.sub_(normalizers[:, None]).exp_().mul_(-grad[:, None])
    grad_product.scatter_add_(-1, ids[:, None], grad[:, None])
    if slope is not None:
        grad_product *= slope
    if tail.scale != 1:
        grad_product *= tail.scale
    return grad_product


def _final_logits(states: Tensor, head: tuple[Tensor, Tensor | None], tail: LogitTail) -> Tensor:
    return tail(torch.nn.functional.linear(states, *head).to(wide_dtype(states.dtype)))


def _add_product(
    total: Float[Tensor, "vocab dim"],
    grad_product: Float[Tensor, "n vocab"],
    states: Float[Tensor, "n dim"],
) -> None:
    if total.dtype == grad_product.dtype:
        total.addmm_(grad_product.T, states)
    else:
        total += grad_product.T @ states


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over a vocabulary are made: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def parts(n: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` that cover `n` entries."""
    return [slice(start, start + size) for start in range(0, n, size)]
