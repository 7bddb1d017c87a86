"""What a person sees while a run works: bars for stages and steps, and one short line a round
instead of every metric.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

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

    What the run will do, bars for stages and steps unless `disable_tqdm`, and a few groups of every
    round with `log_completions`: `NEATTrainer(…, callbacks=terminal_callbacks(args))`. Of several
    processes only the first shows anything.
    """
    if args.process_index > 0:
        return []
    shown: list[TrainerCallback] = [PrintPlan()]
    if not args.disable_tqdm:
        shown += [StageBars(), RoundProgressCallback()]
    if args.log_completions:
        shown.append(PrintGroups())
    return shown


class StageBars(RunCallback):
    """A tqdm bar for every stage of a round or an evaluation."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def on_stage(self, title: str, stage: str, finished: int, total: int) -> None:
        """Move the stage's bar."""
        bar = self._bars.get(stage)
        if bar is None or bar.total != total:
            if bar is not None:
                bar.close()
            label = f"{title}: {stage}"
            bar = tqdm(total=total, desc=label, leave=False, dynamic_ncols=True)
            self._bars[stage] = bar
        bar.update(finished - bar.n)

    def on_stages_end(self, title: str) -> None:
        """Take the bars away."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()


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
        self._printed = True


class PrintGroups(RunCallback):
    """Prints a few groups of every round (`log_completions`)."""

    def on_round_made(self, round_index: int, groups: Sequence[CompletionGroup]) -> None:
        """A round is ready."""
        for number, group in enumerate(groups[:SHOWN_GROUPS], start=1):
            names = reward_names(groups)
            Console().print(render_group(group, number, len(groups), reward_names=names))


@contextlib.contextmanager
def stage_bars(title: str, disable: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Bars for work without a trainer, reported to by (stage, finished, of how many)."""
    bars = StageBars()
    try:
        yield lambda *at: None if disable else bars.on_stage(title, *at)
    finally:
        bars.on_stages_end(title)


class RoundProgressCallback(ProgressCallback):
    """Trainer's bar, with the numbers that matter beside it; everything else goes to
    metrics.jsonl.
    """

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Steps update the bar; rounds, evaluations and drift write a line above it."""
        bar: Any = self.training_bar
        if not state.is_world_process_zero or bar is None or not logs:
            return
        if "loss" in logs:
            shown = {"loss": logs["loss"], "accuracy": logs.get("ranking/accuracy")}
            bar.set_postfix({k: f"{v:.2f}" for k, v in shown.items() if v is not None})
        elif line := summary_line(logs):
            bar.write(line)


# What a line shows of a log, and the word for it.
_ROUND = {
    "reward/positive": "reward +",
    "reward/plain": "plain",
    "reward/negative": "reward −",
    "contrast/inversion_rate": "inverted",
}
_DRIFT = {"drift/kl": "KL", "drift/distinct2": "distinct-2", "drift/mean_length": "length"}
# After `eval_`, `before_` or `after_`.
_HELD_OUT = {
    "reward": "reward",
    "kl": "KL",
    "distinct2": "distinct-2",
    "perplexity": "perplexity",
}


def summary_line(logs: dict[str, Any]) -> str:
    """One line, at most 80 columns, for a round, a drift check or an evaluation; '' for any other
    log.
    """
    if "round" in logs:
        parts, words = [f"round {int(logs['round']) + 1}"], _ROUND
    elif "drift/kl" in logs:
        parts, words = ["  drift"], _DRIFT
    elif any(k.startswith(("eval_", "before_", "after_")) for k in logs):
        parts = ["  held out"]
        words = {k: _HELD_OUT.get(k.split("_", 1)[-1], "") for k in logs}
    else:
        return ""
    parts += [f"{word} {logs[k]:.3g}" for k, word in words.items() if word and k in logs]
    return "  ".join(parts)
