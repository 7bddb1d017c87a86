"""What a script gives the trainer, or asks of it, and what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError


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


def check_optimizer(
    optimizer: torch.optim.Optimizer | None, model: torch.nn.Module, *, new_adapter: bool
) -> None:
    """Refuse an optimizer that holds none of the weights that are trained. Raises ConfigError.

    With `new_adapter` they are made after the optimizer was, and it would step on frozen ones.
    """
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters() if p.requires_grad):
        why = "peft_config makes the trainable weights only now" if new_adapter else "of another?"
        raise ConfigError(
            f"the optimizer that was passed holds none of the model's trainable weights ({why}), "
            "so nothing would be learned: make the adapter with get_peft_model before the "
            "optimizer and pass that model, or leave optimizers out (optim and learning_rate "
            "choose one)"
        )


def _not_here(name: str, why: str) -> Callable[..., NoReturn]:
    """A method of Trainer that would do something else than it says: it raises ConfigError."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(f"NEATTrainer.{name} {why}")

    return refuse


refused_predict = _not_here(
    "predict", "has no labels to compare with: use evaluate(eval_dataset), which samples"
)
refused_push_to_hub = _not_here(
    "push_to_hub",
    "would upload the whole run directory, and rounds/ holds text that was written to be harmful: "
    "use policy.push_to_hub(…) and processing_class.push_to_hub(…)",
)
