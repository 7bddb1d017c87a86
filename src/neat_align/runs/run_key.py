"""What a run may not change when it goes on: options, data, model, rewards, processes."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainingArguments

from neat_align.config import NEATConfig
from neat_align.config.constraints import default_of
from neat_align.errors import ConfigError
from neat_align.files.atomic import read_json, write_json
from neat_align.files.secrets import redacted
from neat_align.prompts.rows import PromptRow

logger = logging.getLogger(__name__)


# Options that change where a run writes, what it says, how fast it is or how much memory it takes,
# and nothing that it computes (rounding apart): they may change when a run goes on. Every other
# option may not.
FREE_OPTIONS = frozenset(
    [
        "output_dir",
        "run_name",
        "project",
        "report_to",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "logging_nan_inf_filter",
        "log_on_each_node",
        "log_level",
        "log_level_replica",
        "log_completions",
        "disable_tqdm",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_only_model",
        "save_on_each_node",
        "enable_jit_checkpoint",
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "skip_memory_metrics",
        "debug",
        "ddp_timeout",
        "ddp_backend",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "generation_batch_size",
        "max_tokens_per_micro_batch",
        "torch_empty_cache_steps",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "dataloader_persistent_workers",
        "dataloader_in_order",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
        "include_num_input_tokens_seen",
        "restore_callback_states_from_checkpoint",
        "do_train",
        "do_eval",
        "do_predict",
        "resume_from_checkpoint",
        "allow_http_hosts",
        "vllm_server",
        "vllm_concurrency",
        "vllm_timeout",
        "vllm_sync_backend",
        "vllm_sync_folder",
        "sampler_tolerance",
        "local_rank",
        "allow_changes",
        "alarm_logp_drop",
        "alarm_ratio",
        # A run that stopped at a bad row goes on without it; all else has no such row.
        "on_bad_row",
    ]
)


def fingerprint(rows: Sequence[PromptRow]) -> str:
    """SHA-256 over the rows' ids, prompts, answers and inputs of the chat template, in order."""
    digest = hashlib.sha256()
    for row in rows:
        content: list[Any] = [row.id, row.prompt, row.chosen, row.rejected]
        if row.template_inputs:
            content += [row.template_inputs.tools, dict(row.template_inputs.kwargs)]
        digest.update(json.dumps(content).encode("ascii"))
    return digest.hexdigest()


def text_fingerprint(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, default=str).encode("ascii")).hexdigest()


def weights_fingerprint(model: torch.nn.Module, per_weight: int = 16) -> str:
    """SHA-256 over names, shapes and a few evenly spaced numbers of every weight: another model
    differs, at no cost.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // per_weight)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {picked.tolist()}".encode())
    return digest.hexdigest()


def run_key(args: NEATConfig, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What a run may not change when it goes on, as plain JSON: its options and `parts` (data,
    model, rewards, …).
    """
    options = {k: v for k, v in cast("Any", args).to_dict().items() if k not in FREE_OPTIONS}
    return cast(
        "dict[str, Any]",
        json.loads(json.dumps({**parts, "options": redacted(options)}, default=str)),
    )


def set_options(args: NEATConfig) -> dict[str, Any]:
    """The options that decide results and differ from their defaults, as plain JSON."""
    resolved = cast("Any", args).to_dict()
    options = {
        f.name: resolved[f.name]
        for f in fields(NEATConfig)
        if f.name not in FREE_OPTIONS | _SETTLED and resolved.get(f.name) != default_of(f)
    }
    return cast("dict[str, Any]", json.loads(json.dumps(redacted(options), default=str)))


# What a configuration fills in by itself, from the machine or from another option.
_SETTLED = frozenset(["accelerator_config", "use_cpu", "fsdp_config"])


def key_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two run keys, a line each.

    A part that the older key does not have is not compared. An option of NEAT's own that it does
    not have came with a later version: the run had what is its default now.
    """
    changes = []
    for name, value in now.items():
        if name == "options":
            if name not in was:
                continue
            old = {**_own_defaults(), **was[name]}
            changes += [
                f"{k} was {old[k]!r} and is {v!r}"
                for k, v in sorted(value.items())
                if k in old and old[k] != v
            ]
        elif name in was and was[name] != value:
            changes.append(f"{name} was {was[name]!r} and is {value!r}")
    return changes


def _own_defaults() -> dict[str, Any]:
    """NEAT's own options as a run key has them, each with its default; not transformers'."""
    theirs = {f.name for f in fields(TrainingArguments)}
    own = {f.name: default_of(f) for f in fields(NEATConfig) if f.name not in theirs}
    return cast("dict[str, Any]", json.loads(json.dumps(own, default=str)))


def check_same_run(output_dir: Path, key: dict[str, Any], *, allow_changes: bool) -> list[str]:
    """Compare a run's key with the one in its folder, where there is one. Gives the changes that
    were allowed.

    Raises ConfigError with the differences: rounds, first evaluation and optimizer state would be
    of another experiment.
    """
    path = output_dir / "run-key.json"
    changes = key_changes(read_json(path), key) if path.is_file() else []
    if changes and not allow_changes:
        listed = "\n  ".join(changes)
        raise ConfigError(
            f"{output_dir} holds a run with other settings:\n  {listed}\nPut them back, choose "
            "another output_dir, or pass allow_changes: true (--allow_changes true) to go on with "
            "the new ones; run.json then says so"
        )
    if changes:
        logger.warning(
            "going on with other settings than the run began with: %s", "; ".join(changes)
        )
    return changes


# What says how a step's groups are split, over processes and passes.
_SPLIT_OPTIONS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def new_split(output_dir: Path, key: Mapping[str, Any]) -> str | None:
    """How a step was split among processes and is now, where that alone differs.

    A step has the same groups, in other shares. None where nothing differs, or more.
    """
    path = output_dir / "run-key.json"
    was: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    if "processes" not in was or "options" not in was or was["processes"] == key["processes"]:
        return None
    before, now = (
        [k["processes"], *(k["options"].get(name) for name in _SPLIT_OPTIONS)] for k in (was, key)
    )
    if None in (*before, *now) or math.prod(before) != math.prod(now):
        return None
    as_now = {name: key["options"][name] for name in _SPLIT_OPTIONS}
    same = {**was, "processes": key["processes"], "options": {**was["options"], **as_now}}
    if key_changes(same, key):
        return None
    return "a step's groups were split as {} and are as {}".format(
        *(f"{n} processes x {size} x {passes} passes" for n, size, passes in (before, now))
    )


def write_key(output_dir: Path, key: dict[str, Any]) -> None:
    """Write the run's key, once what its changes ask for is done.

    Until then the next attempt finds the changes again.
    """
    path = output_dir / "run-key.json"
    if not path.is_file() or read_json(path) != key:
        write_json(path, key)
