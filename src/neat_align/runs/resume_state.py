"""What a run needs to go on exactly and Trainer's checkpoints leave out: sums between two log
lines, the place in metrics.jsonl, why the run stopped, what alarms compare with.

Each rank writes its own `bookmark-RANK.json` into the checkpoint, before the marker. (The file
keeps the name that older versions gave it.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from neat_align.files.atomic import read_json, write_json
from neat_align.runs.trainer_internals import RunningLoss


@dataclass(frozen=True)
class ResumeState:
    """State beside a checkpoint's.

    `loss_since_log` and `total_loss` are Trainer's running sums of the loss, `sums` the training
    metrics' (numerator, denominator) since the last log line, which was written at `logged_step`.
    `metrics_bytes` is the length of metrics.jsonl at the save. `rounds_ended` counts the rounds
    after which drift was measured; `stopped_because` is why training stopped by itself, if it did;
    `alarm_baselines` are the numbers that alarms compare with.
    """

    loss_since_log: float = 0.0
    total_loss: float = 0.0
    logged_step: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    metrics_bytes: int | None = None
    rounds_ended: int = 0
    stopped_because: str | None = None
    alarm_baselines: dict[str, float] = field(default_factory=dict)

    def running_loss(self) -> RunningLoss:
        """Trainer's sums of the loss."""
        return RunningLoss(self.loss_since_log, self.total_loss, self.logged_step)


# The first rank's file: every checkpoint has to have it.
RANK_ZERO_FILE = "bookmark-0.json"


def write_resume_state(checkpoint: Path, rank: int, state: ResumeState) -> None:
    """Write a rank's state into a checkpoint that has no marker yet."""
    write_json(checkpoint / f"bookmark-{rank}.json", asdict(state))


def read_resume_state(checkpoint: Path, rank: int, processes: int) -> ResumeState | None:
    """The state of one rank of so many. None in checkpoints of versions that wrote none.

    Where another number of processes saved, rank 0 goes on with the sums of all of them, the others
    with none, and every rank with the mean of their losses, which is what a log line shows.
    """
    files = [checkpoint / f"bookmark-{i}.json" for i in range(processes + 1)]
    if files[0].is_file() and files[-2].is_file() and not files[-1].is_file():
        return ResumeState(**read_json(files[rank]))
    saved = [ResumeState(**read_json(file)) for file in sorted(checkpoint.glob("bookmark-*.json"))]
    if not saved:
        return None
    first = ResumeState(**read_json(checkpoint / RANK_ZERO_FILE))
    losses = [state.loss_since_log for state in saved]
    return replace(
        first,
        loss_since_log=sum(losses) / len(losses),
        sums=_added(state.sums for state in saved) if rank == 0 else {},
    )


def _added(all_sums: Iterable[dict[str, list[float]]]) -> dict[str, list[float]]:
    total: dict[str, list[float]] = {}
    for sums in all_sums:
        for name, entry in sums.items():
            before = total.get(name, [0.0] * len(entry))
            total[name] = [a + b for a, b in zip(before, entry, strict=True)]
    return total
