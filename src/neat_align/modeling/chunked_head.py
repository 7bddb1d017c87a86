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

from collections.abc import Iterator
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
# Of those, what a CPU goes through at a time: 2 MiB of fp32 stay in its caches from pass to pass.
CPU_BLOCK_LOGITS = 2**19
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
            product = torch.nn.functional.linear(states[part].to(dtype), *head)
            for block in blocks_of(product):
                logits, chosen = _final_logits(product[block], tail), ids[part][block]
                normalizers.append(logits.logsumexp(-1))
                out.append(logits.gather(-1, chosen[:, None]).squeeze(-1) - normalizers[-1])
                if directions is not None or kept is not None:
                    product[block] = _unit_gradient(logits, normalizers[-1], chosen, tail)
            if directions is not None:
                directions[part] = product @ head[0]
            if kept is not None:
                kept[part] = product
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
    states, weight, bias, *_ = ctx.saved_tensors
    wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    grad_states = torch.empty_like(states) if wants_states else None
    grad_weight: Tensor | None = None
    grad_bias = torch.zeros_like(bias) if wants_bias else None
    for some, units in _unit_gradients(ctx):
        flow = grad[some, None]
        if grad_states is not None:
            grad_states[some] = (units @ weight.to(units.dtype)) * flow
        if wants_weight:
            grad_weight = _with_product(grad_weight, units, (states[some] * flow).to(units.dtype))
        if grad_bias is not None:
            grad_bias += flow.squeeze(-1).to(units.dtype) @ units
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    elif wants_weight:  # of no states
        grad_weight = torch.zeros_like(weight)
    return grad_states, grad_weight, grad_bias, None, None, None, None


def _unit_gradients(ctx: Any) -> Iterator[tuple[slice, Float[Tensor, "n vocab"]]]:
    """Some of the states, and the gradients at their products per unit of their outputs'."""
    if ctx.kept:
        *_, kept = ctx.saved_tensors
        yield slice(0, len(kept)), kept
        return
    states, weight, bias, ids, normalizers = ctx.saved_tensors
    rows, dtype = ctx.rows, ctx.dtype
    head = (weight.to(dtype), None if bias is None else bias.to(dtype))

    def of_chunk(part: slice) -> Float[Tensor, "n vocab"]:
        product = torch.nn.functional.linear(states[part].to(dtype), *head)
        for block in blocks_of(product):
            known = normalizers[part][block], ids[part][block]
            logits = _final_logits(product[block], ctx.tail)
            product[block] = _unit_gradient(logits, *known, ctx.tail)
        return product

    for some in parts(len(ids), _held_rows(rows, weight, dtype)):
        chunks = parts(len(ids[some]), rows)
        if len(chunks) == 1:
            yield some, of_chunk(some)
            continue
        held = states.new_empty(len(ids[some]), len(weight), dtype=dtype)
        for chunk in chunks:
            within = slice(some.start + chunk.start, min(some.stop, some.start + chunk.stop))
            held[chunk] = of_chunk(within)
        yield some, held


def _held_rows(rows: int, weight: Tensor, dtype: torch.dtype) -> int:
    """States whose gradients at the product are multiplied together, in chunks of `rows`.

    On a CPU as many as `KEPT_BYTES` hold: adding a product to the weight's gradient goes through
    all of it.
    """
    fit = KEPT_BYTES // (len(weight) * dtype.itemsize) if weight.device.type == "cpu" else 0
    return max(rows, fit - fit % rows)


def _is_kept(states: int, weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.device.type == "cpu" and states * len(weight) * dtype.itemsize <= KEPT_BYTES


def _unit_gradient(
    logits: Float[Tensor, "n vocab"],
    normalizers: Float[Tensor, " n"],
    ids: Int[Tensor, " n"],
    tail: LogitTail,
) -> Float[Tensor, "n vocab"]:
    """The gradient of d log p_y at the head's matrix product, written over the final logits.

    d log p_y = (1[y] − p) · d logits, and then back through the tail.
    """
    slope = None if tail.cap is None else 1 - (logits / tail.cap) ** 2
    unit = logits.sub_(normalizers[:, None]).exp_().neg_()
    unit.scatter_add_(-1, ids[:, None], torch.ones_like(normalizers)[:, None])
    if slope is not None:
        unit *= slope
    if tail.scale != 1:
        unit *= tail.scale
    return unit


def _final_logits(product: Float[Tensor, "n vocab"], tail: LogitTail) -> Float[Tensor, "n vocab"]:
    return tail(product.to(wide_dtype(product.dtype)))


def _with_product(
    total: Float[Tensor, "vocab dim"] | None,
    units: Float[Tensor, "n vocab"],
    states: Float[Tensor, "n dim"],
) -> Float[Tensor, "vocab dim"]:
    """The total with unitsᵀ · states added, in wide numbers from the second product on."""
    if total is None:
        return units.T @ states
    wide = total.to(wide_dtype(total.dtype))
    if wide.dtype == units.dtype:
        return wide.addmm_(units.T, states)
    return wide.add_(units.T @ states)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over a vocabulary are made: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def blocks_of(logits: Float[Tensor, "n vocab"]) -> list[slice]:
    """Rows of a table of logits that are worked on at a time: on a CPU few, on a GPU all."""
    few = CPU_BLOCK_LOGITS // logits.shape[1] if logits.device.type == "cpu" else len(logits)
    return parts(len(logits), max(1, few))


def parts(n: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` that cover `n` entries."""
    return [slice(start, start + size) for start in range(0, n, size)]
