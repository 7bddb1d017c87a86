"""Which attention a model decodes with on a CPU: the fastest that agrees with torch's kernel.

Some models look at their attention's name themselves, or do more with their cache or mask than an
attention function can know. So the model reads a few tokens with each, and every call is compared
with the kernel: one by one, since in bf16 what they round differently adds up over the layers, and
at unusual tokens the logits of two correct computations can be as far apart as a wrong mask would
put them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from neat_align.modeling.self_check import MODEL_ERRORS
from neat_align.modeling.shared_prefix import attending_by, unwrapped
from neat_align.sampling import decode_attention as products
from neat_align.sampling import shared_rows
from neat_align.sampling.batch_check import KnownWay
from neat_align.sampling.decode_attention import ATTENTION, SHARED_ATTENTION
from neat_align.sampling.row_kinds import keeps_all_keys, keeps_keys
from neat_align.sampling.token_rows import CachedRows, TokenRows

_BOTH, _BOTH_SHARED = "neat_decode_and_torch", "neat_decode_shared_prompts_and_torch"
# Two answers to one prompt, one of which stays, and one to a shorter one, which comes again later.
_PROMPTS = ((1, 2, 3, 4, 5), (1, 2, 3, 4, 5), (6, 7))


# What the comparing functions have found in this thread.
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
    ours, _ = products.decode_attention(module, query, key, value, attention_mask, **others)
    _agreements.get().append(_agree(ours, expected[0], value))
    return expected


def _both_shared(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> Any:
    """torch's kernel over whole rows, and whether `shared_attention` agrees with it."""
    now = shared_rows.reading_now()
    if now is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    ours, _ = shared_rows.shared_attention(module, query, key, value, attention_mask, **others)
    keys, values, mask = shared_rows.whole_rows(now, module)
    expected = sdpa_attention_forward(module, query, keys, values, mask, **others)
    _agreements.get().append(_agree(ours, expected[0], values))
    return expected


for _name, _attention in ((_BOTH, _both), (_BOTH_SHARED, _both_shared)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)


@contextlib.contextmanager
def fast_decoding(model: torch.nn.Module, known: KnownWay | None = None) -> Iterator[None]:
    """While open, a model on a CPU that uses torch's kernel decodes with the fastest that agrees.

    Other models are left alone. It is compared once for all models that share `known`, which differ
    in their numbers at most.
    """
    kernel: str = unwrapped(model).config._attn_implementation
    on_cpu = next(model.parameters()).device.type == "cpu"
    known = known or KnownWay()
    attention = kernel
    if on_cpu and kernel == "sdpa" and keeps_keys(model):
        attention = known.attention = known.attention or _fastest(model, kernel)
    with attending_by(model, attention):
        yield


def _fastest(model: torch.nn.Module, kernel: str) -> str:
    expected = _read_on(model, kernel, CachedRows)
    if expected is None:  # not with a mask and positions: it may be drawn from without
        return kernel
    if keeps_all_keys(model) and _gives(expected, model, _BOTH_SHARED, shared_rows.SharedRows):
        return SHARED_ATTENTION
    return ATTENTION if _gives(expected, model, _BOTH, CachedRows) else kernel


def _gives(
    expected: Float[Tensor, "rows vocab"],
    model: torch.nn.Module,
    attention: str,
    read: Callable[[torch.nn.Module, Any, int], TokenRows],
) -> bool:
    """Whether the model computes this with torch's kernel under another name, and every call of
    ours gives what the kernel gives.
    """
    agreements: list[bool] = []
    token = _agreements.set(agreements)
    try:
        renamed = _read_on(model, attention, read)
    finally:
        _agreements.reset(token)
    if renamed is None:
        return False
    # The kernel is torch's both times, but in bf16 other columns of padding are other rounding.
    # (What is no number agrees with nothing: the draw says so.)
    apart = (renamed - expected).square().mean().sqrt()
    same_model = bool(apart <= 0.1 * expected.std())
    return all(agreements) and same_model


def _read_on(
    model: torch.nn.Module,
    attention: str,
    read: Callable[[torch.nn.Module, Any, int], TokenRows],
) -> Float[Tensor, "rows vocab"] | None:
    """Log-probabilities after a few tokens of rows that have left, stayed and come; None where the
    model's code is not made for it.
    """
    try:
        with attending_by(model, attention), torch.no_grad():
            rows = read(model, _PROMPTS, 0)
            rows.advance(torch.tensor([9, 10, 11]))
            rows.keep([0, 2])
            rows.add(_PROMPTS[2:])
            rows.advance(torch.tensor([12, 13, 14]))
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS:
        return None
    return rows.logits.float().log_softmax(-1)


def _agree(ours: Tensor, expected: Tensor, value: Tensor) -> bool:
    # Outputs are means of values; bf16 rounds weights and values by half a percent.
    return bool((ours - expected).abs().max() <= 0.02 * value.abs().max())
