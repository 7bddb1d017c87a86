"""Tiny random models of families whose caches differ: windows, and layers of two kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Gemma2Config, MistralConfig, PreTrainedModel

from tiny import random_model

VOCAB, PAD = 48, 0
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOWED: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral, a short window": lambda: random_model(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6)
    ),
    "gemma2, two kinds of layers": lambda: random_model(
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=6)
    ),
}
