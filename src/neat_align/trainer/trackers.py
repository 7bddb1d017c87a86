"""What trackers get beyond numbers: a table of every round's groups, and the report at the end.

transformers' own callbacks log the numbers to whatever `report_to` names. Here are four trackers
that can show more, each in its own way. Completions hold negatives, text that was written to be
harmful, and a tracker may be on another machine: they are sent with `log_completions` only.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import default_logdir

from neat_align.config import NEATConfig
from neat_align.errors import one_line
from neat_align.reporting.tracker_tables import markdown_table, table_rows
from neat_align.rounds.completions import CompletionGroup
from neat_align.runs.events import RunCallback

logger = logging.getLogger(__name__)
Rows = Sequence[dict[str, Any]]
# What the tables and the report are called in all of them.
COMPLETIONS, REPORT = "completions", "report"


def shows_tables(args: NEATConfig) -> bool:
    """Whether `report_to` names a tracker that is given tables of groups."""
    return any(name in _TRACKERS for name in args.report_to or ())


class TrackerCallback(RunCallback):
    """Gives the trackers of a run its groups and its report, where `log_completions` asks for it.

    `reward_names` are those of `CompletionGroup`'s components; `callbacks` gives the trainer's. A
    tracker that fails says so each time, and is asked again: the run goes on.
    """

    def __init__(
        self,
        args: NEATConfig,
        reward_names: Sequence[str],
        callbacks: Callable[[], Sequence[TrainerCallback]],
    ) -> None:
        names = [name for name in args.report_to or () if name in _TRACKERS]
        self._trackers = {name: _TRACKERS[name](callbacks) for name in names}
        self._sends_text = args.log_completions
        self._reward_names = tuple(reward_names)
        self._step = 0
        for name, tracker in self._trackers.items():
            with self._guarded(name):
                tracker.prepare(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trackers' own callbacks have begun their runs."""
        if state.is_world_process_zero:
            for name, tracker in self._trackers.items():
                with self._guarded(name):
                    tracker.begin(args)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A round begins after this step."""
        self._step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the run is."""
        self._step = state.global_step

    def on_round_made(self, round_index: int, groups: Sequence[CompletionGroup]) -> None:
        """A round's groups, as a table; on the first process."""
        if not self._sends_text or not self._trackers:
            return
        rows = table_rows(groups, round_index, self._reward_names)
        for name, tracker in self._trackers.items():
            with self._guarded(name):
                tracker.table(rows, round_index, self._step)

    @contextlib.contextmanager
    def after_training(self, report: Path) -> Iterator[None]:
        """What is logged within goes to the run that was trained, which its tracker has ended; at
        the end the report goes there, if it was written.
        """
        for name, tracker in self._trackers.items():
            with self._guarded(name):
                tracker.reopen()
        try:
            yield
            for name, tracker in self._trackers.items():
                if self._sends_text and report.is_file():
                    with self._guarded(name):
                        tracker.report(report)
        finally:
            for name, tracker in self._trackers.items():
                with self._guarded(name):
                    tracker.close()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - no tracker may end a run of days
            logger.warning(
                "%s does not take the completions or the report (%s); the run goes on without, and "
                "rounds/ and report.html have them",
                name,
                one_line(error, 200) or type(error).__name__,
            )


@contextlib.contextmanager
def after_training(trainer: Any) -> Iterator[None]:
    """`TrackerCallback.after_training` of a NEATTrainer that has one; on the first process."""
    callbacks = trainer.callback_handler.callbacks if trainer.is_world_process_zero() else ()
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, TrackerCallback):
                stack.enter_context(callback.after_training(trainer.output_dir / "report.html"))
        yield


