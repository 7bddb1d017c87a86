"""Attention in which the completions of a group share one prompt.

A packed row needs a mask: a completion sees its prompt and itself. Given as a boolean mask over the
whole row, attention would cost the square of the row, most of it masked away. Here it is computed
in the two dense pieces that the mask is made of: the prompts causally, and the completions, as a
batch, over [their prompt's keys; their own]. Everything else in the model works token by token and
does not notice.

It is given to the model through transformers' attention interface, by name, for as long as
`sharing_prefixes` is open; the model passes the row's `PrefixLayout` on as a keyword argument.
benchmarks/attention_forms.py compares it with a boolean mask and with a prompt cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from neat_align.modeling.packing import PrefixLayout
from neat_align.modeling.prefix_products import product_attention
from neat_align.modeling.text_config import text_config

ATTENTION = "neat_shared_prefix"
# Tokens of a packed row under which a CPU's fused kernel is taken.
SMALL_ROW = 128


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads flat dim"],
    key: Float[Tensor, "1 kv_heads flat dim"],
    value: Float[Tensor, "1 kv_heads flat value_dim"],
    attention_mask: None,
    *,
    shared_prefix: PrefixLayout,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    # models pass every attention function more than any one reads (position_ids, use_cache, …)
    **_: Any,
) -> tuple[Float[Tensor, "1 flat heads value_dim"], None]:
    """Attention over one packed row; the signature is that of transformers' attention functions."""
    layout = shared_prefix
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [flat, heads, dim]
    plain = softcap is None and sliding_window is None and not dropout
    if plain and by_products(query):
        return product_attention(q, k, v, layout, scale)[None], None
    groups, longest = layout.prompt_index.shape
    prompt_q, prompt_k, prompt_v = (_gather(x, layout.prompt_index) for x in (q, k, v))
    mask = None
    if sliding_window is not None and sliding_window < longest:
        at = torch.arange(longest, device=q.device)
        mask = ((at <= at[:, None]) & (at[:, None] - at < sliding_window)).expand(groups, 1, -1, -1)
    prompt_out = _attend(prompt_q, prompt_k, prompt_v, mask, scale, softcap, dropout)
    out = [_flat(prompt_out)]
    if layout.completion_index.shape[1] > 0:
        own_q, own_k, own_v = (_gather(x, layout.completion_index) for x in (q, k, v))
        keys = torch.cat([prompt_k.index_select(0, layout.group), own_k], dim=2)
        values = torch.cat([prompt_v.index_select(0, layout.group), own_v], dim=2)
        visible = _visible(layout, sliding_window)
        out.append(_flat(_attend(own_q, keys, values, visible, scale, softcap, dropout)))
    return torch.cat(out).index_select(0, layout.inverse)[None], None


def by_products(query: Float[Tensor, "1 heads flat dim"]) -> bool:
    """Whether attention is computed as products: on a CPU, whose fused kernel is faster for small
    rows only, where launching operators is what takes the time.
    """
    return query.device.type == "cpu" and query.shape[2] >= SMALL_ROW


AttentionInterface.register(ATTENTION, shared_prefix_attention)


def _visible(layout: PrefixLayout, sliding_window: int | None) -> Bool[Tensor, "rows 1 fed keys"]:
    distance = layout.query_position[:, :, None] - layout.key_position[:, None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return visible[:, None]


def _gather(
    x: Float[Tensor, "flat heads dim"], index: Any
) -> Float[Tensor, "batch heads tokens dim"]:
    batch, tokens = index.shape
    return x.index_select(0, index.flatten()).view(batch, tokens, *x.shape[1:]).transpose(1, 2)


def _flat(x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "flat heads dim"]:
    return x.transpose(1, 2).flatten(0, 1)


def _attend(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    mask: Bool[Tensor, "batch 1 queries keys"] | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Softmax attention; `mask` None is causal.

    Several query heads may share one head of keys and values.
    """
    batch, heads, queries, dim = q.shape
    sharing = heads // k.shape[1]
    if mask is None and softcap is None:
        k, v = (x.repeat_interleave(sharing, dim=1) if sharing > 1 else x for x in (k, v))
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
    if mask is None:
        causal = torch.ones(queries, queries, dtype=torch.bool, device=q.device).tril()
        mask = causal.expand(batch, 1, -1, -1)
    # The query heads of one key head become more queries of it: nothing is repeated.
    folded = q.reshape(batch, heads // sharing, sharing * queries, dim)
    mask = mask.repeat(1, 1, sharing, 1)
    if softcap is None:
        out = scaled_dot_product_attention(
            folded, k, v, attn_mask=mask, dropout_p=dropout, scale=scale
        )
    else:
        scores = softcap * torch.tanh(folded @ k.transpose(-1, -2) * (scale / softcap))
        weights = scores.float().masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype)
        out = torch.dropout(weights, dropout, train=True) @ v
    return out.reshape(batch, heads, queries, v.shape[-1])


@contextlib.contextmanager
def attending_by(model: torch.nn.Module, attention: str) -> Iterator[None]:
    """While open, the model attends by the function of this name."""
    config = unwrapped(model).config
    before = config._attn_implementation
    config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def sharing_prefixes(model: torch.nn.Module) -> Iterator[None]:
    """While open, the model attends by `shared_prefix_attention` and takes packed rows only.

    With gradient checkpointing it has to stay open over the backward pass, which runs the attention
    again.
    """
    with attending_by(model, ATTENTION):
        yield


def is_sharing(model: torch.nn.Module) -> bool:
    """Whether `sharing_prefixes` is open on the model."""
    return bool(unwrapped(model).config._attn_implementation == ATTENTION)


def unwrapped(model: torch.nn.Module) -> Any:
    """The model inside wrappers of accelerate, torch.distributed and PEFT.

    A model of transformers, unless the caller made its own.
    """
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    inner: Any = model
    # These are none of the wrappers. accelerate would look for compiled parts among all modules to
    # say so, a millisecond at a time and several times in every forward pass.
    if not isinstance(model, PreTrainedModel | PeftModel):
        inner = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def adds_virtual_tokens(model: torch.nn.Module) -> bool:
    """Whether an adapter puts learned tokens in front of every input (prompt or prefix tuning)."""
    return virtual_tokens(model) > 0


def virtual_tokens(model: torch.nn.Module) -> int:
    """How many learned tokens an adapter puts in front of every input."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return 0
    return int(cast("Any", model.active_peft_config).num_virtual_tokens)


def why_not_packed(model: torch.nn.Module) -> str | None:
    """Why packed rows cannot go through this model, from what it says of itself; else None.

    `layout.choose_layout` also compares the numbers.
    """
    inner = unwrapped(model)
    if not inner._supports_attention_backend:
        return (
            f"{type(inner).__name__} does not take its attention from transformers' attention "
            "interface"
        )
    if adds_virtual_tokens(model):
        return "the adapter adds virtual tokens to the prompt"
    layer_types = getattr(text_config(inner.config), "layer_types", None) or ()
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        return f"{type(inner).__name__} has layers of another kind ({', '.join(sorted(unknown))})"
    return None


def shortest_window(model: torch.nn.Module) -> int | None:
    """Tokens that the narrowest attention of a model reaches back, where it has a limit."""
    config = text_config(unwrapped(model).config)
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((n for n in limits if n), default=None)
