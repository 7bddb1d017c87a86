"""What a script gives the trainer, or asks of it, and what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers import ProgressCallback, Trainer

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError
from neat_align.trainer.trackers import TrackerCallback, shows_tables


def as_config(args: Any) -> NEATConfig:
    """The configuration; the defaults when none is given. Raises ConfigError for another class."""
    if args is None:
        return NEATConfig(output_dir="neat-run")
    if not isinstance(args, NEATConfig):
        raise ConfigError(
            f"args is a {type(args).__name__}, and NEATTrainer reads options that it has not: pass "
            "a NEATConfig, which takes all of TrainingArguments' options, too"
        )
    return args


def checked_optimizers(optimizers: tuple[Any, Any], model: torch.nn.Module) -> tuple[Any, Any]:
    """The optimizer and scheduler, if the optimizer holds a weight that is trained.

    With `peft_config` those are made after the optimizer was, and it would step on frozen ones.
    Raises ConfigError.
    """
    optimizer = optimizers[0]
    if optimizer is None:
        return optimizers
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters() if p.requires_grad):
        raise ConfigError(
            "the optimizer that was passed holds none of the model's trainable weights, so nothing "
            "would be learned. With peft_config they are made only now: make the adapter with "
            "get_peft_model before the optimizer and pass that model, or leave optimizers out "
            "(optim and learning_rate choose one)"
        )
    return optimizers


def refuse_ignore_keys(ignore_keys: Any) -> None:
    """Raise ConfigError where an evaluation is asked to leave a model's outputs out."""
    if ignore_keys is not None:
        raise ConfigError("ignore_keys has no meaning: evaluate samples and collects no outputs")


def _not_here(name: str, why: str) -> Callable[..., NoReturn]:
    """A method of Trainer that would do something else than it says: it raises ConfigError."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(f"NEATTrainer.{name} {why}")

    return refuse


refused_predict = _not_here(
    "predict", "has no labels to compare with: use evaluate(eval_dataset), which samples"
)


def settle_callbacks(trainer: Any) -> None:
    """Beside those that were given: one progress bar, and what trackers get beyond numbers."""
    _keep_one_progress_bar(trainer)
    if shows_tables(trainer.args):
        rewards = trainer.parts.scored_by.rewards
        names = [reward.name for reward in rewards]
        trainer.add_callback(
            TrackerCallback(trainer.args, names, lambda: trainer.callback_handler.callbacks)
        )


def _keep_one_progress_bar(trainer: Trainer) -> None:
    """A progress bar that was given stands in the place of Trainer's own."""
    bars = [c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)]
    own = [c for c in bars if type(c) is ProgressCallback]
    if own and len(bars) > len(own):
        trainer.remove_callback(own[0])
