"""The trainer's rounds as a data set that is swapped, and their place among Trainer's events."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import TrainerCallback

from neat_align.files.atomic import append_json_line
from neat_align.rounds.completions import CompletionGroup


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

    def check_step(self) -> None:
        """Raise before a loss or gradient that is not finite reaches the weights."""
        ...

    def asked_to_stop(self) -> bool:
        """True when a signal asked for the end."""
        ...

    def at_round_end(self) -> bool:
        """True when the last step was a round's last."""
        ...


class RoundDataset(torch.utils.data.Dataset[CompletionGroup]):
    """A data set of fixed length whose groups are swapped every round.

    A round that holds fewer groups than the length (too few prompts made a pair) is gone through
    again from its start.
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
    """Ties rounds, drift checks, saves and the metrics file to Trainer's events."""

    def __init__(self, trainer: Rounds) -> None:
        self.trainer = trainer
        self.owes_save = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start before the first step."""
        self.trainer.begin_training()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch is a round."""
        self.trainer.begin_round()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save when asked to stop. After a round's last step the save waits for the end of the
        round: a checkpoint must not forget whether drift passed a limit.
        """
        if self.trainer.asked_to_stop():
            control.should_save = True
        if control.should_save and self.trainer.at_round_end():
            control.should_save, self.owes_save = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after this round when a limit was passed."""
        if self.trainer.end_round():
            control.should_training_stop = True
        if self.trainer.asked_to_stop() or self.owes_save:
            control.should_save, self.owes_save = True, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is not finite never reaches the weights."""
        self.trainer.check_step()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Everything that is logged is also a line of metrics.jsonl."""
        if state.is_world_process_zero and logs:
            append_json_line(
                Path(args.output_dir) / "metrics.jsonl", {"step": state.global_step, **logs}
            )
