"""What transformers' own options may be set to, and which packages they need.

Trainer looks at most of them when it trains, after the first round was sampled and scored; a
configuration looks at all of them when it is made. Which of the options a run honours is said in
`unsupported`; what needs the model is tried when the trainer is made (`trainer/startup_checks.py`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Collection, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from accelerate.utils import DynamoBackend
from transformers.integrations import is_deepspeed_available
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames, trainer_log_levels
from transformers.utils import is_liger_kernel_available

from neat_align.config.constraints import Limits, Rule, check_limits
from neat_align.errors import ConfigError, did_you_mean

_STEPS = "it must be a number of steps, or below 1 a share of all steps"
_FRACTION = "it must be 0 or more and below 1"

# Bounds of the numbers that transformers' own dataclass leaves open.
LIMITS: Mapping[str, Limits] = {
    "max_steps": Limits(
        ge=1,
        whole=True,
        also=(-1,),
        needed="it must be a number of optimizer steps, or -1 to train for num_train_epochs rounds",
    ),
    "gradient_accumulation_steps": Limits(ge=1, whole=True, needed="it must be 1 or more"),
    "weight_decay": Limits(ge=0),
    "adam_beta1": Limits(ge=0, lt=1, needed=_FRACTION),
    "adam_beta2": Limits(ge=0, lt=1, needed=_FRACTION),
    "adam_epsilon": Limits(ge=0),
    "max_grad_norm": Limits(ge=0, needed="it must be above 0, or 0 for no clipping"),
    "warmup_steps": Limits(ge=0),
    "logging_steps": Limits(ge=0, needed=_STEPS),
    "eval_steps": Limits(ge=0, needed=_STEPS),
    "eval_delay": Limits(ge=0),
    "save_steps": Limits(gt=0, needed=_STEPS),
    "torch_empty_cache_steps": Limits(ge=1, whole=True, needed="it must be 1 or more, or unset"),
    "dataloader_num_workers": Limits(ge=0, whole=True),
    "dataloader_prefetch_factor": Limits(ge=1, whole=True, needed="it must be 1 or more, or unset"),
    "ddp_bucket_cap_mb": Limits(gt=0),
    "ddp_timeout": Limits(gt=0),
}


def _values(kind: type[Enum]) -> tuple[str, ...]:
    return tuple(str(member.value) for member in kind)


# The only values of options that are one of several words.
CHOICES: Mapping[str, Collection[str]] = {
    "optim": _values(OptimizerNames),
    "lr_scheduler_type": _values(SchedulerType),
    "eval_strategy": _values(IntervalStrategy),
    "logging_strategy": _values(IntervalStrategy),
    "save_strategy": _values(SaveStrategy),
    "hub_strategy": _values(HubStrategy),
    "log_level": tuple(trainer_log_levels),
    "log_level_replica": tuple(trainer_log_levels),
    "torch_compile_backend": tuple(name.value.lower() for name in DynamoBackend),
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", "xccl"),
    "dataloader_multiprocessing_context": tuple(multiprocessing.get_all_start_methods()),
}


def check_values(c: Any) -> None:
    """Refuse words, numbers and kinds of values that Trainer would stumble over.

    Has to come before `TrainingArguments.__post_init__`, which reads some of them and whose errors
    do not name the option. Raises ConfigError.
    """
    for f in fields(c):
        value = getattr(c, f.name)
        if f.name in CHOICES and not (value is None and f.default is None):
            _check_choice(f.name, value.value if isinstance(value, Enum) else value)
        elif f.name in LIMITS:
            check_limits(f, value, LIMITS[f.name])
        if isinstance(value, str) and value.startswith("{"):
            _check_json(f.name, value)
    # AdamW takes 0.0 and not 0.
    c.adam_beta1, c.adam_beta2 = float(c.adam_beta1), float(c.adam_beta2)
    _check_accelerator(c.accelerator_config)
    _check_loggers(c.report_to)
    if c.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError(
            "use_liger_kernel is true and there is no liger-kernel of version 0.3.0 or later: "
            "install it (pip install liger-kernel), or set use_liger_kernel to false"
        )
    if c.deepspeed and not is_deepspeed_available():
        raise ConfigError(
            "deepspeed is set and the package is not installed: install it (pip install "
            "deepspeed), or leave deepspeed out"
        )


def _check_json(name: str, text: str) -> None:
    try:
        json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}, which is no JSON ({error}): correct it") from error


def _check_accelerator(given: Any) -> None:
    """Refuse names that accelerate's settings do not have, and a file that cannot be read."""
    if isinstance(given, str | os.PathLike) and not str(given).startswith("{"):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"accelerator_config names {given!r}, which is no JSON file ({error}): correct it"
            ) from error
    known = {f.name for f in fields(AcceleratorConfig)}
    for name in given if isinstance(given, Mapping) else ():
        if name not in known:
            meant = did_you_mean(name, known) or f"it may have {_list(known)}"
            raise ConfigError(f"accelerator_config has {name!r}; {meant}")


def _check_choice(name: str, value: Any) -> None:
    allowed = CHOICES[name]
    if isinstance(value, str) and value in allowed:
        return
    meant = did_you_mean(value, allowed, most=3) or f"it must be one of {_list(allowed)}"
    raise ConfigError(f"{name} is {value!r}; {meant}")


def _list(words: Collection[str]) -> str:
    return ", ".join(sorted(words))


