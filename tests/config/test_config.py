"""What each setting may be, and what becomes of every option that transformers' Trainer has."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from neat_align import ConfigError, NEATConfig
from neat_align.cli.options import parse_options
from neat_align.config.constraints import (
    OnlyWith,
    Rule,
    check_options,
    default_of,
    limits_of,
    option,
    read_numbers,
)
from neat_align.config.unsupported import REFUSED, SCRIPT_OPTIONS
from neat_align.pipeline import build_trainer
from neat_align.script_arguments import ScriptArguments

# ---- every option of TrainingArguments -----------------------------------------------------------

LOOP = "Trainer's loop reads it"
LOADER = "goes to the DataLoader that serves a round's groups"
DDP = "goes to DistributedDataParallel, which wraps the policy"
OPTIMIZER = "Trainer builds the optimizer or its schedule from it"
LOGGER = "the loggers that report_to names read it"
HUB = "read with push_to_hub, and by NEATTrainer.push_to_hub"
WHEN = "DefaultFlowCallback reads it to say when"
SHARDED = "let through or refused by check_sharding; see test_sharding.py"

# Field by field: what reads it in a NEAT run. Decide on a field that a new version brings by
# reading Trainer: add it here when it works, or to `unsupported.REFUSED` when it would be ignored.
HONOURED = {
    "output_dir": "the run directory",
    "per_device_train_batch_size": "groups per forward pass",
    "num_train_epochs": "the number of rounds",
    "max_steps": LOOP,
    "learning_rate": OPTIMIZER,
    "lr_scheduler_type": f"{OPTIMIZER}; those that follow a metric need metric_for_best_model",
    "lr_scheduler_kwargs": OPTIMIZER,
    "warmup_steps": OPTIMIZER,
    "optim": f"{OPTIMIZER}; refused: those that step inside of the backward pass",
    "optim_args": OPTIMIZER,
    "weight_decay": OPTIMIZER,
    "adam_beta1": OPTIMIZER,
    "adam_beta2": OPTIMIZER,
    "adam_epsilon": OPTIMIZER,
    "optim_target_modules": OPTIMIZER,
    "gradient_accumulation_steps": "the loss is divided by counts over all of them",
    "max_grad_norm": LOOP,
    "bf16": "autocast of training, scoring and sampling",
    "fp16": "autocast of training, scoring and sampling",
    "tf32": "TrainingArguments switches it for the whole process",
    "activation_checkpointing": "Trainer.train switches it on in the policy",
    "activation_checkpointing_kwargs": "read with activation_checkpointing",
    "gradient_checkpointing": "the old name of activation_checkpointing",
    "gradient_checkpointing_kwargs": "the old name of activation_checkpointing_kwargs",
    "torch_compile": "accelerate compiles the policy that trains; sampling uses it uncompiled",
    "torch_compile_backend": "read with torch_compile",
    "torch_compile_mode": "read with torch_compile",
    "use_liger_kernel": "Trainer.train patches the policy's layers",
    "liger_kernel_config": "read with use_liger_kernel",
    "use_cache": "written into the saved model's config.json; NEAT's own calls say what they want",
    "torch_empty_cache_steps": "Trainer.training_step reads it",
    "logging_strategy": WHEN,
    "logging_steps": WHEN,
    "logging_first_step": WHEN,
    "log_on_each_node": "which process logs",
    "logging_nan_inf_filter": LOOP,
    "log_level": "Trainer sets transformers' verbosity",
    "log_level_replica": "Trainer sets transformers' verbosity on other processes",
    "disable_tqdm": "which callback shows progress",
    "report_to": "Trainer adds the loggers' callbacks",
    "run_name": LOGGER,
    "project": LOGGER,
    "trackio_space_id": LOGGER,
    "trackio_bucket_id": LOGGER,
    "trackio_static_space_id": LOGGER,
    "eval_strategy": WHEN,
    "eval_steps": WHEN,
    "eval_delay": WHEN,
    "eval_on_start": LOOP,
    "save_only_model": "a checkpoint without optimizer, marked as one that cannot be resumed",
    "save_strategy": f"{WHEN}; `best` needs metric_for_best_model",
    "save_steps": WHEN,
    "save_on_each_node": "which processes save",
    "save_total_limit": "older checkpoints are deleted once the new one is complete",
    "push_to_hub": "the finished model is pushed, and nothing else of the run",
    "hub_token": f"{HUB}; the command line refuses it, as a secret",
    "hub_private_repo": f"{HUB}; trackio, too",
    "hub_model_id": HUB,
    "hub_revision": HUB,
    "load_best_model_at_end": f"{LOOP}; needs metric_for_best_model",
    "metric_for_best_model": "a name among the metrics that NEATTrainer.evaluate gives",
    "greater_is_better": "read with metric_for_best_model",
    "restore_callback_states_from_checkpoint": LOOP,
    "full_determinism": "Trainer switches torch's deterministic algorithms on",
    "seed": "all that is random",
    "data_seed": "the order of a round's groups",
    "use_cpu": "the device",
    "accelerator_config": "goes to accelerate; refused: split_batches and dispatch_batches",
    "dataloader_num_workers": LOADER,
    "dataloader_pin_memory": LOADER,
    "dataloader_prefetch_factor": LOADER,
    "dataloader_multiprocessing_context": LOADER,
    "dataloader_in_order": LOADER,
    "train_sampling_strategy": "random or sequential; refused: those that sort by length",
    "ddp_find_unused_parameters": DDP,
    "ddp_bucket_cap_mb": DDP,
    "ddp_broadcast_buffers": DDP,
    "ddp_static_graph": f"{DDP}; rows are then padded",
    "ddp_backend": DDP,
    "ddp_timeout": DDP,
    "deepspeed": SHARDED,
    "fsdp": SHARDED,
    "fsdp_config": SHARDED,
    "parallelism_config": SHARDED,
    "debug": LOOP,
    "skip_memory_metrics": LOOP,
    "local_rank": "old launchers pass it; TrainingArguments keeps it for the parser",
}
# Only a user's own script reads them; the commands refuse them.
IN_SCRIPTS: dict[str, Any] = {
    "resume_from_checkpoint": "true",
    "do_train": True,
    "do_predict": True,
    "do_eval": True,
}
# Refused, with a value other than the default. Why: `unsupported.REFUSED`, which is the message.
IGNORED: dict[str, Any] = {
    "per_device_eval_batch_size": 16,
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "remove_unused_columns": True,
    "label_names": ["labels"],
    "length_column_name": "n",
    "include_num_input_tokens_seen": True,
    "dataloader_persistent_workers": True,
    "dataloader_drop_last": True,
    "average_tokens_across_devices": False,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "auto_find_batch_size": True,
    "ignore_data_skip": True,
    "enable_jit_checkpoint": True,
    "hub_strategy": "every_save",
    "hub_always_push": True,
}


def config(**changes: Any) -> NEATConfig:
    return NEATConfig(**{"output_dir": "run", "bf16": False, "use_cpu": True, **changes})


def test_every_option_of_transformers_is_honoured_or_refused() -> None:
    decided = [*HONOURED, *IN_SCRIPTS, *IGNORED]
    there = [f.name for f in fields(TrainingArguments)]
    assert sorted(set(there) - set(decided)) == [], "new options: honour or refuse them"
    assert sorted(set(decided) - set(there)) == [], "options that transformers no longer has"
    assert len(decided) == len(set(decided))
    assert set(REFUSED) == set(IGNORED)
    assert set(SCRIPT_OPTIONS) | {"do_eval"} == {*IN_SCRIPTS, "model_init_kwargs"}


@pytest.mark.parametrize("name", IGNORED)
def test_options_that_would_be_ignored_are_refused(name: str) -> None:
    needed = {"dataloader_num_workers": 1} if name == "dataloader_persistent_workers" else {}
    with pytest.raises(ConfigError) as refused:
        config(**{name: IGNORED[name]}, **needed)
    assert str(refused.value) == f"{name} {REFUSED[name]}"
    config(**{f.name: default_of(f) for f in fields(NEATConfig) if f.name == name})


def test_a_refused_option_is_named_with_its_line_of_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("seed: 1\nper_device_eval_batch_size: 16\n")
    with pytest.raises(ConfigError, match=r"r\.yaml:2: per_device_eval_batch_size is read by noth"):
        parse_options(["--output_dir", str(tmp_path / "run")], recipe)
    recipe.write_text("seed: 1\nper_device_eval_batch_size: 8\n")  # the default changes nothing
    parse_options(["--output_dir", str(tmp_path / "run")], recipe)


@pytest.mark.parametrize("name", [*IN_SCRIPTS, "model_init_kwargs"])
def test_options_of_users_scripts_are_refused_by_the_commands_only(name: str) -> None:
    args = config(**{name: {**IN_SCRIPTS, "model_init_kwargs": {"dtype": "float32"}}[name]})
    with pytest.raises(ConfigError, match=f"^{name} is read by nothing"):
        build_trainer(ScriptArguments(model_name_or_path="demo"), args)


def test_an_eval_strategy_that_sets_do_eval_is_no_do_eval() -> None:
    args = config(eval_strategy="epoch")
    assert args.do_eval
    with pytest.raises(ConfigError, match="dataset_name is missing"):
        build_trainer(ScriptArguments(model_name_or_path="demo"), args)


@pytest.mark.parametrize(
    "changes",
    [
        {"load_best_model_at_end": True, "eval_strategy": "epoch"},
        {"save_strategy": "best", "eval_strategy": "epoch"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
        {
            "lr_scheduler_type": "greedy",
            "eval_strategy": "epoch",
            "lr_scheduler_kwargs": {"min_lr": 0.0},
        },
    ],
)
def test_what_follows_a_metric_needs_one_that_an_evaluation_gives(changes: dict[str, Any]) -> None:
    for metric in (None, "loss", "eval_loss"):
        with pytest.raises(ConfigError, match="metric_for_best_model: reward"):
            config(**changes, metric_for_best_model=metric)
    config(**changes, metric_for_best_model="reward")


@pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_inside_of_the_backward_pass_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"optim is {name}, which changes the weights at every"):
        config(optim=name)


@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches"])
def test_batches_are_not_cut_by_accelerate(name: str) -> None:
    with pytest.raises(ConfigError, match="accelerator_config sets split_batches or dispatch_batc"):
        config(accelerator_config={name: True})
    config(accelerator_config={"even_batches": True})


# ---- limits --------------------------------------------------------------------------------------


@dataclass
class Options:
    """Each kind of limit."""

    mode: str = option("a", "One of two.", choices=("a", "b"))
    count: int = option(1, "At least one.", ge=1)
    weight: float = option(0.0, "Not negative.", ge=0)
    share: float = option(0.5, "Of the whole.", gt=0, le=1)
    below: int = option(1, "A byte.", ge=0, lt=256)
    rounds: float = option(1.0, "Whole.", ge=1, whole=True, needed="it is a number of rounds")
    ratio: float = option(2.0, "Or off.", gt=1, also=(0,))
    limit: float | None = option(None, "Or unset.", gt=0)
    extra: float | None = option(
        None,
        "Read with b.",
        only_with=(
            OnlyWith("mode", "extra is set but mode is {c.mode}: use b", one_of=("b",)),
            OnlyWith("count", "extra is set but count is {c.count}: lower it", none_of=(5, 6)),
        ),
    )


RULES = (Rule(lambda c: c.weight > c.count, "weight is {c.weight} and count {c.count}: lower it"),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "c"}, "mode is 'c'; it must be one of a, b"),
        ({"mode": ["a"]}, "mode is ['a']; it must be one of a, b"),
        ({"count": 0}, "count is 0; it must be 1 or more"),
        ({"count": None}, "count is None; it must be 1 or more"),
        ({"weight": -0.1}, "weight is -0.1; it must not be negative"),
        ({"share": 0}, "share is 0; it must be above 0 and at most 1"),
        ({"share": 1.1}, "share is 1.1; it must be above 0 and at most 1"),
        ({"below": 256}, "below is 256; it must be 0 or more and below 256"),
        ({"rounds": 1.5}, "rounds is 1.5; it is a number of rounds"),
        ({"ratio": 1}, "ratio is 1; it must be above 1"),
        ({"limit": 0}, "limit is 0; it must be above 0"),
        ({"extra": 0.0}, "extra is set but mode is a: use b"),
        ({"extra": 1.0, "mode": "b", "count": 5}, "extra is set but count is 5: lower it"),
        ({"weight": 2.0}, "weight is 2.0 and count 1: lower it"),
        ({"weight": 2.0, "count": 0}, "count is 0; it must be 1 or more"),
    ],
)
def test_limits_say_what_came_and_what_is_needed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_options(Options(**changes), RULES)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mode": "b", "extra": 1.0, "count": 4},
        {"share": 1, "below": 255, "rounds": 3, "ratio": 0, "weight": 1},
        {"limit": None, "ratio": 1.01},
    ],
)
def test_values_inside_of_the_limits_pass(changes: dict[str, Any]) -> None:
    check_options(Options(**changes), RULES)


def test_numbers_are_read_from_text_and_have_to_be_finite() -> None:
    options = Options(count="3", weight="1e-1", limit="2")  # type: ignore[arg-type]
    read_numbers(options)
    assert (options.count, options.weight, options.limit, options.mode) == (3, 0.1, 2.0, "a")
    for changes, message in (
        ({"count": "many"}, "count is 'many'; it must be a whole number, such as 1"),
        ({"limit": "far"}, "limit is 'far'; it must be a number, such as 1.0"),
        ({"weight": math.nan}, "weight is nan; it must be a finite number"),
        ({"limit": "inf"}, "limit is inf; it must be a finite number"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_numbers(Options(**changes))  # type: ignore[arg-type]


def test_our_options_say_what_they_are() -> None:
    theirs = {f.name for f in fields(TrainingArguments)}
    for c in (NEATConfig, ScriptArguments):
        for f in fields(c):
            if f.name not in theirs:
                assert len(f.metadata["help"]) >= len("LoRA rank."), f.name
                assert set(f.metadata) == {"help"}, f.name  # argparse gets the others, too


def test_limits_name_options_that_there_are() -> None:
    for c in (NEATConfig, ScriptArguments):
        names = {f.name for f in fields(c)}
        for f in fields(c):
            assert {needs.option for needs in limits_of(f).only_with} <= names


def test_transformers_own_parser_reads_our_options() -> None:
    parser = HfArgumentParser((ScriptArguments, NEATConfig))  # type: ignore[arg-type]
    assert "Nucleus sampling: keep the smallest set" in parser.format_help()
    words = ["--output_dir", "run", "--top_p", "0.5", "--use_cpu", "true", "--lora_r", "4"]
    script, args = parser.parse_args_into_dataclasses(words)
    assert (script.lora_r, args.top_p) == (4, 0.5)
    with pytest.raises(ConfigError, match=r"top_p is 2.0; it must be above 0 and at most 1"):
        parser.parse_args_into_dataclasses([*words, "--top_p", "2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": -1}, "holdout is -1; it must be 0 or more"),
        ({"holdout": "-1"}, "holdout is -1; it must be 0 or more"),
        ({"lora_r": 0}, "lora_r is 0; it must be 1 or more"),
        ({"lora_alpha": 0}, "lora_alpha is 0; it must be 1 or more"),
        ({"dataset_limit": 0}, "dataset_limit is 0; it must be 1 or more, or unset for every row"),
        (
            {"eval_dataset_split": "test"},
            "eval_dataset_split is 'test', but there is no eval_dataset_name for it to be a split",
        ),
    ],
)
def test_script_arguments_have_limits(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        ScriptArguments(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1; it must be a whole number from 0 to 4294967295"),
        ({"data_seed": 2**32}, "data_seed is 4294967296; it must be a whole number from 0 to"),
        ({"train_sampling_strategy": "group_by_length"}, "it must be one of random, sequential"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it must be 1 or"),
        ({"num_eval_prompts": -1}, "num_eval_prompts is -1; it must not be negative"),
        ({"reward_timeout": 0.0}, "it must be a positive number of seconds, or left out"),
        ({"max_kl": 0.0}, "max_kl is 0.0; it must be above 0, or unset"),
        ({"alarm_ratio": 0.5}, "alarm_ratio is 0.5; it must be above 1, or 0 to turn the alarm"),
    ],
)
def test_limits_of_a_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_runs_of_before_find_their_configuration_where_it_was() -> None:
    """training_args.bin in every checkpoint is a pickle that names this place."""
    assert import_module("neat_align.config").NEATConfig is NEATConfig
