"""What a run needs to go on exactly and Trainer's checkpoints leave out: sums between two log
lines, the place in metrics.jsonl, why the run stopped, what alarms compare with.

Each rank writes its own `bookmark-RANK.json` into the checkpoint, before the marker. (The file
keeps the name that older versions gave it.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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


def read_resume_state(checkpoint: Path, rank: int) -> ResumeState | None:
    """A rank's state; rank 0's where it has none of its own (fewer ranks saved).

    None in checkpoints of versions that wrote none.
    """
    for name in (f"bookmark-{rank}.json", RANK_ZERO_FILE):
        if (checkpoint / name).is_file():
            values: dict[str, Any] = read_json(checkpoint / name)
            return ResumeState(**values)
    return None
