"""What Trainer would find out only after the first round: tried once when the trainer is made.

Optimizer, schedule, data loader, compiler and activation checkpointing are built as Trainer will
build them, and thrown away: it builds its own later, from the same random state and the same
weights. Whatever they raise is a ConfigError that names the option.
"""

from __future__ import annotations

import contextlib
import copy
import math
import multiprocessing
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError, NEATError, did_you_mean, one_line
from neat_align.modeling.requirements import is_trained

# Steps of a schedule that are looked at: the first ones, and this many more until the last.
_POINTS = 32


@contextlib.contextmanager
def refused(what: str, advice: str) -> Iterator[None]:
    """Turn whatever the block raises into a ConfigError, "what: the error: advice".

    Memory that runs out is let through: it says nothing about an option.
    """
    try:
        yield
    except (NEATError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # somebody else's package builds it and can raise anything
        said = one_line(error) or type(error).__name__
        raise ConfigError(f"{what}: {said.rstrip('.')}. {advice}") from error


def check_output_dir(args: NEATConfig) -> None:
    """Make the run directory where this process writes it. Raises ConfigError where it cannot."""
    if args.should_save:
        with refused(f"output_dir is {args.output_dir!r}, which cannot be made", "Choose another"):
            Path(args.output_dir or "").mkdir(parents=True, exist_ok=True)


def check_evaluates(
    args: NEATConfig, has_eval_rows: bool, callbacks: Sequence[TrainerCallback | type]
) -> None:
    """Refuse options and callbacks that need evaluations when there will be none."""
    asked = [
        f"{name} is {value}"
        for name, value, is_asked in (
            ("eval_strategy", _word(args.eval_strategy), _word(args.eval_strategy) != "no"),
            ("eval_on_start", "true", args.eval_on_start),
        )
        if is_asked
    ]
    if asked and not has_eval_rows:
        raise ConfigError(
            f"{asked[0]} and there is nothing to evaluate on: pass an eval_dataset with held-out "
            "prompts (holdout or eval_dataset_name on the command line), or leave it out"
        )
    stops_early = any(
        isinstance(c, EarlyStoppingCallback) or c is EarlyStoppingCallback for c in callbacks
    )
    if stops_early and (_word(args.eval_strategy) == "no" or not args.metric_for_best_model):
        raise ConfigError(
            "EarlyStoppingCallback follows a metric of evaluations: set eval_strategy to epoch and "
            "metric_for_best_model to one, such as reward"
        )


def check_followed_metric(args: NEATConfig, names: Collection[str]) -> None:
    """Refuse a `metric_for_best_model` that no evaluation of this run will have.

    `names` are the metrics of an evaluation, without `eval_`.
    """
    given = args.metric_for_best_model
    if given is None or given.removeprefix("eval_") in names:
        return
    meant = did_you_mean(given.removeprefix("eval_"), names)
    raise ConfigError(
        f"metric_for_best_model is {given!r}, which no evaluation of this run measures; "
        f"{meant + ' It' if meant else 'it'} has {', '.join(sorted(names))}"
    )


def rehearse(trainer: Trainer, total_steps: int) -> None:
    """Build what Trainer will train with, and throw it away. Raises ConfigError.

    `total_steps` are the run's optimizer steps. Weights and random states are as before.
    """
    args: Any = trainer.args
    devices = [args.device] if args.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        _check_loader(trainer, args)
        _check_activation_checkpointing(trainer.model, args)
        if args.torch_compile:
            _check_compiler(args)
        if not is_trained(cast("torch.nn.Module", trainer.model)):
            return  # it is evaluated or sampled from
        if not trainer.is_deepspeed_enabled:  # its own configuration may name another optimizer
            rates = _check_optimizer(trainer, args)
            _check_schedule(trainer, args, rates, total_steps)


def _check_loader(trainer: Trainer, args: Any) -> None:
    context = args.dataloader_multiprocessing_context or multiprocessing.get_start_method()
    if args.dataloader_num_workers and context != "fork":
        raise ConfigError(
            f"dataloader_num_workers is {args.dataloader_num_workers} and processes are started by "
            f"{context} here, which cannot hand them a round's groups: set it to 0 (a batch is "
            "read and packed in a few milliseconds, so workers save little)"
        )
    with refused("the dataloader_ options cannot be used together", "Leave them out"):
        trainer.get_train_dataloader()


def _check_activation_checkpointing(model: Any, args: Any) -> None:
    if not args.activation_checkpointing:
        return
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"activation_checkpointing (gradient_checkpointing) is true and {type(model).__name__} "
            "has none: set it to false"
        )
    given = dict(args.activation_checkpointing_kwargs or {})
    what = f"activation_checkpointing_kwargs (gradient_checkpointing_kwargs) is {given}"
    every, offload = given.pop("every_n_layers", 1), given.pop("offload", False)
    if not isinstance(every, int) or every < 1:
        raise ConfigError(f"{what}; every_n_layers must be a whole number of 1 or more")
    if offload and not torch.accelerator.is_available():
        raise ConfigError(f"{what}; offload needs an accelerator to offload from: remove it")
    with refused(f"{what}, which torch.utils.checkpoint does not take", "Correct it"):
        number = torch.ones(1, requires_grad=True)
        checkpoint(torch.exp, number, **{"use_reentrant": False, **given}).backward()