class _Tracker:
    """One tracker; each method does nothing by default."""

    def __init__(self, callbacks: Callable[[], Sequence[TrainerCallback]]) -> None:
        self._callbacks = callbacks

    def prepare(self, args: Any) -> None:
        """Nothing has been logged yet."""

    def begin(self, args: Any) -> None:
        """The run has begun there."""

    def table(self, rows: Rows, round_index: int, step: int) -> None:
        """A round's groups."""

    def reopen(self) -> None:
        """Training is over, and with it the run there; more is to come."""

    def report(self, path: Path) -> None:
        """The report, once the run is open again."""

    def close(self) -> None:
        """Nothing more is to come."""


class _TensorBoard(_Tracker):
    """Tables as text; it keeps no files."""

    def prepare(self, args: Any) -> None:
        """Its callback looks for its folder when training begins, and takes `runs/` of the current
        folder for what is logged before that, such as the first evaluation.
        """
        for callback in self._of_transformers():
            if callback.logging_dir is None:
                callback.logging_dir = str(Path(args.output_dir) / default_logdir())

    def _of_transformers(self) -> list[TensorBoardCallback]:
        return [c for c in self._callbacks() if isinstance(c, TensorBoardCallback)]

    def table(self, rows: Rows, round_index: int, step: int) -> None:
        for callback in self._of_transformers():
            writer: Any = callback.tb_writer
            if writer is not None:
                writer.add_text(COMPLETIONS, markdown_table(rows), step)
                writer.flush()


class _WandB(_Tracker):
    """Its run stays open until the process ends."""

    def table(self, rows: Rows, round_index: int, step: int) -> None:
        import wandb

        columns = list(rows[0]) if rows else ["round"]
        data = [[row.get(name) for name in columns] for row in rows]
        shown: Any = wandb.Table(columns=columns, data=data)
        wandb.log({COMPLETIONS: shown, "train/global_step": step})

    def report(self, path: Path) -> None:
        import wandb

        assert wandb.run is not None
        artifact = wandb.Artifact(f"{REPORT}-{wandb.run.id}", type=REPORT)
        artifact.add_file(str(path))
        wandb.run.log_artifact(artifact)


class _Trackio(_Tracker):
    """A run is found again by its name."""

    _args: Any = None

    def begin(self, args: Any) -> None:
        import trackio

        self._args = args
        run = trackio.context_vars.current_run.get()
        if args.run_name is None and run is not None:
            args.run_name = run.name  # transformers' callback opens it again by that

    def table(self, rows: Rows, round_index: int, step: int) -> None:
        import trackio

        trackio.log({COMPLETIONS: trackio.Table(data=list(rows)), "train/global_step": step})

    def report(self, path: Path) -> None:
        import trackio

        if trackio.context_vars.current_run.get() is None:  # nothing was logged after training
            args = self._args
            trackio.init(
                project=args.project,
                name=args.run_name,
                space_id=args.trackio_space_id,
                bucket_id=args.trackio_bucket_id,
                private=args.hub_private_repo,
                resume="allow",
            )
        trackio.log_artifact(path, type=REPORT)

    def close(self) -> None:
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            trackio.finish()


class _MLflow(_Tracker):
    """A run is found again by its id."""

    _run_id: str | None = None

    def begin(self, args: Any) -> None:
        import mlflow

        active = mlflow.active_run()
        self._run_id = None if active is None else active.info.run_id

    def table(self, rows: Rows, round_index: int, step: int) -> None:
        import mlflow

        columns = list(rows[0]) if rows else []
        data = {name: [row.get(name) for row in rows] for name in columns}
        mlflow.log_table(data, f"{COMPLETIONS}/round-{round_index:05d}.json")

    def reopen(self) -> None:
        import mlflow

        if self._run_id is not None and mlflow.active_run() is None:
            mlflow.start_run(run_id=self._run_id)

    def report(self, path: Path) -> None:
        import mlflow

        mlflow.log_artifact(str(path), run_id=self._run_id)

    def close(self) -> None:
        import mlflow

        active = mlflow.active_run()
        if active is not None and active.info.run_id == self._run_id:
            mlflow.end_run()


_TRACKERS: Mapping[str, type[_Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
    "mlflow": _MLflow,
}
