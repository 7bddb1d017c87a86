"""Adapters merged into the weights below them, where the merged model is still the same one.

It is not where two layers share the weight that takes the adapter (tied embeddings), and there is
nothing to merge into where an adapter adds virtual tokens. So the logits are compared before and
after, and whoever asked decides what is used instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neat_align.errors import one_line
from neat_align.modeling.outputs import forward
from neat_align.modeling.rounding import own_type, rounding_limit
from neat_align.modeling.shared_prefix import unwrapped

# What peft raises where it cannot merge.
_MERGE_ERRORS = (NotImplementedError, ValueError, TypeError, AttributeError, RuntimeError, KeyError)
# Mean over tokens and vocabulary, in nats, that is rounding in fp32.
_EXACT = 1e-4
_PROBED = 32


class CannotMergeError(Exception):
    """Why an adapter is not merged."""


def merged(model: Any, expected: Float[Tensor, "tokens vocab"]) -> torch.nn.Module:
    """The model below a PEFT model, with the adapter merged in, or left out where it is off.

    `expected` is what `adapter_logprobs` gave before. The PEFT model is used up. Raises
    CannotMergeError where the result is another model, or peft has no way to merge.
    """
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(model.base_model, BaseTuner):
        raise CannotMergeError(f"{_kind(model)} adds to the model what no weight of it can hold")
    limit = rounding_limit(model)
    # Merging does not look at whether the adapter is switched on; a copy of the start policy must
    # leave it out.
    switched_off = model.get_model_status().enabled is False
    tokens = probed_tokens(model)
    try:
        base: Any = model.unload() if switched_off else model.merge_and_unload()
    except _MERGE_ERRORS as error:
        raise CannotMergeError(one_line(error, 200)) from error
    difference = float((adapter_logprobs(base, tokens) - expected).abs().mean())
    if difference > (_EXACT if limit.exact else limit.nats):
        raise CannotMergeError(
            f"merged, its log-probabilities are others ({difference:.2g} nats apart on average)"
        )
    return cast("torch.nn.Module", base)


def adapter_logprobs(
    model: torch.nn.Module, tokens: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens vocab"]:
    """Next-token log-probabilities after each of these tokens, in the weights' own type."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        dtype = own_type(model)
        autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
        with torch.no_grad(), autocast:
            logits: Tensor = forward(model, input_ids=tokens[None].to(device), use_cache=False)[
                "logits"
            ]
    finally:
        model.train(was_training)
    return logits[0, -len(tokens) :].float().log_softmax(-1)


def probed_tokens(model: Any) -> Int[Tensor, " tokens"]:
    """Tokens from all over the vocabulary, and those that an adapter trains singly."""
    rows = unwrapped(model).get_input_embeddings().weight.shape[0]
    spread = torch.linspace(0, rows - 1, min(rows, _PROBED)).long().tolist()
    single = [token for token in _single_tokens(model.active_peft_config) if token < rows]
    return torch.tensor([*spread, *single[:_PROBED]])


def _single_tokens(adapter: Any) -> Iterator[int]:
    for name in ("trainable_token_indices", "token_indices"):
        given = getattr(adapter, name, None) or ()
        for part in given.values() if isinstance(given, Mapping) else [given]:
            yield from part


def _kind(model: Any) -> str:
    return str(getattr(model.active_peft_config.peft_type, "value", "the adapter"))
