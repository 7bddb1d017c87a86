"""Every private name of `transformers.Trainer` that this package uses, and nothing else.

transformers may change any of them without notice, so each stands here with why there is no
public way, and `tests/runs/test_trainer_internals.py` fails by name when one changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer

# Attributes that Trainer's loop keeps and its checkpoints leave out: without them a resumed run
# would log other losses than an uninterrupted one.
ATTRIBUTES = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
# Methods that `NEATTrainer` overrides, with their parameters. A checkpoint has to be marked after
# it is written and before anybody is told of it, and Trainer has no event between the two.
METHODS = {"_save_checkpoint": ("self", "model", "trial")}


@dataclass(frozen=True)
class RunningLoss:
    """Trainer's sums of the loss.

    `since_log` is the sum since the last log line, which was written at step `logged_step`; `total`
    is the sum up to there.
    """

    since_log: float
    total: float
    logged_step: int


def running_loss(trainer: Trainer) -> RunningLoss:
    """The sums of a trainer whose loop has begun."""
    t: Any = trainer
    return RunningLoss(float(t._tr_loss), float(t._total_loss_scalar), t._globalstep_last_logged)


def logged_step(trainer: Trainer) -> int:
    """The step of the last log line of a trainer whose loop has begun; −1 before that."""
    return int(vars(trainer).get("_globalstep_last_logged", -1))


def restore_running_loss(trainer: Trainer, loss: RunningLoss) -> None:
    """Put the sums back, once a resumed trainer's loop has begun."""
    t: Any = trainer
    t._tr_loss = torch.tensor(loss.since_log, device=trainer.args.device)
    t._total_loss_scalar = loss.total
    t._globalstep_last_logged = loss.logged_step
