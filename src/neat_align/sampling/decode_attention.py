"""Attention for one new token a sequence on a CPU.

torch's CPU kernel for scaled-dot-product attention works in blocks of queries; with a single query
a sequence it leaves most of a block empty. Two batched products and an fp32 softmax give the same
numbers, and while decoding they make the whole model about twice as fast (benchmarks/generation.py;
64 sequences, bf16, two cores).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "neat_decode"
# The same for rows that share prompts (`shared_rows`).
SHARED_ATTENTION = "neat_decode_shared_prompts"


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


AttentionInterface.register(ATTENTION, decode_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
