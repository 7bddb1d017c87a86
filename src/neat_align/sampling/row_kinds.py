"""Which kind of rows a model reads: with a cache of whole rows or of shared prompts, or anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from neat_align.modeling.shared_prefix import adds_virtual_tokens, unwrapped
from neat_align.sampling.batch_check import SamplingWay
from neat_align.sampling.decode_attention import SHARED_ATTENTION
from neat_align.sampling.shared_rows import SharedRows
from neat_align.sampling.token_rows import CachedRows, RecomputedRows, TokenRows

# So many tokens of prompts have to be there again for prompts to be kept once: sharing costs a few
# small operations a layer and token, about what it costs to read and copy the keys of so many
# (`benchmarks/shared_decode.py`).
SHARED_FROM = 2048


def read_rows(
    model: torch.nn.Module, prompts: Sequence[tuple[int, ...]], pad_token_id: int, way: SamplingWay
) -> TokenRows:
    """Rows of any lengths beside each other, for a model that samples in this way."""
    if way != "together":
        return RecomputedRows(model, prompts, alone=True)
    if not keeps_keys(model):
        return RecomputedRows(model, prompts, alone=False)
    again = sum(map(len, prompts)) - sum(map(len, set(prompts)))
    can_share = unwrapped(model).config._attn_implementation == SHARED_ATTENTION
    if can_share and again >= SHARED_FROM:
        return SharedRows(model, prompts, pad_token_id)
    return CachedRows(model, prompts, pad_token_id)


def keeps_keys(model: torch.nn.Module) -> bool:
    """Whether a model's cache is keys and values alone: its rows can be copied and taken out.

    Not with PEFT's virtual tokens: they are put in front at every call, which only `generate`
    expects.
    """
    if not unwrapped(model)._supports_attention_backend or adds_virtual_tokens(model):
        return False
    return all(kind in (DynamicLayer, DynamicSlidingWindowLayer) for kind in _layer_kinds(model))


def keeps_all_keys(model: torch.nn.Module) -> bool:
    """The same, of every token: no layer has a window."""
    return keeps_keys(model) and all(kind is DynamicLayer for kind in _layer_kinds(model))


def _layer_kinds(model: torch.nn.Module) -> list[type]:
    return [type(layer) for layer in DynamicCache(config=unwrapped(model).config).layers]
