"""Where a model's configuration says what its language model is, and how much text that takes.

Models that also see or hear (Gemma 3, Llama 4, LLaVA) keep the language model's settings in a
configuration of its own, and some families call their context by another name or have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neat_align.errors import ConfigError

# What families call the most tokens that a row may have, the usual name first. ALiBi models (MPT)
# and models with code of their own have only one of the others.
_CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "seq_length",
    "seq_len",
    "max_target_positions",
    "context_length",
    "n_ctx",
)


def text_config(config: Any) -> Any:
    """The configuration of the language model in `config`; most models have no other.

    Raises ConfigError for a model with several, of which nobody could say which one writes.
    """
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:
        raise ConfigError(
            f"the model ({config.model_type}) holds several language models, and a policy is one: "
            f"pass the one that writes ({error})"
        ) from error


def context_length(config: Any) -> int | None:
    """The most tokens, prompt and completion together, that a model's rows may have.

    None for a model without a limit (Bloom's ALiBi, Mamba, XLNet's -1). Position embeddings that
    are stretched at run time reach further than they were trained for: linear and dynamic scaling
    say so by a factor alone, YaRN by its factor over `original_max_position_embeddings`.
    """
    config = text_config(config)
    values = (getattr(config, name, None) for name in _CONTEXT_NAMES)
    limit = next((n for n in values if isinstance(n, int) and n > 0), None)
    return None if limit is None else _stretched(limit, config)


def _stretched(limit: int, config: Any) -> int:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(given, Mapping):
        return limit
    by_layer_type = [v for v in given.values() if isinstance(v, Mapping)]
    # Of layers with positions of different kinds, the ones that reach least far decide.
    return min(_reach(limit, rope) for rope in by_layer_type or [given])


def _reach(limit: int, rope: Mapping[str, Any]) -> int:
    """As transformers computes it: where the original length is not said, `limit` is it."""
    factor = rope.get("factor")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("linear", "dynamic", "yarn") or not isinstance(factor, int | float):
        return limit
    original = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(original * factor))
