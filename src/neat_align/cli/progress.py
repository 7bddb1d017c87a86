"""What a person sees of a run in a terminal: its plan, how far it is, a line a round, and answers
where they are asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from transformers import TrainerCallback

from neat_align.cli.display import RunDisplay
from neat_align.reporting.group_counts import reward_names
from neat_align.reporting.terminal import render_group
from neat_align.rounds.completions import CompletionGroup
from neat_align.runs.events import WHOLE_DATA, RunCallback
from neat_align.runs.plan import RunPlan

if TYPE_CHECKING:
    from neat_align.config import NEATConfig

# Groups that `log_completions` prints every round.
SHOWN_GROUPS = 2


def terminal_callbacks(args: NEATConfig) -> list[TrainerCallback]:
    """The callbacks that show a run in a terminal, as its arguments ask for.

    What the run will do, how far it is unless `disable_tqdm`, and a few groups of every round with
    `log_completions`: `NEATTrainer(…, callbacks=terminal_callbacks(args))`. Of several
    processes only the first shows anything.
    """
    if args.process_index > 0:
        return []
    shown: list[TrainerCallback] = [PrintPlan()]
    if not args.disable_tqdm:
        shown.append(RunDisplay(first_groups=not args.log_completions))
    if args.log_completions:
        shown.append(PrintGroups())
    return shown


class PrintPlan(RunCallback):
    """Prints what the run will do, and with what share of its data, before it begins.

    Of several runs that are planned alike, one callback prints the first's plan only.
    """

    def __init__(self) -> None:
        self._printed = False

    def on_plan(self, plan: RunPlan, done_steps: int) -> None:
        """The run begins, or goes on after so many steps."""
        if not self._printed:
            print("\n".join(plan.lines(more=WHOLE_DATA, done_steps=done_steps)), flush=True)

    def on_outlook(self, measure: Callable[[], list[str]]) -> None:
        """What the run takes of memory and time."""
        if not self._printed:
            print("\n".join(measure()), flush=True)
        self._printed = True


class PrintGroups(RunCallback):
    """Prints a few groups of every round (`log_completions`)."""

    def on_round_made(self, round_index: int, groups: Sequence[CompletionGroup]) -> None:
        """A round is ready."""
        for number, group in enumerate(groups[:SHOWN_GROUPS], start=1):
            names = reward_names(groups)
            Console().print(render_group(group, number, len(groups), reward_names=names))


@contextlib.contextmanager
def stage_display(title: str, disable: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Shows work without a trainer, reported to by (stage, finished, of how many)."""
    display = RunDisplay()
    try:
        yield lambda *at: None if disable else display.on_stage(title, *at)
    finally:
        display.on_stages_end(title)
