"""What a sampler is asked for and what it gives back. No torch: a remote sampler needs none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One completion to draw.

    `prompt_ids` is the rendered prompt, instruction included, and the tokens of an answer that is
    to be continued; `seed` is the completion's own. With `max_new_tokens` this one has at most so
    many tokens, if that is fewer than the `SamplingParams` allow.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int | None = None

    def limit(self, params: SamplingParams) -> int:
        """The most tokens that this completion may have."""
        own = self.max_new_tokens
        return params.max_new_tokens if own is None else min(own, params.max_new_tokens)


@dataclass(frozen=True, slots=True)
class Sample:
    """One drawn completion.

    `token_ids` ends with the end-of-turn token when `finish_reason` is "stop" and has none when it
    is "length". `logprob` is the sum over `token_ids`, in nats, of the untempered policy under the
    request's prompt, whatever temperature, top-p or top-k shaped the draw.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprob: float


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw.

    `top_k` 0 and `top_p` 1 keep every token; `max_new_tokens` counts the end-of-turn token.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


# Told which requests, by their place among those that were asked for, have which samples.
Finished: TypeAlias = Callable[[Sequence[int], Sequence[Sample]], None]


@runtime_checkable
class Sampler(Protocol):
    """Draws completions. The result depends on each request alone, not on its batch or place."""

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """One `Sample` a request, in order.

        `progress` is called with the number of completions just finished.
        """
        ...


@runtime_checkable
class HandsOver(Protocol):
    """A `Sampler` that hands completions over as they end: it may be asked for many at once, and
    when it is interrupted they are not lost. The others are then asked for again, without them.
    """

    @property
    def hands_over(self) -> bool:
        """Whether it does so now: one that only wraps another asks that one."""
        ...

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
        finished: Finished | None = None,
    ) -> list[Sample]:
        """As `Sampler.sample`.

        `finished` is called for every completion once, with as many as have just ended; `progress`
        is called after it. What it raises ends the draw.
        """
        ...


def handing_over(sampler: Sampler) -> HandsOver | None:
    """The sampler, if it hands completions over now."""
    return sampler if isinstance(sampler, HandsOver) and sampler.hands_over else None
