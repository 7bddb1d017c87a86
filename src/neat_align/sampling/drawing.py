"""The tokens of a batch while they are drawn, on the device that draws them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from neat_align.sampling.draw import draw
from neat_align.sampling.protocol import SamplingParams


class Drawing:
    """The tokens that a batch has drawn so far; nothing is read from the device until `left`."""

    def __init__(
        self,
        numbers: Float[Tensor, "requests tokens"],
        ends: Int[Tensor, " ends"],
        limits: Int[Tensor, " requests"],
    ) -> None:
        device = numbers.device
        self.numbers, self.ends, self.step = numbers, ends, 0
        # Tokens that each request may have.
        self.limits = limits
        self.tokens = torch.empty(numbers.shape, dtype=torch.long, device=device)
        self.logprobs = torch.empty_like(numbers)
        # The request that each row of the batch draws for.
        self.rows = torch.arange(len(numbers), device=device)
        self.ended = torch.zeros(len(numbers), dtype=torch.bool, device=device)

    def next_tokens(
        self, logits: Float[Tensor, "rows vocab"], params: SamplingParams
    ) -> Int[Tensor, " rows"]:
        """One more token for every row, those that have ended included."""
        rows, step = self.rows, self.step
        last, logprob = draw(logits, self.numbers[rows, step], params)
        self.tokens[rows, step], self.logprobs[rows, step] = last, logprob
        self.ended = self.ended | (last[:, None] == self.ends).any(-1)
        self.step += 1
        self.ended = self.ended | (self.limits[rows] <= self.step)
        return last

    def left(self) -> list[int]:
        """The rows that have not ended: none when one of those was drawn from what is no number,
        which ends them all. Waits for the device.
        """
        broken = self.logprobs[self.rows, self.step - 1].isnan() & ~self.ended
        ended, is_broken = torch.stack([self.ended, broken]).tolist()
        return [] if any(is_broken) else [i for i, done in enumerate(ended) if not done]

    def keep(self, stay: Int[Tensor, " rows"]) -> None:
        """Go on with these rows alone."""
        self.rows, self.ended = self.rows[stay], self.ended[stay]


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
