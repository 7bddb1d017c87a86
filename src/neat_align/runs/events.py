"""What a run tells whoever watches it, beyond Trainer's own events.

A `RunCallback` among the trainer's callbacks hears how far a stage is and which groups a round
made. The trainer draws nothing itself: the command line gives it callbacks that do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from transformers import TrainerCallback

from neat_align.rounds.completions import CompletionGroup


class RunCallback(TrainerCallback):
    """A `TrainerCallback` that is also told of stages and rounds. Methods do nothing by default."""

    def on_stage(self, title: str, stage: str, finished: int, total: int) -> None:
        """A stage (sampling, scoring) of `title` has finished this many of its pieces."""

    def on_stages_end(self, title: str) -> None:
        """All stages of `title` are over, also when one of them raised."""

    def on_round_made(self, round_index: int, groups: Sequence[CompletionGroup]) -> None:
        """A round's groups are ready to be learned from; rounds count from 0. Rank 0 only.

        They are read from their file as they are asked for: take what is needed, not all of them.
        """


@contextlib.contextmanager
def stage_reporter(
    callbacks: Sequence[TrainerCallback], title: str
) -> Iterator[Callable[[str, int, int], None]]:
    """Something to report (stage, finished, of how many) to, which tells every `RunCallback`."""
    listeners = [c for c in callbacks if isinstance(c, RunCallback)]

    def report(stage: str, finished: int, total: int) -> None:
        for callback in listeners:
            callback.on_stage(title, stage, finished, total)

    try:
        yield report
    finally:
        for callback in listeners:
            callback.on_stages_end(title)


def tell_round(
    callbacks: Sequence[TrainerCallback], round_index: int, groups: Sequence[CompletionGroup]
) -> None:
    """Tell every `RunCallback` which groups a round made."""
    for callback in callbacks:
        if isinstance(callback, RunCallback):
            callback.on_round_made(round_index, groups)


def shows_groups(callback: TrainerCallback | type[TrainerCallback]) -> bool:
    """Whether a callback (or a class of one, as Trainer takes it) does something with a round's
    groups.
    """
    kind = callback if isinstance(callback, type) else type(callback)
    return issubclass(kind, RunCallback) and kind.on_round_made is not RunCallback.on_round_made