def _check_compiler(args: Any) -> None:
    what = (
        f"torch_compile_backend {args.torch_compile_backend} (torch_compile_mode "
        f"{args.torch_compile_mode}) cannot compile here"
    )
    with refused(what, "Install what it misses, or set torch_compile to false"):
        compiled = torch.compile(
            torch.nn.Linear(2, 2).to(args.device),
            backend=args.torch_compile_backend,
            mode=args.torch_compile_mode,
        )
        compiled(torch.ones(1, 2, device=args.device)).sum().backward()


def _check_optimizer(trainer: Trainer, args: Any) -> list[float]:
    """The learning rates of the optimizer's groups."""
    if trainer.optimizer is not None:  # the user's own
        return [group["lr"] for group in trainer.optimizer.param_groups]
    what = f"optim is {_word(args.optim)}"
    if args.optim_args:
        what += f" and optim_args {args.optim_args!r}"
    advice = (
        "Install the package that it needs, correct the options that begin with optim or adam, or "
        "use another optim, such as adamw_torch"
    )
    with refused(f"{what}, which cannot be built", advice):
        _check_optim_args(trainer, args)
        try:
            groups = trainer.create_optimizer().param_groups
        finally:
            trainer.optimizer = None
    return [group["lr"] for group in groups]


def _check_optim_args(trainer: Trainer, args: Any) -> None:
    """Refuse a name in `optim_args` that the optimizer does not read: transformers would ignore it.

    Told by building the optimizer's arguments with another value under the name, and without it.
    """
    pairs = dict(
        pair.split("=") for pair in (args.optim_args or "").replace(" ", "").split(",") if pair
    )
    for name, value in pairs.items():
        others = [{**pairs, name: v} for v in _other_values(value)]
        others.append({k: v for k, v in pairs.items() if k != name})
        built = [_optimizer_arguments(trainer, args, p) for p in (pairs, *others)]
        if len(set(built)) == 1:
            raise ConfigError(
                f"optim_args has {name}, which optim {_word(args.optim)} does not read (weight "
                "decay and Adam's own numbers are options of their own): remove it"
            )


def _other_values(value: str) -> list[str]:
    try:
        return [str(int(value) + 1)]
    except ValueError:
        pass
    try:
        return [str(float(value) / 2 + 0.25)]
    except ValueError:
        return ["false" if value.lower() in ("true", "1", "yes") else "true"]


def _optimizer_arguments(trainer: Trainer, args: Any, optim_args: dict[str, str]) -> str:
    changed = copy.copy(args)
    changed.optim_args = ",".join(f"{k}={v}" for k, v in optim_args.items())
    try:
        model = cast("PreTrainedModel", trainer.model)
        kind, arguments = trainer.get_optimizer_cls_and_kwargs(changed, model)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return f"refuses {error}"  # the other value, which is no fault of the user's
    groups = arguments.pop("params", ())
    arguments["params"] = [{k: v for k, v in g.items() if k != "params"} for g in groups]
    return f"{kind} {arguments}"


def _check_schedule(trainer: Trainer, args: Any, rates: Sequence[float], total_steps: int) -> None:
    """The schedule on a stand-in for the optimizer: it would set the real one's rates."""
    if trainer.lr_scheduler is not None:  # the user's own
        return
    name, given = _word(args.lr_scheduler_type), args.lr_scheduler_kwargs
    what = f"lr_scheduler_type is {name} with lr_scheduler_kwargs {given or '{}'}"
    advice = (
        "Correct lr_scheduler_kwargs (in a recipe a mapping, such as num_decay_steps: 100), or use "
        "another lr_scheduler_type"
    )
    stand_in = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in rates])
    with refused(f"{what}, which cannot be used", advice):
        try:
            schedule: Any = trainer.create_scheduler(total_steps, optimizer=stand_in)
        finally:
            trainer.lr_scheduler = None
        for factor in getattr(schedule, "lr_lambdas", ()):
            _check_factor(factor, total_steps)


def _check_factor(factor: Callable[[int], float], total_steps: int) -> None:
    """What a schedule multiplies the rate by, at steps all over the run."""
    stride = max(1, total_steps // _POINTS)
    for step in (0, 1, *range(2, total_steps + 1, stride), total_steps):
        value = factor(step)
        if isinstance(value, complex) or not math.isfinite(value) or value < 0:
            raise ValueError(f"the learning rate would be multiplied by {value} at step {step}")


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))
