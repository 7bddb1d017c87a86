"""The trainer's rounds as a data set that is swapped, and their place among Trainer's events."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import TrainerCallback

from neat_align.checkpoints import mark_complete
from neat_align.groups import CompletionGroup
from neat_align.storage import append_json_line


@runtime_checkable
class Rounds(Protocol):
    """What the callback asks of the trainer."""

    def begin_training(self) -> None:
        """Before the first step of this process."""
        ...

    def begin_round(self) -> None:
        """Make this round's groups."""
        ...

    def end_round(self) -> bool:
        """True when training should stop."""
        ...

    def check_gradients(self) -> None:
        """Raise before a gradient that is not finite reaches the weights."""
        ...


class RoundDataset(torch.utils.data.Dataset[CompletionGroup]):
    """A data set of fixed length whose groups are swapped every round.

    A round that holds fewer groups than the length (too few prompts made a pair) is gone through again from its start.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.groups: tuple[CompletionGroup, ...] = ()

    def __len__(self) -> int:
        """Groups per round."""
        return self.length

    def __getitem__(self, index: int) -> CompletionGroup:
        """The group at an index of this round."""
        return self.groups[index % len(self.groups)]


class RoundCallback(TrainerCallback):
    """Ties rounds, drift checks, complete checkpoints and the metrics file to Trainer's events."""

    def __init__(self, trainer: Rounds) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start before the first step."""
        self.trainer.begin_training()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch is a round."""
        self.trainer.begin_round()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after this round when a limit was passed."""
        if self.trainer.end_round():
            control.should_training_stop = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Non-finite gradients never reach the weights."""
        self.trainer.check_gradients()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The marker comes last."""
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Everything that is logged is also a line of metrics.jsonl."""
        if state.is_world_process_zero and logs:
            append_json_line(Path(args.output_dir) / "metrics.jsonl", {"step": state.global_step, **logs})
