"""The tokens of a batch while they are drawn, on the device that draws them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from neat_align.sampling.draw import draw
from neat_align.sampling.protocol import SamplingParams
from neat_align.sampling.token_rows import TokenRows

# Completions leave the batch when at least this share of it has ended: the cache is copied then.
SHRINK_AT = 0.125


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


def draw_tokens(
    drawing: Drawing,
    rows: TokenRows,
    params: SamplingParams,
    *,
    look_every: int,
    rows_each: int = 1,
    combined: Callable[[Float[Tensor, "rows vocab"]], Float[Tensor, "requests vocab"]]
    | None = None,
) -> None:
    """Draw every request's tokens, until all have ended or have the longest length.

    A request reads `rows_each` rows, which stand together and all get its token; `combined` makes
    one row of logits a request of theirs. Which requests have ended is looked at once in
    `look_every` tokens.
    """
    while True:
        logits = rows.logits if combined is None else combined(rows.logits)
        last = drawing.next_tokens(logits, params)
        if drawing.step == params.max_new_tokens:
            break
        if drawing.step % look_every == 0:
            left = drawing.left()
            if not left:
                break
            if len(left) <= (1 - SHRINK_AT) * len(drawing.rows):
                stay = torch.tensor(left, device=last.device)
                last = last[stay]
                drawing.keep(stay)
                rows.keep([i * rows_each + j for i in left for j in range(rows_each)])
        rows.advance(last if rows_each == 1 else last.repeat_interleave(rows_each))


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
