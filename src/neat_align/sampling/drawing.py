"""The tokens of completions while they are drawn, on the device that draws them.

So many requests as there are places are drawn beside each other. One whose completion has ended
gives its place to the next that waits; without that, each place would wait for the longest
completion of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neat_align.sampling.draw import draw, uniforms
from neat_align.sampling.protocol import SampleRequest, SamplingParams
from neat_align.sampling.token_rows import TokenRows

# Completions that have ended leave when they are at least this share of those that are drawn, and
# requests that wait come in when at least this share of the places is free: the cache is copied
# then, and the newcomers' prompts are a pass of their own. Waiting for k of B places costs k/2
# places k L / B steps long where completions have L tokens, coming in costs about a step, and so
# k / B = sqrt(2 / L) costs the least: 1/8 for 128 tokens, 1/4 for 32, 1/11 for 256. One that has
# all of its tokens leaves at once: the model may have no place for more.
SHRINK_AT = 0.125
# Completions of one prompt come in together, since it is then read once, unless that leaves this
# share of the places free.
SPLIT_AT = 0.25


@dataclass(frozen=True)
class Drawn:
    """What was drawn for a request, with what came after its end; `noted` is `Combined`'s."""

    request: int
    tokens: list[int]
    logprobs: list[float]
    noted: list[float]


@dataclass(frozen=True)
class Combined:
    """One row of logits a request, and a number of it to be kept beside the token."""

    logits: Float[Tensor, "requests vocab"]
    noted: Float[Tensor, " requests"]


Combine: TypeAlias = Callable[[Float[Tensor, "rows vocab"]], Combined]


class Waiting:
    """Requests that wait for a place, in their order."""

    def __init__(self, requests: Sequence[SampleRequest], places: int) -> None:
        self.requests, self.places, self._next = requests, places, 0

    def take(self, free: int) -> list[int]:
        """Who comes into the places that are free: none while it is better to wait for more."""
        waiting = len(self.requests) - self._next
        if free < self.places and free < SHRINK_AT * self.places:
            return []
        count = self._whole(min(free, waiting))
        if not count and free >= SPLIT_AT * self.places:
            count = min(free, waiting)
        taken = list(range(self._next, self._next + count))
        self._next += count
        return taken

    def _whole(self, most: int) -> int:
        """How many of the next `most` come in if completions of one prompt stay together."""
        end = self._next + most
        prompts = [r.prompt_ids for r in self.requests[self._next : end + 1]]
        while most and most < len(prompts) and prompts[most - 1] == prompts[most]:
            most -= 1
        return most


