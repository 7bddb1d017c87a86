"""A model called for its logits, whatever else its configuration asks it to compute.

Users set `output_router_logits: true` for a mixture of experts, so that Trainer adds its load
balancing loss. NEAT's loss has no such term, and while decoding with a cache the model would fail
over it (the router's logits of one new token against a mask of all). The same goes for hidden
states and attention weights, which would be held for nothing, and for tuples instead of outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from neat_align.modeling.shared_prefix import unwrapped
from neat_align.modeling.text_config import text_config

# Attributes of a model's configuration, and what they are while it is called.
_PLAIN: Mapping[str, bool] = {
    "output_router_logits": False,
    "output_hidden_states": False,
    "_output_attentions": False,
    "return_dict": True,
}


@contextlib.contextmanager
def plain_outputs(model: torch.nn.Module) -> Iterator[None]:
    """While open, the model's configuration asks for logits alone, in an output with names."""
    configs = {id(c): c for c in _configs(model)}
    before = [
        (values, name, values[name])
        for values in map(vars, configs.values())
        for name, plain in _PLAIN.items()
        if values.get(name, plain) != plain
    ]
    for values, name, _ in before:
        values[name] = _PLAIN[name]
    try:
        yield
    finally:
        for values, name, value in before:
            values[name] = value


def forward(model: torch.nn.Module, **inputs: Any) -> Any:
    """The model's output for these inputs: logits, and a cache where `use_cache` asks for one."""
    with plain_outputs(model):
        return model(**inputs)


def adds_auxiliary_loss(model: torch.nn.Module) -> bool:
    """Whether the configuration asks for a loss beside the one of the tokens."""
    return any(bool(getattr(c, "output_router_logits", False)) for c in _configs(model))


def _configs(model: torch.nn.Module) -> tuple[PreTrainedConfig, ...]:
    """The configuration, and that of the text model in it: of a model of text and images, both.

    Its parts read their own. A module of the caller's own has none.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        return ()
    return (inner.config, text_config(inner.config))