def _check_loggers(report_to: Any) -> None:
    """Refuse a logger that transformers does not know, or whose package is not installed."""
    named = [report_to] if isinstance(report_to, str) else report_to or []
    if not isinstance(named, list | tuple) or (len(named) == 1 and named[0] in ("none", "all")):
        return
    # Here, because it brings a good part of transformers and most runs have no logger.
    from transformers.integrations import get_available_reporting_integrations, is_azureml_available
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        is_flytekit_available,
    )

    known = {*INTEGRATION_TO_CALLBACK, "none", "all"}
    available = [*get_available_reporting_integrations()]
    # Which it leaves out.
    available += ["flyte"] if is_flytekit_available() else []
    available += ["azure_ml"] if is_azureml_available() else []
    for name in named:
        if name not in known:
            meant = did_you_mean(name, known) or f"it must be of {_list(known)}"
            raise ConfigError(f"report_to names {name!r}; {meant}")
        if name in INTEGRATION_TO_CALLBACK and name not in available:
            raise ConfigError(
                f"report_to names {name}, which is not installed: {_how_to_install(name)}, or take "
                f"it out of report_to (installed here: {_list(available) or 'none'})"
            )
        if name in ("none", "all") and len(named) > 1:
            raise ConfigError(f"report_to lists {name} among others: give {name} alone, or names")


def _how_to_install(tracker: str) -> str:
    if tracker in ("tensorboard", "trackio", "wandb", "mlflow"):
        return f"install it (pip install 'neat-align[{tracker}]')"
    return "install its package"


# Of transformers' GreedyLR.
_GREEDY_MIN_LR = 1e-3


def _evaluates(c: Any) -> bool:
    return bool(c.eval_strategy != "no")


def waits_for_a_plateau(c: Any) -> bool:
    """Whether the learning rate falls where a metric of evaluations gets no better."""
    return c.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")


def follow_the_metric(c: Any) -> None:
    """Tell a schedule that waits for a plateau which way the metric gets better.

    By itself it takes it for good when the metric falls, whatever `greater_is_better` says.
    """
    given = c.lr_scheduler_kwargs or {}
    if waits_for_a_plateau(c) and isinstance(given, Mapping):
        mode = "max" if c.greater_is_better else "min"
        c.lr_scheduler_kwargs = {"mode": mode, **given}


def _wrong_way(c: Any) -> bool:
    if not waits_for_a_plateau(c) or not isinstance(c.lr_scheduler_kwargs, Mapping):
        return False
    return bool((c.lr_scheduler_kwargs["mode"] == "max") != bool(c.greater_is_better))


def _raises_the_rate(c: Any) -> bool:
    given = c.lr_scheduler_kwargs
    if c.lr_scheduler_type != "greedy" or not isinstance(given, Mapping):
        return False
    lowest = given.get("min_lr", _GREEDY_MIN_LR)
    return isinstance(lowest, int | float) and bool(lowest > c.learning_rate)


# Options that Trainer would not read, or read against their meaning, without a word.
RULES = (
    Rule(
        lambda c: c.save_total_limit is not None and c.save_total_limit < 0,
        "save_total_limit is {c.save_total_limit}; it must be a number of checkpoints to keep, or "
        "0 to keep all",
    ),
    Rule(
        lambda c: not str(c.output_dir).strip(),
        "output_dir is {c.output_dir!r}, which is no folder: name one, or leave it out",
    ),
    Rule(
        lambda c: c.load_best_model_at_end and not _evaluates(c),
        "load_best_model_at_end is true and eval_strategy is no: nothing would say which model is "
        "best; set eval_strategy to epoch",
    ),
    Rule(
        lambda c: c.save_strategy == "best" and not _evaluates(c),
        "save_strategy is best and eval_strategy is no: nothing would ever be saved; set "
        "eval_strategy to epoch",
    ),
    Rule(
        _wrong_way,
        "lr_scheduler_kwargs is {c.lr_scheduler_kwargs} and greater_is_better is "
        "{c.greater_is_better}: the learning rate would fall while {c.metric_for_best_model} gets "
        "better; leave mode out of lr_scheduler_kwargs, or set greater_is_better",
    ),
    Rule(
        _raises_the_rate,
        "learning_rate is {c.learning_rate} and lr_scheduler_type greedy would raise it to its own "
        "min_lr, which is 0.001 unless lr_scheduler_kwargs has another: set min_lr there, below "
        "learning_rate",
    ),
    Rule(
        lambda c: c.liger_kernel_config and not c.use_liger_kernel,
        "liger_kernel_config is read only with use_liger_kernel: set that to true, or remove it",
    ),
    Rule(
        lambda c: c.activation_checkpointing_kwargs and not c.activation_checkpointing,
        "activation_checkpointing_kwargs (gradient_checkpointing_kwargs) is read only with "
        "activation_checkpointing: set that to true, or remove it",
    ),
    Rule(
        lambda c: c.optim_target_modules and not c.optim.value.startswith(("galore", "apollo")),
        "optim_target_modules is read only by galore and apollo optimizers, and optim is "
        "{c.optim.value}: remove it",
    ),
    Rule(
        lambda c: (
            c.lr_scheduler_kwargs and c.lr_scheduler_type in ("constant", "constant_with_warmup")
        ),
        "lr_scheduler_kwargs is not read with lr_scheduler_type {c.lr_scheduler_type.value}: "
        "remove it",
    ),
)