class Drawing:
    """The tokens that are drawn so far, a row for each request that is being drawn; nothing is read
    from the device until `left` and `leave`.
    """

    def __init__(self, ends: Int[Tensor, " ends"], params: SamplingParams) -> None:
        self.ends, self.params = ends, params
        # The request of each row, and the tokens that it may still have: known without asking the
        # device.
        self.requests: list[int] = []
        self.more: list[int] = []
        shape, device = (0, params.max_new_tokens), ends.device
        self.numbers = torch.empty(shape, device=device)
        self.tokens = torch.empty(shape, dtype=torch.long, device=device)
        self.logprobs, self.noted = torch.empty_like(self.numbers), torch.empty_like(self.numbers)
        self.steps = torch.empty(0, dtype=torch.long, device=device)
        self.ended = torch.empty(0, dtype=torch.bool, device=device)

    def add(self, numbered: Sequence[int], requests: Sequence[SampleRequest]) -> None:
        """Rows for these requests, after those that are there."""
        numbers = uniforms([r.seed for r in requests], self.params.max_new_tokens, self.ends.device)
        self.requests += numbered
        self.more += [r.limit(self.params) for r in requests]
        self.numbers = torch.cat([self.numbers, numbers])
        zeros = torch.zeros_like(numbers)
        self.tokens = torch.cat([self.tokens, zeros.long()])
        self.logprobs = torch.cat([self.logprobs, zeros])
        self.noted = torch.cat([self.noted, zeros])
        self.steps = torch.cat([self.steps, zeros[:, 0].long()])
        self.ended = torch.cat([self.ended, zeros[:, 0].bool()])

    def next_tokens(
        self,
        logits: Float[Tensor, "rows vocab"],
        noted: Float[Tensor, " rows"] | None = None,
    ) -> Int[Tensor, " rows"]:
        """One more token for every row, those that have ended included."""
        at = self.steps[:, None]
        last, logprob = draw(logits, self.numbers.gather(1, at).squeeze(1), self.params)
        self.tokens.scatter_(1, at, last[:, None])
        self.logprobs.scatter_(1, at, logprob[:, None])
        if noted is not None:
            self.noted.scatter_(1, at, noted[:, None])
        self.ended = self.ended | (last[:, None] == self.ends).any(-1)
        self.steps = self.steps + 1
        self.more = [more - 1 for more in self.more]
        return last

    def within_limits(self) -> list[int]:
        """The rows that may have another token, those that have ended included."""
        return [i for i, more in enumerate(self.more) if more]

    def left(self) -> list[int]:
        """The rows within their limits that have not ended: none when one that had not was drawn
        from what is no number, which ends them all. Waits for the device.
        """
        logprobs = self.logprobs.gather(1, self.steps[:, None] - 1).squeeze(1)
        broken = logprobs.isnan() & ~self.ended
        ended, is_broken = torch.stack([self.ended, broken]).tolist()
        return [] if any(is_broken) else [i for i in self.within_limits() if not ended[i]]

    def leave(self, rows: Sequence[int]) -> list[Drawn]:
        """What was drawn in these rows, which are given up. Waits for the device."""
        gone = torch.tensor(rows, device=self.steps.device)
        tables = (self.tokens, self.logprobs, self.noted)
        read = zip(*(table[gone].tolist() for table in tables), strict=True)
        drawn = [Drawn(self.requests[i], *of_row) for i, of_row in zip(rows, read, strict=True)]
        away = set(rows)
        self._keep([i for i in range(len(self.requests)) if i not in away])
        return drawn

    def _keep(self, rows: Sequence[int]) -> None:
        stay = torch.tensor(rows, dtype=torch.long, device=self.steps.device)
        self.requests, self.more = [self.requests[i] for i in rows], [self.more[i] for i in rows]
        self.numbers, self.tokens = self.numbers[stay], self.tokens[stay]
        self.logprobs, self.noted = self.logprobs[stay], self.noted[stay]
        self.steps, self.ended = self.steps[stay], self.ended[stay]


@dataclass(frozen=True)
class RowReader:
    """How requests become rows that a model reads.

    `rows_of` are a request's own rows, equally many for each, that stand together and all get its
    token; `combine` makes one row of logits of theirs (None: there is one). `read` has a model read
    the rows.
    """

    rows_of: Callable[[SampleRequest], Sequence[tuple[int, ...]]]
    read: Callable[[Sequence[tuple[int, ...]]], TokenRows]
    combine: Combine | None = None


def draw_tokens(
    waiting: Waiting,
    drawing: Drawing,
    reader: RowReader,
    *,
    look_every: int,
    finished: Callable[[list[Drawn]], None],
) -> None:
    """Draw every request's tokens, until all have ended or are as long as they may be.

    `finished` is told of those that have. Which have ended is looked at once in `look_every`
    tokens.
    """
    rows: TokenRows | None = None
    step, each = 0, 1
    while True:
        free = waiting.places - len(drawing.requests)
        newcomers = waiting.take(free) if free else []
        if newcomers:
            asked = [waiting.requests[i] for i in newcomers]
            prompts = [ids for request in asked for ids in reader.rows_of(request)]
            each = len(prompts) // len(asked)
            drawing.add(newcomers, asked)
            if rows is None:
                rows = reader.read(prompts)
            else:
                rows.add(prompts)
        if rows is None:
            return
        logits, noted = rows.logits, None
        if reader.combine is not None:
            combined = reader.combine(logits)
            logits, noted = combined.logits, combined.noted
        last = drawing.next_tokens(logits, noted)
        step += 1
        going = _going(drawing, look=step % look_every == 0)
        if len(going) < len(last):
            stay = set(going)
            drawn = drawing.leave([i for i in range(len(last)) if i not in stay])
            if going:
                last = last[torch.tensor(going, device=last.device)]
                rows.keep([i * each + j for i in going for j in range(each)])
            else:
                rows = None  # its memory is free before more is read
            finished(drawn)
        if rows is not None:
            rows.advance(last if each == 1 else last.repeat_interleave(each))


def _going(drawing: Drawing, *, look: bool) -> list[int]:
    """The rows that go on, those included that have ended and whose leaving is not worth a copy."""
    going, count = drawing.within_limits(), len(drawing.requests)
    if going and look:
        left = drawing.left()
        # Where some leave anyway, all that have ended do.
        if len(going) < count or len(left) <= (1 - SHRINK_AT) * count:
            return left
    return going
