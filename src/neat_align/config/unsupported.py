"""Options of transformers' `TrainingArguments` that a NEAT run cannot honour, and why.

NEATTrainer would ignore them, or they would break its rounds, so they have to keep their default. A
test names every field of `TrainingArguments` and what becomes of it: a field that a new version of
transformers adds has to be decided on. What the machine cannot compute is refused here as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from neat_align.config.constraints import Rule, default_of
from neat_align.config.trainer_values import waits_for_a_plateau
from neat_align.errors import ConfigError

_EVALUATION = (
    "is read by nothing: an evaluation samples answers and scores them, instead of going through "
    "batches of labelled data; leave it out"
)
_HALF_EVALUATION = (
    "is read by nothing, and would keep the model off the accelerator until training begins; leave "
    "it out (generation_copy samples from a bf16 copy)"
)
_PUSH = (
    "asks for checkpoints on the hub, and a run pushes its finished model only, with the card that "
    "says what was measured; leave it out"
)

# Options that must keep their default, and what follows their name in the message.
REFUSED: Mapping[str, str] = {
    # Evaluation: NEATTrainer.evaluate samples.
    "per_device_eval_batch_size": f"{_EVALUATION} (generation_batch_size is how many answers are "
    "sampled at once)",
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "bf16_full_eval": _HALF_EVALUATION,
    "fp16_full_eval": _HALF_EVALUATION,
    # Data: rows are groups of completions, not tensors with labels.
    "remove_unused_columns": "must stay false: reward functions are given every column of the data",
    "label_names": "is read by nothing: a group of completions has no labels; leave it out",
    "length_column_name": "is read by nothing: rounds are not sorted by length; leave it out",
    "include_num_input_tokens_seen": "would stay 0: Trainer counts a batch's input_ids, and NEAT's "
    "batches are groups; leave it out (metrics.jsonl has packing/tokens_per_micro_batch)",
    "dataloader_persistent_workers": "would keep serving the first round's groups: set it to false",
    "dataloader_drop_last": "would throw sampled groups away: set it to false",
    # The loss.
    "average_tokens_across_devices": "must stay true: the loss of a step is always divided by "
    "counts over all processes",
    "label_smoothing_factor": "has no meaning in NEAT's losses: set it to 0",
    "neftune_noise_alpha": "would add noise to the policy where it learns and not where it samples "
    "and is scored; leave it out",
    "auto_find_batch_size": "would begin the run again with another batch size, and other rounds, "
    "when memory runs out; leave it out (micro-batches are then halved by themselves, from "
    "max_tokens_per_micro_batch on)",
    # Going on after an interruption.
    "ignore_data_skip": "would train a resumed round's first groups twice; leave it out",
    "enable_jit_checkpoint": "is read by nothing: NEATTrainer finishes the step and writes a "
    "complete checkpoint by itself when it is asked to stop (SIGTERM or SIGINT); leave it out",
    # The hub.
    "hub_strategy": _PUSH,
    "hub_always_push": _PUSH,
}

# Options of TrainingArguments that only a script of the user's own can read, and which the commands
# do not.
SCRIPT_OPTIONS: Mapping[str, str] = {
    "resume_from_checkpoint": "is read by nothing: use resume (--resume true), which goes on from "
    "the newest complete checkpoint in output_dir",
    "do_train": "is read by nothing: `neat-align train` trains, and the other commands do not; "
    "leave it out",
    "do_predict": "is read by nothing; leave it out",
    "model_init_kwargs": "is read by nothing: it is for a script that passes a model's name to "
    "NEATTrainer; use dtype, attn_implementation, load_in_4bit, model_revision, trust_remote_code",
}

# These step inside of the backward pass: the weights would change at every micro-batch.
_STEPS_IN_BACKWARD = ("lomo", "adalomo")


def _optimizer_steps_in_backward(c: Any) -> bool:
    name = str(c.optim.value)
    return name in _STEPS_IN_BACKWARD or name.endswith("_layerwise")


def _follows_a_metric(c: Any) -> bool:
    return bool(c.load_best_model_at_end or c.save_strategy == "best" or waits_for_a_plateau(c))


TRAINER_RULES = (
    Rule(
        lambda c: _follows_a_metric(c) and c.metric_for_best_model in (None, "loss", "eval_loss"),
        "metric_for_best_model is {c.metric_for_best_model}, and load_best_model_at_end, "
        "save_strategy: best and the schedulers that wait for a plateau follow it: an evaluation "
        "computes no loss; set metric_for_best_model: reward, or another name of evaluation-*.json",
    ),
    Rule(
        _optimizer_steps_in_backward,
        "optim is {c.optim.value}, which changes the weights at every micro-batch, before the "
        "gradient of the step is complete and checked: use another optimizer",
    ),
    Rule(
        lambda c: c.accelerator_config.split_batches or c.accelerator_config.dispatch_batches,
        "accelerator_config sets split_batches or dispatch_batches, which cut batches of tensors, "
        "and NEAT's batches are groups: remove both",
    ),
)


def check_unsupported(c: Any) -> None:
    """Refuse options of TrainingArguments that NEATTrainer would ignore.

    Raises ConfigError for the first one that differs from its default.
    """
    _refuse(c, REFUSED)


def check_command_options(c: Any, *, may_push: bool = True) -> None:
    """Refuse options that a script of the user's own may read, and which a command does not.

    Raises ConfigError for the first one that differs from its default, and for `push_to_hub` where
    the command has no finished model.
    """
    if c.push_to_hub and not may_push:
        raise ConfigError(
            "push_to_hub is read by `neat-align train` only, which has a finished model to push: "
            "leave it out (neat-align push RUN pushes one later)"
        )
    _refuse(c, SCRIPT_OPTIONS)
    for name in ("hub_model_id", "hub_revision"):
        if getattr(c, name) is not None and not c.push_to_hub:
            raise ConfigError(
                f"{name} is read only with push_to_hub: set that to true, or leave it out"
            )
    if c.do_eval and c.eval_strategy == "no":  # with another one, TrainingArguments sets do_eval
        raise ConfigError(
            "do_eval is read by nothing: `neat-align train` evaluates before and after training, "
            "and eval_strategy sets when in between; leave it out"
        )


def _refuse(c: Any, refused: Mapping[str, str]) -> None:
    for f in fields(c):
        value = getattr(c, f.name)
        if f.name in refused and value != default_of(f):
            raise ConfigError(f"{f.name} {refused[f.name]}")


# ---- what the machine cannot do ------------------------------------------------------------------


def choose_device(c: Any) -> None:
    """Settle `use_cpu`, and refuse what the device cannot compute. Raises ConfigError.

    TrainingArguments refuses bf16 on a machine without an accelerator unless it is told that the
    CPU is meant.
    """
    has_accelerator = torch.accelerator.is_available()
    if c.use_cpu is False and not has_accelerator:
        raise ConfigError(
            f"use_cpu is false, which asks for an accelerator, and torch {torch.__version__} sees "
            "none on this machine: leave use_cpu out to train on the CPU, or install the torch "
            "build for your hardware"
        )
    c.use_cpu = c.use_cpu or not has_accelerator
    if c.fp16 and c.bf16:
        raise ConfigError(
            "fp16 and bf16 are both true, and bf16 is by default: set bf16 to false too, or "
            "remove fp16"
        )
    if c.fp16 and c.use_cpu:
        raise ConfigError(
            "fp16 is true and the run is on the CPU, where its loss scaling does not work: remove "
            "fp16 (bf16 works there)"
        )
    on_cuda = torch.cuda.is_available() and not c.use_cpu
    if c.bf16 and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"bf16 is true (it is by default), and {torch.cuda.get_device_name()} cannot compute "
            "in it: set bf16 to false, and fp16 to true if memory is short"
        )
