"""Drawing by transformers' own `generate`, for models whose cache is more than keys and values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from neat_align.modeling.shared_prefix import unwrapped
from neat_align.sampling.draw import draw
from neat_align.sampling.protocol import SamplingParams


class DrawnToken(LogitsProcessor):
    """Leaves `generate`, running greedily, the drawn token alone; keeps its log-probability."""

    def __init__(
        self, numbers: Float[Tensor, "rows tokens"], params: SamplingParams, prompt_width: int
    ) -> None:
        self.numbers, self.params, self.prompt_width = numbers, params, prompt_width
        self.logprobs: list[Float[Tensor, " rows"]] = []

    def __call__(
        self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        """Scores of which only the drawn token's is not minus infinity."""
        tokens, logprobs = draw(
            scores, self.numbers[:, input_ids.shape[1] - self.prompt_width], self.params
        )
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


@contextlib.contextmanager
def no_own_generation_config(model: Any) -> Iterator[None]:
    """While open, the model's own generation_config is empty: only the request shapes the draw.

    `generate` fills what is unset from it (repetition penalties, suppressed tokens, …).
    """
    base = unwrapped(model)
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def greedy(
    params: SamplingParams, eos_token_ids: tuple[int, ...], pad_token_id: int
) -> GenerationConfig:
    """The likeliest token each time: the drawn one, where `DrawnToken` has been at the scores."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=pad_token_id,
        use_cache=True,
    )
