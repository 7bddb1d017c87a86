"""The tokens of a batch while they are drawn, on the device that draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from neat_align.sampling.draw import draw
from neat_align.sampling.protocol import SamplingParams
from neat_align.sampling.token_rows import TokenRows

# Completions that have ended leave the batch when they are at least this share of it: the cache is
# copied then. One that has all of its tokens leaves at once: the model may have no place for more.
SHRINK_AT = 0.125


class Drawing:
    """The tokens that a batch has drawn so far; nothing is read from the device until `left`."""

    def __init__(
        self,
        numbers: Float[Tensor, "requests tokens"],
        ends: Int[Tensor, " ends"],
        limits: Sequence[int],
    ) -> None:
        device = numbers.device
        self.numbers, self.ends, self.step = numbers, ends, 0
        # Tokens that each request may have, and so each row: known without asking the device.
        self.limits = list(limits)
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
        return last

    def within_limits(self) -> list[int]:
        """The rows that may have another token, those that have ended included."""
        return [i for i, limit in enumerate(self.limits) if limit > self.step]

    def left(self) -> list[int]:
        """The rows within their limits that have not ended: none when one that had not was drawn
        from what is no number, which ends them all. Waits for the device.
        """
        broken = self.logprobs[self.rows, self.step - 1].isnan() & ~self.ended
        ended, is_broken = torch.stack([self.ended, broken]).tolist()
        return [] if any(is_broken) else [i for i in self.within_limits() if not ended[i]]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        stay = torch.tensor(rows, device=self.rows.device)
        self.rows, self.ended = self.rows[stay], self.ended[stay]
        self.limits = [self.limits[i] for i in rows]


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
    """Draw every request's tokens, until all have ended or are as long as they may be.

    A request reads `rows_each` rows, which stand together and all get its token; `combined` makes
    one row of logits a request of theirs. Which requests have ended is looked at once in
    `look_every` tokens.
    """
    while True:
        logits = rows.logits if combined is None else combined(rows.logits)
        last = drawing.next_tokens(logits, params)
        count = len(drawing.rows)
        going = drawing.within_limits()
        if going and drawing.step % look_every == 0:
            left = drawing.left()
            # Where some leave anyway, all that have ended do.
            if len(going) < count or len(left) <= (1 - SHRINK_AT) * count:
                going = left
        if not going:
            break
        if len(going) < count:
            last = last[torch.tensor(going, device=last.device)]
            drawing.keep(going)
            rows.keep([i * rows_each + j for i in going for j in range(rows_each)])
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
