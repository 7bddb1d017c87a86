"""What a language model's memory depends on, counted on a model or from its configuration."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from neat_align.modeling.precision import linear_weights
from neat_align.modeling.shared_prefix import unwrapped
from neat_align.modeling.text_config import text_config


@dataclass(frozen=True)
class ModelShape:
    """What a language model's memory depends on.

    Attributes:
        parameters: all weights, each once.
        linear: those that only linear layers read, without the head.
        head: weights of the head, which may be the embeddings'.
        adapter_width: inputs plus outputs of the linear layers (without the head): an adapter of
            rank r has r times as many parameters.
        layers, hidden, intermediate, vocabulary: as in the model's configuration; `intermediate` of
            the experts that one token goes through, together.
        query_width, key_width: of all heads together.
        heads: query heads.
    """

    parameters: int
    linear: int
    head: int
    adapter_width: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    query_width: int
    key_width: int
    heads: int

    def lora(self, rank: int) -> int:
        """Parameters of a LoRA adapter of this rank on every linear layer."""
        return rank * self.adapter_width


def shape_of(config: Any) -> ModelShape:
    """The shape of the model of a transformers configuration; no weights are made."""
    return shape_of_model(meta_model(config))


def meta_model(config: Any) -> torch.nn.Module:
    """The model of a configuration on the meta device, where weights have a size and no numbers."""
    make: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return cast("torch.nn.Module", make(copy.deepcopy(config), dtype=torch.float32))


def shape_of_model(model: Any) -> ModelShape:
    """The shape of a model, without what an adapter adds to it."""
    inner = unwrapped(model)
    config = text_config(inner.config)
    own = _without_adapter(inner)
    head = inner.get_output_embeddings().weight
    layers = [p for p in linear_weights(inner) if id(p) in own and p is not head]
    hidden = _number(config, "hidden_size", head.shape[-1])
    heads = _number(config, "num_attention_heads", 1)
    width = _number(config, "head_dim", hidden // heads)
    keys = _number(config, "num_key_value_heads", heads)
    return ModelShape(
        parameters=sum(p.numel() for p in own.values()),
        linear=sum(p.numel() for p in layers),
        head=head.numel(),
        adapter_width=sum(sum(p.shape) for p in layers if p.ndim == 2),
        layers=_number(config, "num_hidden_layers", 1),
        hidden=hidden,
        intermediate=_intermediate(config, hidden),
        vocabulary=head.shape[0],
        query_width=heads * width,
        key_width=keys * width,
        heads=heads,
    )


def bytes_of_weights(model: Any) -> tuple[float, float]:
    """Bytes of a weight of the linear layers and of any other, without what an adapter adds."""
    inner = unwrapped(model)
    own = _without_adapter(inner)
    linear = {id(p): p for p in linear_weights(inner) if id(p) in own}
    others = [p for key, p in own.items() if key not in linear]

    def mean(weights: Collection[torch.nn.Parameter]) -> float:
        count = sum(p.numel() for p in weights)
        return sum(p.numel() * p.element_size() for p in weights) / count if count else 4.0

    return mean(linear.values()), mean(others)


def _without_adapter(inner: torch.nn.Module) -> dict[int, torch.nn.Parameter]:
    """The model's own weights, each once, by their ids."""
    return {id(p): p for n, p in inner.named_parameters() if "lora_" not in n}


def _number(config: Any, name: str, default: int) -> int:
    """A size of a configuration; the largest where layers differ, `default` where it has none."""
    # What differs between layers is an error to ask for (Gemma 4), and is there as a plain value.
    value = vars(config).get(name) or getattr(config, name, None)
    sizes = value if isinstance(value, list | tuple) else [value]
    return max((n for n in sizes if isinstance(n, int) and n > 0), default=default)


def _intermediate(config: Any, hidden: int) -> int:
    """Width of the MLP that a token goes through; of its experts in a mixture."""
    plain = _number(config, "intermediate_size", _number(config, "n_inner", 4 * hidden))
    experts = _number(config, "num_experts_per_tok", 0)
    if not experts:
        return plain
    shared = _number(config, "shared_expert_intermediate_size", 0)
    return experts * _number(config, "moe_intermediate_size", plain) + shared
