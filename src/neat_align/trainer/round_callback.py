"""Rounds among Trainer's events: made before an epoch, checked before a step, measured after it.

All of NEAT's own order of events is here. The trainer is asked for two things only, to log and to
save a checkpoint; everything else is done by its parts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from neat_align.errors import CollapseError, RunInterrupted
from neat_align.files.atomic import append_json_line, size_of
from neat_align.learning.current_round import CurrentRoundDataset
from neat_align.modeling.loading import load_renamed_weights
from neat_align.rounds.round_files import FinishedRound
from neat_align.runs.events import tell_round
from neat_align.runs.ranks import Ranks
from neat_align.runs.resume_state import ResumeState
from neat_align.runs.run_directory import RunStart
from neat_align.runs.trainer_internals import restore_running_loss, running_loss
from neat_align.trainer.parts import TrainerParts
from neat_align.trainer.shared_reference import share_reference

logger = logging.getLogger(__name__)


class RoundCallback(TrainerCallback):
    """Makes one epoch one round.

    `rounds_ended` counts the rounds after which drift was measured; `stopped_because` says why
    training stopped by itself, if it did. `start_from` is set before training begins.
    """

    def __init__(self, trainer: Trainer, current_round: CurrentRoundDataset) -> None:
        self.trainer: Any = trainer  # a NEATTrainer, whose module imports this one
        self.current_round = current_round
        self.rounds_ended = 0
        self.stopped_because: str | None = None
        self._state: ResumeState | None = None
        self._owes_save = False
        self._checkpoint: Path | None = None
        self._before_training: Callable[[], None] | None = None

    @property
    def parts(self) -> TrainerParts:
        """What the trainer is composed of; there once its constructor is done."""
        parts: TrainerParts = self.trainer.parts
        return parts

    def before_training(self, measure: Callable[[], None]) -> None:
        """Call `measure`, which calls the policy as it is before the first step.

        Now; or, where processes are to divide its weights, when `train` has divided them: whole,
        the policy may have no room anywhere.
        """
        if self.parts.divides_weights:
            self._before_training = measure
        else:
            measure()

    # ---- going on exactly ----

    def start_from(self, start: RunStart) -> None:
        """Before training begins: where the run goes on, and what Trainer does not restore there.

        With changed settings, why the run had stopped is no reason any more.
        """
        args = self.trainer.args
        self._state = start.resume_state(args.process_index, args.world_size)
        self._checkpoint = start.checkpoint
        self.stopped_because = None
        if self._state is not None and not start.settings_changed:
            self.stopped_because = self._state.stopped_because

    def resume_state(self) -> ResumeState:
        """The same for the checkpoint that is being written."""
        parts = self.parts
        loss = running_loss(self.trainer)
        return ResumeState(
            loss_since_log=loss.since_log,
            total_loss=loss.total,
            logged_step=loss.logged_step,
            sums=parts.engine.metrics.sums,
            # Rank 0 writes that file, and cuts it again.
            metrics_bytes=size_of(parts.directory.metrics_file)
            if parts.ranks.is_rank_zero
            else None,
            rounds_ended=self.rounds_ended,
            stopped_because=self.stopped_because,
            alarm_baselines=parts.alarms.baselines,
        )

    def _restore(self, state: ResumeState) -> None:
        restore_running_loss(self.trainer, state.running_loss())
        steps = self.trainer.state.global_step - state.logged_step
        self.parts.engine.metrics.go_on(state.sums, steps)
        self.rounds_ended = state.rounds_ended
        self.parts.alarms.baselines.update(state.alarm_baselines)

    def load_best(self) -> None:
        """After training: what Trainer does not find in the best checkpoint by its name."""
        best = self.trainer.state.best_model_checkpoint
        if self.trainer.args.load_best_model_at_end and best is not None:
            self._load_renamed(Path(best))

    def _load_renamed(self, checkpoint: Path) -> None:
        if not self.parts.engine.sharded:
            load_renamed_weights(self.trainer.policy, checkpoint)

    # ---- Trainer's events, in their order ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start before the first step; a resumed run has it on the disk."""
        step = state.global_step
        parts, per_round = self.parts, self.trainer.steps_per_round
        share_reference(parts.ranks.accelerator, parts.setup.reference, parts.setup.model)
        if self._checkpoint is not None:  # Trainer has read it
            self._load_renamed(self._checkpoint)
        if self._before_training is not None:
            self._before_training()
            self._before_training = None
        parts.record_start()
        if step == 0:
            facts = parts.drift.measure_start(write=parts.ranks.is_rank_zero)
            if facts is not None:
                self.trainer.log({f"drift/{k}": v for k, v in facts.items()})
        elif self._state is not None:
            self._restore(self._state)
            if step % per_round == 0 and self.rounds_ended < step // per_round:
                self._end_round(step)  # a callback asked for this checkpoint before the round's end

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make this round's groups and swap them into the training data."""
        step, parts = state.global_step, self.parts
        index, begins = divmod(step, self.trainer.steps_per_round)
        if begins == 0:
            parts.round_maker.set_aside_if_damaged(index)
        made = self._make(index, step)
        if len(made.groups) < len(self.current_round):
            logger.warning(
                "round %d has %d groups to learn from for %d places: it is gone through again "
                "from its start",
                index + 1,
                len(made.groups),
                len(self.current_round),
            )
        self.current_round.groups = made.groups
        if begins == 0:
            self.trainer.log({"round": float(index), **made.metrics})
            if parts.ranks.is_rank_zero:
                tell_round(self.trainer.callback_handler.callbacks, index, made.groups)

    def _make(self, index: int, step: int) -> FinishedRound:
        parts = self.parts
        try:
            parts.ranks.raise_if_stop_requested(f"before round {index + 1}")
            made: FinishedRound = self.trainer.make_round(index)
            parts.ranks.raise_if_stop_requested(f"after round {index + 1} was made")
        except RunInterrupted:
            # The policy that samples, unless it is the start policy, or saved.
            if step and not parts.directory.has_complete_checkpoint(step):
                self.trainer.save_checkpoint_now()
            raise
        return made

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise CollapseError on every rank when one has a loss, log-probability or gradient that
        is not finite: it never reaches the weights.
        """
        parts = self.parts
        named = parts.setup.model.named_parameters()
        here = parts.engine.non_finite(named, state.global_step + 1)
        worst = parts.ranks.max_over_ranks(here.severity)
        if not worst:
            return
        found = parts.ranks.gather(here.messages if here.severity == worst else ())
        everywhere = parts.ranks.from_rank_zero([text for texts in found for text in texts])
        raise CollapseError(
            f"{'; '.join(everywhere)}. No weight was changed by it, and the last checkpoint is "
            "untouched. Look at the learning rate and at the rewards of these prompts"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save when asked to stop.

        After a round's last step the save waits for the end of the round: a checkpoint must not
        forget whether drift passed a limit.
        """
        if self.parts.ranks.stop_requested():
            control.should_save = True
        if control.should_save and state.global_step % self.trainer.steps_per_round == 0:
            control.should_save, self._owes_save = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure drift, and stop after this round when a limit was passed."""
        self._end_round(state.global_step)
        if self.stopped_because is not None:
            control.should_training_stop = True
        if self.parts.ranks.stop_requested() or self._owes_save:
            control.should_save, self._owes_save = True, False

    def _end_round(self, step: int) -> None:
        parts = self.parts
        self.rounds_ended = step // self.trainer.steps_per_round
        drift = parts.drift.measure()
        if drift is None:
            return
        self.trainer.log({f"drift/{k}": v for k, v in drift.facts.items()})
        if parts.ranks.is_rank_zero:
            parts.alarms.drift(drift.facts, drift.start, max(0, self.rounds_ended - 1))
        self.stopped_because = drift.stop_because
        if drift.stop_because is not None:
            logger.warning("stopping after this round: %s", drift.stop_because)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Everything that is logged is also a line of metrics.jsonl."""
        if state.is_world_process_zero and logs:
            append_json_line(self.parts.directory.metrics_file, {"step": state.global_step, **logs})


class StopAfterSaveCallback(TrainerCallback):
    """Ends the run after a checkpoint when it was asked to stop. The last callback of a trainer, so
    that all others have seen the save.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is complete."""
        step = state.global_step
        self.ranks.raise_if_stop_requested(f"after step {step}; checkpoint-{step} is complete")
