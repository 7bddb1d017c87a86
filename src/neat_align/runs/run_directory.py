"""A run's directory as the one process that writes it sees it: opening, resuming, checkpoints.

A checkpoint is synced and marked before anybody is told of it; older ones are deleted only after
that; resuming takes the newest complete one by its path; and nothing goes on when the run was
started with other settings.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from neat_align.config import NEATConfig
from neat_align.config.sharding import Sharding
from neat_align.errors import ConfigError, SaveError
from neat_align.files.atomic import cut_to, read_json, size_of
from neat_align.prompts.skipped_rows import SKIPPED_FILE
from neat_align.rounds.round_files import set_aside_round
from neat_align.runs.checkpoints import (
    checkpoint_to_resume,
    damage_of,
    is_complete,
    mark_complete,
    rotate,
    step_of,
    unmark,
)
from neat_align.runs.launch import LAUNCH_FILE
from neat_align.runs.leftovers import remove_leftovers
from neat_align.runs.lock import LOCK_FILE, one_writer
from neat_align.runs.ranks import Ranks
from neat_align.runs.record import record_changes, update_run_record, write_run_record
from neat_align.runs.resume_state import (
    RANK_ZERO_FILE,
    ResumeState,
    read_resume_state,
    write_resume_state,
)
from neat_align.runs.run_key import check_same_run, new_split, write_key


@dataclass(frozen=True)
class RunStart:
    """Where a run goes on from: a checkpoint (None: its first step). Whether settings changed."""

    checkpoint: Path | None
    settings_changed: bool

    def resume_state(self, rank: int, processes: int) -> ResumeState | None:
        """What the checkpoint says that Trainer does not restore, for one rank of so many."""
        if self.checkpoint is None:
            return None
        return read_resume_state(self.checkpoint, rank, processes)


class RunDirectory:
    """The directory of one run.

    Args:
        args: the configuration; `output_dir` is the directory.
        ranks: the run's processes. Methods are called on all of them unless they say otherwise.
        steps_per_round: gives the optimizer steps in a round.
        on_open: called on all ranks each time the run was begun or taken up, with the optimizer
            steps that are done.
    """

    def __init__(
        self,
        args: NEATConfig,
        ranks: Ranks,
        *,
        steps_per_round: Callable[[], int],
        on_open: Callable[[int], None] = lambda done_steps: None,
    ) -> None:
        self.path = Path(str(args.output_dir))
        self.args = args
        self.ranks = ranks
        self.steps_per_round = steps_per_round
        self._on_open = on_open
        # Checkpoints that are kept while training; `own_limits` says why Trainer is not told.
        self._save_total_limit = args.save_total_limit
        self._start: RunStart | None = None
        self._is_writer = False
        self._lock_was_there = False

    @property
    def metrics_file(self) -> Path:
        """Everything that was logged, a JSON object a line."""
        return self.path / "metrics.jsonl"

    def round_folder(self, index: int) -> Path:
        """Where a round lives; rounds count from 0."""
        return self.path / "rounds" / f"{index:05d}"

    def checkpoint_folder(self, step: int) -> Path:
        """Where the checkpoint of an optimizer step lives."""
        return self.path / f"checkpoint-{step}"

    def has_complete_checkpoint(self, step: int) -> bool:
        """Whether that step's checkpoint can be resumed from. (Any rank may ask alone.)"""
        return is_complete(self.checkpoint_folder(step))

    # ---- opening ----

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only run that writes here; inside of another such block, do nothing.

        Raises ConfigError when another process is writing here.
        """
        if self._is_writer:
            yield
            return
        with contextlib.ExitStack() as held:
            self._lock_was_there = (self.path / LOCK_FILE).exists()
            self.ranks.run_on_rank_zero(
                lambda: held.enter_context(one_writer(self.path)),
                "while it asked for the run directory",
            )
            self._is_writer = True
            try:
                yield
            finally:
                self._is_writer = False

    def open(self, resume: str | bool | None, run_key: Callable[[], Mapping[str, Any]]) -> None:
        """Begin the run or take it up: refuse what cannot go on, set aside what was interrupted.

        `run_key` gives what the run may not change. Raises ConfigError when the directory holds a
        run and `resume` is not set, or none and it is, when settings changed (unless
        `allow_changes`), and when there is no complete checkpoint to go on from.
        """
        opened: list[Any] = [None]

        def open_on_rank_zero() -> None:
            opened[0] = self._open(resume, dict(run_key()))

        self.ranks.run_on_rank_zero(open_on_rank_zero, "while it opened the run")
        start: RunStart = self.ranks.from_rank_zero(opened[0])
        self._start = start
        self._on_open(step_of(start.checkpoint))

    def take_start(
        self, resume: str | bool | None, run_key: Callable[[], Mapping[str, Any]]
    ) -> RunStart:
        """Where training begins; opens the run unless that is done already."""
        if self._start is None:
            self.open(resume, run_key)
        start, self._start = self._start, None
        assert start is not None
        return start

    def _open(self, resume: str | bool | None, key: dict[str, Any]) -> RunStart:
        has_key = (self.path / "run-key.json").is_file()
        self._check_may_open(resume, has_key=has_key)
        split = new_split(self.path, key)
        changes = []
        if split is None:
            changes = check_same_run(self.path, key, allow_changes=self.args.allow_changes)
        checkpoint = self._checkpoint(resume)
        step = step_of(checkpoint)
        if split is not None and step % self.steps_per_round():
            changes = [self._split_in_a_round(split, step)]
        kept_bytes = self._metrics_bytes(checkpoint, has_key=has_key)
        cut_to(self.metrics_file, kept_bytes)
        if changes:
            self._set_aside_rounds_after(step)
        if changes or split is not None:
            record_changes(self.path, self.args, step, changes or [str(split)])
        write_key(self.path, key)
        return RunStart(checkpoint, bool(changes))

    def _split_in_a_round(self, split: str, step: int) -> str:
        """The change, where `allow_changes` allows it. Raises ConfigError."""
        if self.args.allow_changes:
            return split
        last = step - step % self.steps_per_round()
        raise ConfigError(
            f"{split}, and checkpoint-{step} is in the middle of a round of "
            f"{self.steps_per_round()} steps: the number of processes may change between rounds. "
            f"Go on with as many as before, or from the end of the round before "
            f"(resume_from_checkpoint: {self.checkpoint_folder(last)}, where it was kept)"
        )

    def _check_may_open(self, resume: str | bool | None, *, has_key: bool) -> None:
        if not resume:  # what it was to be may have been another run
            remove_leftovers(self.path, keep=(LOCK_FILE, LAUNCH_FILE, SKIPPED_FILE))
        started = any((self.path / name).exists() for name in ("rounds", "run.json"))
        if not resume and started:
            raise ConfigError(
                f"{self.path} already holds a run: pass resume_from_checkpoint=True to go on with "
                "it, or another output_dir"
            )
        if not resume:  # of a run that never began, beside somebody's own files
            (self.path / "run-key.json").unlink(missing_ok=True)
        # Killed before its first step, a run has its key, or only its lock.
        if resume is True and not (started or has_key or self._lock_was_there):
            (self.path / LOCK_FILE).unlink()  # or the next attempt would take this one for a run
            raise ConfigError(
                f"{self.path} holds no run to resume: leave resume_from_checkpoint out to start one"
            )

    def _checkpoint(self, resume: str | bool | None) -> Path | None:
        if not isinstance(resume, str):
            return checkpoint_to_resume(self.path) if resume else None
        damage = damage_of(Path(resume))
        if damage is not None:
            raise ConfigError(
                f"{resume} cannot be resumed from: {damage}. resume_from_checkpoint=True takes the "
                "newest complete one"
            )
        return Path(resume)

    def _metrics_bytes(self, checkpoint: Path | None, *, has_key: bool) -> int:
        """How much of metrics.jsonl was written before the place that the run goes on from."""
        everything = size_of(self.metrics_file)
        if checkpoint is not None:
            state = read_resume_state(checkpoint, 0, self.args.world_size)
            is_own = checkpoint.parent.resolve() == self.path.resolve()
            if not is_own or state is None or state.metrics_bytes is None:
                return everything
            return state.metrics_bytes
        if (self.path / "run.json").is_file():
            return int(read_json(self.path / "run.json").get("metrics_bytes", everything))
        # Before training there is only the first evaluation, whose file is written after its line.
        evaluated = (self.path / "evaluation-before.json").is_file()
        return everything if evaluated or not has_key else 0

    def _set_aside_rounds_after(self, step: int) -> None:
        """Rounds that begin after the step were sampled by a policy that this run will not have."""
        first = -(-step // self.steps_per_round())
        for folder in sorted((self.path / "rounds").glob("[0-9]*")):
            if folder.name.isdigit() and int(folder.name) >= first:
                set_aside_round(folder, "it was sampled by another policy")

    def record_start(self, reward_names: Sequence[str], data: Mapping[str, Any]) -> None:
        """Write run.json, unless an earlier start of the run has.

        `data` is what it says about the data, and about the plan, which is kept up to date.
        """
        if not self.ranks.is_rank_zero:
            return
        if (self.path / "run.json").is_file():
            update_run_record(self.path, data)
        else:
            size = size_of(self.metrics_file)
            write_run_record(self.path, self.args, reward_names, data, size)

    @contextlib.contextmanager
    def own_limits(self, start: RunStart, *, has_stopped: bool, rounds: int) -> Iterator[None]:
        """Keep from Trainer what is done here while it trains.

        That is deleting checkpoints (Trainer would before the new one is marked), the number of
        `rounds` where `data_passes` sets it, and ending a run at once that had stopped by itself.
        """
        a = self.args
        before = a.save_total_limit, a.num_train_epochs, a.max_steps
        self._save_total_limit = a.save_total_limit
        a.save_total_limit = None
        if a.data_passes is not None:
            a.num_train_epochs = rounds
        if has_stopped:
            rounds = -(-step_of(start.checkpoint) // self.steps_per_round())
            a.num_train_epochs, a.max_steps = rounds, -1
        try:
            yield
        finally:
            a.save_total_limit, a.num_train_epochs, a.max_steps = before

    # ---- checkpoints ----

    def save_checkpoint(
        self,
        step: int,
        write: Callable[[], None],
        state: Callable[[], ResumeState],
        *,
        required: Sequence[str],
        best: str | None,
    ) -> None:
        """A checkpoint of `step`, then its marker; older ones are deleted only after that.

        `write` writes Trainer's files, and `required` names those without which the checkpoint is
        not one. `best` is the checkpoint that deletion spares. Raises SaveError, and leaves none
        of the checkpoint, when it could not be written whole.
        """
        folder = self.checkpoint_folder(step)

        def save() -> None:
            if self.ranks.is_rank_zero and folder.exists():
                unmark(folder)
            write()
            write_resume_state(folder, self.args.process_index, state())

        def finish() -> None:
            names = [*required, RANK_ZERO_FILE]
            mark_complete(folder, required=names, resumable=not self.args.save_only_model)
            rotate(self.path, self._save_total_limit, keep=best)

        try:
            self.ranks.run_on_all_ranks(save, f"while it saved {folder.name}")
            self.ranks.run_on_rank_zero(finish, f"while it finished {folder.name}")
        # A full disk is an OSError to Python, a RuntimeError to torch.save, and its own error to
        # safetensors.
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.ranks.is_rank_zero:
                shutil.rmtree(folder, ignore_errors=True)
            raise SaveError(
                f"{folder} could not be written ({type(error).__name__}: {error}). What there was "
                "of it is deleted, older checkpoints are untouched: make room, and go on with "
                "--resume true (resume_from_checkpoint=True)"
            ) from error


def required_files(args: NEATConfig, sharding: Sharding) -> tuple[str, ...]:
    """Trainer's files without which a checkpoint cannot be resumed from exactly, as glob patterns.

    Weights and optimizer states that processes divide are saved in their framework's own form:
    FSDP2's are gathered into one file each, ZeRO's are a file a process.
    """
    if args.save_only_model:
        return ("trainer_state.json",)
    ranks = range(args.world_size)
    random_states = [f"rng_state_{rank}.pth" for rank in ranks]
    if args.world_size == 1:
        random_states = ["rng_state.pth"]
    return (*_TRAINED_STATE[sharding](ranks), *random_states, "trainer_state.json")


def _zero_files(ranks: Iterable[int]) -> list[str]:
    parts = [f"global_step*/*zero_pp_rank_{rank}_mp_rank_*_optim_states.pt" for rank in ranks]
    return ["latest", "scheduler.pt", "global_step*/*_model_states.pt", *parts]


def _zero_3_files(ranks: Iterable[int]) -> list[str]:
    weights = [f"global_step*/*zero_pp_rank_{rank}_mp_rank_*_model_states.pt" for rank in ranks]
    return [*_zero_files(ranks), *weights]


# What Trainer writes of weights, optimizer and schedule, beside the model that can be loaded.
_TRAINED_STATE: Mapping[Sharding, Callable[[Iterable[int]], Sequence[str]]] = {
    "none": lambda _: ["optimizer.pt", "scheduler.pt"],
    "fsdp2": lambda _: ["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt"],
    "zero0": lambda _: ["latest", "global_step*/*_model_states.pt"],
    "zero1": _zero_files,
    "zero2": _zero_files,
    "zero3": _zero_3_files,
}
