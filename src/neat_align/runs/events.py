"""What a run tells whoever watches it, beyond Trainer's own events.

A `RunCallback` among the trainer's callbacks hears how far a stage is and which groups a round
made. The trainer draws nothing itself: the command line gives it callbacks that do.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import overload

from transformers import TrainerCallback

from neat_align.prompts.copies import deep_copy
from neat_align.rounds.completions import CompletionGroup
from neat_align.runs.plan import RunPlan

logger = logging.getLogger(__name__)
WHOLE_DATA = "data_passes: 1 is one pass over all of it"


class RunCallback(TrainerCallback):
    """A `TrainerCallback` that is also told of stages and rounds. Methods do nothing by default."""

    def on_plan(self, plan: RunPlan, done_steps: int) -> None:
        """What the run will do, before anything is sampled; so many steps are done. Rank 0 only."""

    def on_outlook(self, measure: Callable[[], list[str]]) -> None:
        """After the plan: called, `measure` takes some seconds, and gives lines about the memory
        and the time of the run. Rank 0 only.
        """

    def on_stage(self, title: str, stage: str, finished: int, total: int) -> None:
        """A stage (sampling, scoring) of `title` has finished this many of its pieces."""

    def on_tokens(self, tokens: int) -> None:
        """So many more tokens of completions were sampled, in the stage that goes on."""

    def on_stages_end(self, title: str) -> None:
        """All stages of `title` are over, also when one of them raised."""

    def on_round_made(self, round_index: int, groups: Sequence[CompletionGroup]) -> None:
        """A round's groups are ready to be learned from; rounds count from 0. Rank 0 only.

        They are read from their file as they are asked for: take what is needed, not all of them.
        """


def tell_plan(callbacks: Sequence[TrainerCallback], plan: RunPlan, done_steps: int) -> None:
    """Tell every `RunCallback` the plan; where none does anything with it, it is logged."""
    listeners = [c for c in callbacks if isinstance(c, RunCallback) and shows_plan(c)]
    for callback in listeners:
        callback.on_plan(plan, done_steps)
    if not listeners:
        # At a level that is shown by default: that a run sees little of its data must not pass
        # without a word.
        logger.warning("%s", "\n".join(plan.lines(more=WHOLE_DATA, done_steps=done_steps)))


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


def tell_outlook(callbacks: Sequence[TrainerCallback], measure: Callable[[], list[str]]) -> None:
    """Offer every `RunCallback` what the run takes; nothing is measured unless one asks."""
    for callback in callbacks:
        if isinstance(callback, RunCallback):
            callback.on_outlook(measure)


def tell_tokens(callbacks: Sequence[TrainerCallback], tokens: int) -> None:
    """Tell every `RunCallback` how many more tokens were sampled."""
    for callback in callbacks:
        if isinstance(callback, RunCallback):
            callback.on_tokens(tokens)


def tell_round(
    callbacks: Sequence[TrainerCallback], round_index: int, groups: Sequence[CompletionGroup]
) -> None:
    """Tell every `RunCallback` which groups a round made; each may change what it is given."""
    for callback in callbacks:
        if isinstance(callback, RunCallback):
            callback.on_round_made(round_index, _OwnGroups(groups))


class _OwnGroups(Sequence[CompletionGroup]):
    """The groups with prompts (the only part of a group that can change) of the reader's own.

    They are copied as they are read: most callbacks look at a few.
    """

    def __init__(self, groups: Sequence[CompletionGroup]) -> None:
        self._groups = groups

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> CompletionGroup: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[CompletionGroup]: ...

    def __getitem__(self, index: int | slice) -> CompletionGroup | Sequence[CompletionGroup]:
        if isinstance(index, slice):
            return _OwnGroups(self._groups[index])
        group = self._groups[index]
        return replace(group, prompt=deep_copy(group.prompt))


def shows_plan(callback: RunCallback) -> bool:
    """Whether a callback does something with the plan."""
    return type(callback).on_plan is not RunCallback.on_plan


def shows_groups(callback: TrainerCallback | type[TrainerCallback]) -> bool:
    """Whether a callback (or a class of one, as Trainer takes it) does something with a round's
    groups.
    """
    kind = callback if isinstance(callback, type) else type(callback)
    return issubclass(kind, RunCallback) and kind.on_round_made is not RunCallback.on_round_made
