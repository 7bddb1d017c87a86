"""One place on the screen for a run that works: what it does now, how fast, and what is left.

Where the output is no terminal (a log file, a scheduler), the same in plain lines, a few a minute.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from transformers import ProgressCallback

from neat_align.cli.run_state import (
    RunState,
    Stage,
    by_reward,
    drawn,
    first_groups,
    plain_line,
    round_number,
)
from neat_align.cli.summary_lines import summary_line
from neat_align.rounds.completions import CompletionGroup
from neat_align.runs.events import RunCallback
from neat_align.runs.plan import RunPlan

# Between two plain lines of one stage, in seconds.
LINE_EVERY = 15.0
REDRAWN_A_SECOND = 4
# Groups of a round among which the best and the worst answer are looked for.
_LOOKED_AT = 8


class RunDisplay(RunCallback, ProgressCallback):
    """Shows a run while it works. It stands in the place of Trainer's own bar.

    `console` None: the terminal, or wherever the output goes. `clock` gives seconds.
    `first_groups`: two groups of the first round that is made are shown in a few lines, so that a
    prompt or an instruction that went wrong is seen before it is learned from.
    """

    def __init__(
        self,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        first_groups: bool = True,
    ) -> None:
        super().__init__()
        self._first_groups = first_groups
        self.state = RunState()
        self._console = console or Console()
        self._clock = clock
        self._live: Live | None = None
        self._last_line = -LINE_EVERY
        self._is_training = False
        # Of what is shown now: a round goes to and fro between sampling and scoring.
        self._stages: dict[str, Stage] = {}

    # ---- what a run tells ----

    def on_plan(self, plan: RunPlan, done_steps: int) -> None:
        """How many rounds and steps there are. The plan itself is printed by another callback."""
        self.state.rounds, self.state.steps = plan.rounds, plan.optimizer_steps

    def on_stage(self, title: str, stage: str, finished: int, total: int) -> None:
        """Move the stage."""
        now, state = self._clock(), self.state
        if state.title != title:
            self._leave(now)
            self._stages.clear()
            self._begin(title, now)
        if state.stage is None or state.stage.name != stage:
            self._leave(now)
            begun = self._stages.setdefault(stage, Stage(stage, now, total, finished, finished))
            begun.since = now
            state.stage = begun
        state.stage.finished, state.stage.total = finished, total
        self._show()

    def _begin(self, title: str, now: float) -> None:
        state = self.state
        state.title = title
        if number := round_number(title):
            if state.round_since is not None:
                state.round_seconds = now - state.round_since
            state.round_since, state.round_index = now, number - 1

    def _leave(self, now: float) -> None:
        """Something else comes: what was shown is said once more where it is over."""
        stage, self.state.stage = self.state.stage, None
        if stage is None:
            return
        stage.pause(now)
        if stage.finished >= stage.total and not self._console.is_terminal:
            self._print(f"{self.state.said(stage)}, {stage.took(now)}")

    def on_tokens(self, tokens: int) -> None:
        """So many more tokens were sampled."""
        if self.state.stage is not None:
            self.state.stage.tokens += tokens

    def on_stages_end(self, title: str) -> None:
        """All stages of `title` are over."""
        self._leave(self._clock())
        self._stages.clear()
        if not self._is_training:
            self._stop()

    def on_round_made(self, round_index: int, groups: Sequence[CompletionGroup]) -> None:
        """Keep the best and the worst answer of the round's first groups."""
        some = list(groups[:_LOOKED_AT])
        scored = [c for group in some for c in group.completions if c.reward is not None]
        self.state.best = max(scored, key=by_reward, default=None)
        self.state.worst = min(scored, key=by_reward, default=None)
        if self._first_groups:
            self._first_groups = False
            lines = first_groups(some[:2], of=len(groups))
            self._print("\n".join(lines))

    # ---- what Trainer tells ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training begins."""
        if state.is_world_process_zero:
            self._is_training = True
            self.state.step, self.state.steps = state.global_step, state.max_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first step of a round begins: the round is made, and is learned from."""
        if not state.is_world_process_zero or self._learns():
            return
        shown = self.state
        of_round = max(1, shown.steps // max(1, shown.rounds))
        index, done = divmod(state.global_step, of_round)
        self._leave(self._clock())
        if round_number(shown.title) != index + 1:  # it was made before a break
            self._begin(f"round {index + 1}", self._clock())
        shown.stage = Stage("learning", self._clock(), of_round, done, done)
        self._show()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is made."""
        shown = self.state
        if not state.is_world_process_zero or shown.stage is None:
            return
        shown.stage.finished += 1
        shown.step = state.global_step
        self._show()
        if shown.stage.finished >= shown.stage.total:
            self._leave(self._clock())

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Nothing: an evaluation tells its stages."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing: an evaluation tells its stages."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Rounds, evaluations and drift are a line each, above what moves."""
        if not state.is_world_process_zero or not logs:
            return
        if line := summary_line(logs):
            self._print(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training is over."""
        self._leave(self._clock())
        self._is_training = False
        self._stop()

    def _learns(self) -> bool:
        return self.state.stage is not None and self.state.stage.name == "learning"

    # ---- drawing ----

    def _show(self) -> None:
        if self._console.is_terminal:
            if self._live is None:
                self._start()
            return
        now = self._clock()
        stage = self.state.stage
        if stage is None or now - self._last_line < LINE_EVERY or stage.finished >= stage.total:
            return
        self._last_line = now
        self._print(plain_line(self.state, stage, now))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _start(self) -> None:
        self._live = Live(
            get_renderable=lambda: drawn(self.state, self._clock()),
            console=self._console,
            refresh_per_second=REDRAWN_A_SECOND,
            transient=True,
        )
        self._live.start()
        # A run that ends by an error tells nobody: the cursor has to come back all the same.
        atexit.register(self._stop)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self._stop)
