"""A Trainer that survives: one writer a run, complete checkpoints, exact resume, and an orderly end
on a signal.

What it changes of `transformers.Trainer`: a checkpoint is synced and marked before anybody is told
of it; older ones are deleted only after that; resuming takes the newest complete one by its path,
and goes on with what Trainer leaves out (`bookmark`); and nothing goes on when the run was started
with other settings.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError, NEATError, RunInterrupted, SaveError
from neat_align.files.atomic import cut_to, read_json, size_of
from neat_align.learning.alarms import Alarms
from neat_align.prompts.rows import PromptRow
from neat_align.rewards.protocol import NamedReward
from neat_align.rounds.round_files import set_aside_round
from neat_align.runs.checkpoints import (
    checkpoint_to_resume,
    damage_of,
    mark_complete,
    rotate,
    unmark,
)
from neat_align.runs.lock import LOCK_FILE, one_writer
from neat_align.runs.record import record_changes, write_run_record
from neat_align.runs.resume_state import ResumeState, read_resume_state, write_resume_state
from neat_align.runs.run_key import check_same_run, keep_key
from neat_align.runs.signals import StopRequest, interrupted, listening

# What a process says when it failed; above every signal's number, so that it is what all processes
# hear.
FAILED = 255


class DurableTrainer(Trainer):
    """The part of `NEATTrainer` that keeps a run on the disk.

    `start_run_state` comes before Trainer's own constructor.
    """

    args: NEATConfig
    rows: list[PromptRow]
    rewards: tuple[NamedReward, ...]

    def start_run_state(self, args: NEATConfig) -> None:
        """Attributes that callbacks may ask for as soon as Trainer's constructor runs."""
        self.stop = StopRequest()
        self.alarms = Alarms(args.alarm_logp_drop, args.alarm_ratio)
        self.stopped_because: str | None = None
        self.rounds_ended = 0
        self.logged_step = 0
        self._sums: dict[str, list[float]] = {}
        self._bookmark: ResumeState | None = None
        self._opened: list[Any] | None = None
        self._is_writer = False
        self._lock_was_there = False

    def run_key(self) -> dict[str, Any]:
        """What this run may not change when it goes on."""
        raise NotImplementedError

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps in a round."""
        raise NotImplementedError

    @property
    def output_dir(self) -> Path:
        """The run directory."""
        return Path(str(self.args.output_dir))

    def round_folder(self, index: int) -> Path:
        """Where a round lives."""
        return self.output_dir / "rounds" / f"{index:05d}"

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed hold the weights."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # ---- all processes together ----

    def agree(self, status: int) -> int:
        """The largest of all processes' numbers, 0 to 255. All of them have to call it."""
        if self.args.world_size == 1:
            return status
        return int(
            cast(
                "torch.Tensor",
                self.accelerator.gather(torch.tensor([status], device=self.args.device)),
            ).max()
        )

    def together(self, work: Callable[[], None], what: str) -> int:
        """Run `work` on every process; a failure or signal of one ends all.

        Gives the signal that another was stopped by, or 0.
        """
        status = FAILED
        try:
            work()
            status = 0
        except RunInterrupted as stopped:
            status = stopped.signal_number
            raise
        finally:
            worst = self.agree(status)
        if worst == FAILED:
            raise NEATError(f"another process failed {what}: its own message says why")
        return worst

    def on_main(self, work: Callable[[], None], what: str) -> None:
        """Run `work` on the main process while the others wait; it ends all of them when
        it raises.
        """
        stopped = self.together(work if self.accelerator.is_main_process else _nothing, what)
        if stopped:
            raise interrupted(stopped, what, show=False)

    def leave_if_asked(self, where: str) -> None:
        """Raise RunInterrupted on all processes when one was asked to stop. All of them have to
        call it.
        """
        asked = self.agree(self.stop.signal_number)
        if asked:
            raise interrupted(asked, where, show=bool(self.accelerator.is_main_process))

    def asked_to_stop(self) -> bool:
        """Whether any process was asked to stop. All of them have to call it."""
        return self.agree(self.stop.signal_number) > 0

    # ---- opening a run ----

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only process that writes into the run directory; inside of another such block, do
        nothing.
        """
        if self._is_writer:
            yield
            return
        with contextlib.ExitStack() as held:
            self._lock_was_there = (self.output_dir / LOCK_FILE).exists()
            self.on_main(
                lambda: held.enter_context(one_writer(self.output_dir)),
                "while it asked for the run directory",
            )
            self._is_writer = True
            try:
                yield
            finally:
                self._is_writer = False

    def open_run(self, resume: str | bool | None) -> None:
        """Begin the run in the output directory or take it up: refuse what cannot go on, set aside
        what was interrupted.

        `train` does this itself; call it first (inside of `writing`) to have it done before an
        evaluation is paid for.
        Raises ConfigError when the directory holds a run and `resume` is not set, or none and it
        is, when settings changed (unless `allow_changes`), and when there is no complete checkpoint
        to go on from.
        """
        found: list[Any] = [None, False]

        def take_up() -> None:
            found[:] = self._take_up(resume)

        self.on_main(take_up, "while it opened the run")
        self._opened = broadcast_object_list(found)

    def _take_up(self, resume: str | bool | None) -> tuple[str | None, bool]:
        """(checkpoint to go on from, whether settings changed)."""
        out = self.output_dir
        started = any((out / name).exists() for name in ("rounds", "run.json"))
        if not resume and started:
            raise ConfigError(
                f"{out} already holds a run: pass resume_from_checkpoint=True to go on with it, "
                "or another output_dir"
            )
        # Killed before its first step, a run has its key, or only its lock.
        has_key = (out / "run-key.json").is_file()
        if resume is True and not (started or has_key or self._lock_was_there):
            (out / LOCK_FILE).unlink()  # or the next attempt would take this one for a run
            raise ConfigError(
                f"{out} holds no run to resume: leave resume_from_checkpoint out to start one"
            )
        key = self.run_key()
        changes = check_same_run(out, key, allow_changes=self.args.allow_changes)
        checkpoint: Path | None = None
        if isinstance(resume, str):
            checkpoint = Path(resume)
            why = damage_of(checkpoint)
            if why is not None:
                raise ConfigError(
                    f"{checkpoint} cannot be resumed from: {why}. resume_from_checkpoint=True "
                    "takes the newest complete one"
                )
        elif resume:
            checkpoint = checkpoint_to_resume(out)
        cut_to(out / "metrics.jsonl", self._metrics_bytes(checkpoint, has_key=has_key))
        if changes:
            step = step_of(checkpoint)
            record_changes(out, self.args, step, changes)
            # Rounds that begin after the checkpoint were sampled by a policy that this run will not
            # have.
            later = -(-step // self.steps_per_round)
            for folder in sorted((out / "rounds").glob("[0-9]*")):
                if folder.name.isdigit() and int(folder.name) >= later:
                    set_aside_round(folder, "it was sampled by another policy")
        keep_key(out, key)
        return None if checkpoint is None else str(checkpoint), bool(changes)

    def _metrics_bytes(self, checkpoint: Path | None, *, has_key: bool) -> int:
        """How much of metrics.jsonl was written before the place that the run goes on from."""
        everything = size_of(self.output_dir / "metrics.jsonl")
        if checkpoint is not None:
            kept = read_resume_state(checkpoint, 0)
            if (
                checkpoint.parent.resolve() != self.output_dir.resolve()
                or kept is None
                or kept.metrics_bytes is None
            ):
                return everything
            return kept.metrics_bytes
        if (self.output_dir / "run.json").is_file():
            return int(read_json(self.output_dir / "run.json").get("metrics_bytes", everything))
        # Before training there is only the first evaluation, whose file is written after its line.
        return (
            0
            if has_key and not (self.output_dir / "evaluation-before.json").is_file()
            else everything
        )

    # ---- training ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train for `num_train_epochs` rounds. `resume_from_checkpoint=True` goes on from the
        newest complete checkpoint, or from the first round's finished work when there is none yet:
        same weights, rounds and metrics as without the break.

        On SIGINT or SIGTERM (in the main thread) the step or shard is finished, a complete
        checkpoint is written, and RunInterrupted, a SystemExit with code 128 + signal, is raised; a
        second signal ends the process at once.
        """
        with listening(self.stop), self.writing():
            if self._opened is None:
                self.open_run(resume_from_checkpoint)
            checkpoint, changed = cast("list[Any]", self._opened)
            self._opened = None
            self._bookmark = (
                None
                if checkpoint is None
                else read_resume_state(Path(checkpoint), self.args.process_index)
            )
            self.stopped_because = (
                None if self._bookmark is None or changed else self._bookmark.stopped_because
            )
            if self.accelerator.is_main_process and not (self.output_dir / "run.json").is_file():
                size = size_of(self.output_dir / "metrics.jsonl")
                write_run_record(
                    self.output_dir, self.args, self.rows, [r.name for r in self.rewards], size
                )
            with self._own_limits(None if checkpoint is None else Path(checkpoint)):
                try:
                    output = super().train(checkpoint, trial, ignore_keys_for_eval)
                except RunInterrupted:
                    # Loggers and bars are closed as at any other end.
                    self.callback_handler.on_train_end(self.args, self.state, self.control)
                    self.is_in_train = False
                    raise
            self.leave_if_asked("after training had finished")
            return output

    @contextlib.contextmanager
    def _own_limits(self, checkpoint: Path | None) -> Iterator[None]:
        """Keep from Trainer what is done here: deleting checkpoints (it would before the new one is
        marked), and going on with a run that had stopped by itself.
        """
        a = self.args
        self.save_total_limit, epochs, steps = a.save_total_limit, a.num_train_epochs, a.max_steps
        a.save_total_limit = None
        if self.stopped_because is not None:
            a.num_train_epochs, a.max_steps = -(-step_of(checkpoint) // self.steps_per_round), -1
        try:
            yield
        finally:
            a.save_total_limit, a.num_train_epochs, a.max_steps = (
                self.save_total_limit,
                epochs,
                steps,
            )

    def restore_bookmark(self) -> None:
        """Put back what Trainer left out of its checkpoint, once its loop has begun."""
        self.logged_step = self.state.global_step
        kept = self._bookmark
        if kept is None or self.state.global_step == 0:
            return
        self._tr_loss = torch.tensor(kept.loss_since_log, device=self.args.device)
        self._total_loss_scalar = kept.total_loss
        self._globalstep_last_logged = self.logged_step = kept.logged_step
        self._sums = {name: list(pair) for name, pair in kept.sums.items()}
        self.rounds_ended = kept.rounds_ended
        self.alarms.baselines.update(kept.alarm_baselines)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's checkpoint, then the marker, then older ones are deleted.

        Raises SaveError, and leaves none of it.
        """
        folder = self.output_dir / f"checkpoint-{self.state.global_step}"

        def save() -> None:
            if self.accelerator.is_main_process and folder.exists():
                unmark(folder)
            super(DurableTrainer, self)._save_checkpoint(model, trial)
            write_resume_state(folder, self.args.process_index, self._bookmark_now())

        def finish() -> None:
            mark_complete(
                folder, required=self._required(), resumable=not self.args.save_only_model
            )
            rotate(self.output_dir, self.save_total_limit, keep=self.state.best_model_checkpoint)

        try:
            self.together(save, f"while it saved {folder.name}")
            self.on_main(finish, f"while it finished {folder.name}")
        # A full disk is an OSError to Python, a RuntimeError to torch.save, and its own error to
        # safetensors.
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
            raise SaveError(
                f"{folder} could not be written ({type(error).__name__}: {error}). What there was "
                "of it is deleted, older checkpoints are "
                "untouched: make room, and go on with --resume true (resume_from_checkpoint=True)"
            ) from error

    def _required(self) -> Sequence[str]:
        """Files without which a checkpoint is not one; sharded ones are saved in their framework's
        own form.
        """
        if self.is_sharded or self.args.save_only_model:
            return ("trainer_state.json", "bookmark-0.json")
        random_state = "rng_state.pth" if self.args.world_size == 1 else "rng_state_0.pth"
        return (
            "optimizer.pt",
            "scheduler.pt",
            random_state,
            "trainer_state.json",
            "bookmark-0.json",
        )

    def _bookmark_now(self) -> ResumeState:
        return ResumeState(
            loss_since_log=float(self._tr_loss),
            total_loss=self._total_loss_scalar,
            logged_step=self.logged_step,
            sums=self._sums,
            metrics_bytes=size_of(self.output_dir / "metrics.jsonl"),
            rounds_ended=self.rounds_ended,
            stopped_because=self.stopped_because,
            alarm_baselines=self.alarms.baselines,
        )


class LeaveCallback(TrainerCallback):
    """Ends the run after a checkpoint when it was asked to stop.

    The last callback, so that all others have seen the save.
    """

    def __init__(self, trainer: DurableTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is complete."""
        self.trainer.leave_if_asked(
            f"after step {state.global_step}; checkpoint-{state.global_step} is complete"
        )


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step of a checkpoint, by its name; 0 without one."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _nothing() -> None:
    return None
