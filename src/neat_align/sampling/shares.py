"""A share of requests that is drawn with so many places, and who hears what has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from neat_align.sampling.protocol import Finished, Sample, SampleRequest, SamplingParams

D = TypeVar("D", bound=Sample)
# Told of requests, by their place among those that were asked for, that have their samples.
Done: TypeAlias = Callable[[Sequence[int], Sequence[D]], None]
# Draws requests, so many at once.
DrawShare: TypeAlias = Callable[[Sequence[SampleRequest], SamplingParams, int, Done[D]], None]


@dataclass(frozen=True)
class Told:
    """Who hears of finished completions: how many they are, and which."""

    progress: Callable[[int], None] | None
    finished: Finished | None

    def and_kept(self, samples: dict[int, D], asked: Sequence[int]) -> Done[D]:
        """Keeps what is drawn for the requests `asked` in `samples`, and tells of it."""

        def done(at: Sequence[int], drawn: Sequence[D]) -> None:
            numbers = [asked[k] for k in at]
            samples.update(zip(numbers, drawn, strict=True))
            if self.finished is not None:
                self.finished(numbers, drawn)
            if self.progress is not None:
                self.progress(len(numbers))

        return done


def in_batches(
    draw_batch: Callable[[Sequence[SampleRequest], SamplingParams], list[D]],
) -> DrawShare[D]:
    """A batch after the other, as few as the places allow and of like size.

    A small last one would cost nearly as much as a full one.
    """

    def draw_share(
        requests: Sequence[SampleRequest], params: SamplingParams, places: int, done: Done[D]
    ) -> None:
        count = -(-len(requests) // places)
        size = -(-len(requests) // count)
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            done(range(start, start + len(batch)), draw_batch(batch, params))

    return draw_share
