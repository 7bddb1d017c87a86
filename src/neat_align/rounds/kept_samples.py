"""What a sampler has drawn so far of a call, on the disk before the call ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from neat_align.rounds.params import RoundTools
from neat_align.rounds.rollout_store import RolloutStore
from neat_align.rounds.scoring_stage import refuse_non_finite
from neat_align.sampling.protocol import Sample

# Samples that were handed over are stored when they are at least this share of a batch: a file and
# its flush to the disk take some milliseconds. A kill costs these, and what is being drawn; an
# error only that.
STORED_AT = 0.25


class KeptSamples:
    """Stores the samples of one call of a sampler, as they are handed over.

    `numbers` are the requests' numbers in the store, and `prompts` their prompts' ids; `whole`
    makes of what was drawn what is stored.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        prompts: Sequence[str],
        whole: Callable[[int, Sample], Sample],
        store: RolloutStore,
        tools: RoundTools,
    ) -> None:
        self._numbers, self._prompts, self._whole = numbers, prompts, whole
        self._store, self._tools = store, tools
        self._handed_over: dict[int, Sample] = {}  # by place in the call
        self._unstored: dict[int, Sample] = {}

    def finished(self, places: Sequence[int], samples: Sequence[Sample]) -> None:
        """These have ended. Between two batches of them, `tools.between_batches` is called."""
        self._take(places, samples)
        if len(self._unstored) >= STORED_AT * self._tools.batch_size:
            self.store_the_rest()
            if len(self._handed_over) < len(self._numbers):
                self._tools.between_batches()

    def all_of(self, samples: Sequence[Sample]) -> dict[int, Sample]:
        """The call has ended: its samples as they are stored, by number.

        Raises CollapseError for log-probabilities that are not finite.
        """
        rest = [i for i in range(len(self._numbers)) if i not in self._handed_over]
        self._take(rest, [samples[i] for i in rest])
        drawn = self._handed_over
        refuse_non_finite(
            "log-probability",
            [self._prompts[i] for i in drawn],
            [s.logprob for s in drawn.values()],
        )
        self.store_the_rest()
        return {self._numbers[i]: sample for i, sample in drawn.items()}

    def _take(self, places: Sequence[int], samples: Sequence[Sample]) -> None:
        self._tools.count_tokens(sum(len(s.token_ids) for s in samples))
        taken = {i: self._whole(self._numbers[i], s) for i, s in zip(places, samples, strict=True)}
        self._handed_over.update(taken)
        # Others are refused when the call has ended, with the prompts.
        self._unstored.update({i: s for i, s in taken.items() if math.isfinite(s.logprob)})

    def store_the_rest(self) -> None:
        """Store what was handed over and is not stored yet."""
        if not self._unstored:
            return
        places = sorted(self._unstored)
        self._store.write_samples(
            [self._numbers[i] for i in places], [self._unstored[i] for i in places]
        )
        self._unstored.clear()
