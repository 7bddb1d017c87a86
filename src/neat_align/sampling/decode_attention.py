"""Attention for one new token a sequence on a CPU.

torch's CPU kernel for scaled-dot-product attention works in blocks of queries; with a single query
a sequence it leaves most of a block empty. Two batched products and an fp32 softmax give the same
numbers, and while decoding they make the whole model about twice as fast (benchmarks/generation.py;
64 sequences, bf16, two cores).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from neat_align.modeling.outputs import forward
from neat_align.modeling.shared_prefix import unwrapped

ATTENTION = "neat_decode"
_BOTH = "neat_decode_and_torch"


def decode_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "rows heads queries dim"],
    key: Float[Tensor, "rows kv_heads keys dim"],
    value: Float[Tensor, "rows kv_heads keys value_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,  # what transformers passes to every attention function
) -> tuple[Float[Tensor, "rows queries heads value_dim"], None]:
    """Products for a single query a row, transformers' own function for all else.

    The signature is that of transformers' attention functions.
    """
    rows, heads, queries, dim = query.shape
    plain_mask = attention_mask is None or attention_mask.dtype == torch.bool
    if queries > 1 or not plain_mask or others.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    folded = query.reshape(rows, key.shape[1], heads // key.shape[1], dim)
    scores = (folded @ key.transpose(-1, -2)).float() * (dim**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill_(~attention_mask, -torch.inf)
    out = scores.softmax(-1).to(value.dtype) @ value
    return out.reshape(rows, 1, heads, value.shape[-1]), None


# What `_both` has found in this thread.
_agreements: ContextVar[list[bool]] = ContextVar("agreements")


def _both(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> Any:
    """torch's kernel, and whether `decode_attention` agrees with it."""
    expected = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    ours, _ = decode_attention(module, query, key, value, attention_mask, **others)
    _agreements.get().append(_agree(ours, expected[0], value))
    return expected


for _name, _attention in ((ATTENTION, decode_attention), (_BOTH, _both)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)


@contextlib.contextmanager
def fast_decoding(model: torch.nn.Module) -> Iterator[None]:
    """While open, a model on a CPU that uses torch's kernel decodes with `decode_attention`.

    Other models are left alone. Some models look at their attention's name themselves, so a step is
    compared first.
    """
    config = unwrapped(model).config
    before = config._attn_implementation
    on_cpu = next(model.parameters()).device.type == "cpu"
    uses_kernel = before == "sdpa" and unwrapped(model)._supports_attention_backend
    try:
        if on_cpu and uses_kernel and _gives_the_same(model):
            config._attn_implementation = ATTENTION
        yield
    finally:
        config._attn_implementation = before


def _gives_the_same(model: torch.nn.Module) -> bool:
    """Whether the model computes the same with `decode_attention` as with torch's kernel.

    That is: the model's own code does not mind another name of its attention, and every call gives
    what the kernel gives. Calls are compared one by one, since in bf16 what they round differently
    adds up over the layers: at unusual tokens the logits of two correct computations can be as far
    apart as a wrong mask would put them.
    """
    config = unwrapped(model).config
    before = config._attn_implementation
    expected = _two_steps(model)
    agreements: list[bool] = []
    token = _agreements.set(agreements)
    try:
        config._attn_implementation = _BOTH
        renamed = _two_steps(model)
    finally:
        config._attn_implementation = before
        _agreements.reset(token)
    # The kernel is torch's both times. (Weights that give no numbers agree with nothing: the draw
    # says so.)
    same_model = bool((renamed - expected).abs().max() <= 0.1 * expected.std())
    return all(agreements) and same_model


def _two_steps(model: torch.nn.Module) -> Float[Tensor, "rows vocab"]:
    """Log-probabilities after two prompts, one of them padded, and one token."""
    ids = torch.arange(1, 13).view(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        cache = forward(
            model,
            input_ids=ids[:, :5],
            attention_mask=mask[:, :5],
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        logits: Tensor = forward(
            model, input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits
    return logits[:, -1].float().log_softmax(-1)


def _agree(ours: Tensor, expected: Tensor, value: Tensor) -> bool:
    # Outputs are means of values; bf16 rounds weights and values by half a percent.
    return bool((ours - expected).abs().max() <= 0.02 * value.abs().max())
