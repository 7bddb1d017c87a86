"""Weights that are divided between processes: what is let through, and what is refused.

Let through are FSDP2 and DeepSpeed's ZeRO on accelerators. Refused is what transformers and
accelerate would accept and then train something else than was asked, or leave no whole checkpoint.
It may be asked for by an option, or by `accelerate launch`, which sets environment variables.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from neat_align.errors import ConfigError

# How a run's processes divide it: not at all (each has all of it), FSDP2, or a stage of ZeRO.
Sharding: TypeAlias = Literal["none", "fsdp2", "zero0", "zero1", "zero2", "zero3"]

_OTHER_PARALLELISM = (
    "divides a layer or a row between processes, which NEAT's packed rows and its sampling are not "
    "made for. Use FSDP2 (fsdp: true), DeepSpeed's ZeRO, or plain data parallelism"
)
# What `accelerate launch` sets to true, and what for.
_LAUNCHED: Mapping[str, str] = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
# What transformers reads before it leaves the weights of a model to another process.
_LOADS_ONCE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
# Sections of a DeepSpeed configuration that only DeepSpeed's own data loader or layers read.
_UNREAD_BY_TRAINER = ("activation_checkpointing", "curriculum_learning", "data_efficiency")


def check_sharding(c: Any) -> None:
    """Refuse ways of dividing weights between processes that would train something else.

    Has to come before `TrainingArguments.__post_init__`, which sets such a way up, and after
    `choose_device`. Raises ConfigError.
    """
    if c.parallelism_config:
        raise ConfigError(f"parallelism_config is set: it {_OTHER_PARALLELISM}")
    for variable, name in _LAUNCHED.items():
        if _is_true(variable):
            raise ConfigError(f"{_launched(variable)}: {name} {_OTHER_PARALLELISM}")
    _check_fsdp(c)
    _check_deepspeed(c)


def asked_sharding(c: Any) -> Sharding:
    """How a run will be divided, before accelerate has divided it. Comes after `__post_init__`."""
    if c.deepspeed_plugin is not None:
        return cast("Sharding", f"zero{c.deepspeed_plugin.zero_stage}")
    return "fsdp2" if c.fsdp or _is_true("ACCELERATE_USE_FSDP") else "none"


def load_whole(c: Any) -> None:
    """Let models be loaded whole, also where ZeRO-3 or FSDP2 will divide the policy.

    transformers would divide every model that is loaded from now on, rewards' too, or leave it
    without weights; and one that is divided before its engine is there cannot be called: the checks
    before training call it. Has to come after `TrainingArguments.__post_init__`. Sets
    `c.loads_once`: whether the first process alone is to load the policy's weights (FSDP2's
    `cpu_ram_efficient_loading`), which then is done here.
    """
    if c.deepspeed_plugin is not None:
        unset_hf_deepspeed_config()
    c.loads_once = asked_sharding(c) == "fsdp2" and _is_true(_LOADS_ONCE)
    if c.loads_once:
        leave_models_whole()


def leave_models_whole() -> None:
    """transformers loads models with their weights in every process. accelerate's FSDP plugin, when
    it is made, says otherwise.
    """
    os.environ[_LOADS_ONCE] = "false"


def _is_true(variable: str) -> bool:
    return _says_true(os.environ.get(variable, ""))


def _says_true(value: Any) -> bool:
    return str(value).strip().lower() in ("true", "1", "yes", "y", "t", "on")


def _launched(variable: str) -> str:
    return f"the environment has {variable}={os.environ[variable]} (accelerate launch sets it)"


# ---- FSDP ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FSDPSetting:
    """A setting that must keep a value: its name in `fsdp_config`, its variable, and why."""

    name: str
    variable: str
    why: str


_MUST_BE_FALSE = (
    _FSDPSetting(
        "cpu_offload",
        "FSDP_OFFLOAD_PARAMS",
        "keeps the weights in the CPU's memory, from where every sampled token would fetch all of "
        "them. Set it to false; LoRA and gradient checkpointing save memory too",
    ),
    _FSDPSetting("xla", "", "is for TPUs, which are not supported. Leave it out"),
)


def _check_fsdp(c: Any) -> None:
    launched = _is_true("ACCELERATE_USE_FSDP")
    if c.fsdp_config and not c.fsdp:
        raise ConfigError(
            "fsdp_config is set and fsdp is not, so transformers would not read it: set fsdp to "
            "true, or leave fsdp_config out"
        )
    if not c.fsdp and not launched:
        return
    what = "fsdp is set" if c.fsdp else _launched("ACCELERATE_USE_FSDP")
    if c.use_cpu:
        raise ConfigError(
            f"{what} and the run is on a CPU: accelerate would train as plain data parallelism "
            "there, with all the weights in every process. Leave it out on this machine, or run "
            "where torch sees an accelerator"
        )
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            f"{what} and there is one process, which has nobody to share the weights with: start "
            "several (torchrun --nproc-per-node 8 -m neat_align train …, or accelerate launch)"
        )
    given = _read_object(c.fsdp_config, "fsdp_config") if c.fsdp_config else {}
    settings = {name.removeprefix("fsdp_"): value for name, value in given.items()}
    words = c.fsdp.split() if isinstance(c.fsdp, str) else c.fsdp
    if isinstance(words, list) and "offload" in map(str, words):  # the older way to ask for it
        settings.setdefault("cpu_offload", True)
    _check_fsdp_version(c, settings)
    for setting in _MUST_BE_FALSE:
        value, where = _fsdp_value(c, settings, setting.name, setting.variable, "false")
        if _says_true(value):
            raise ConfigError(f"{where} is {value}: it {setting.why}")
    kind, where = _fsdp_value(
        c,
        settings,
        "state_dict_type",
        "FSDP_STATE_DICT_TYPE",
        "FULL_STATE_DICT" if c.fsdp else "SHARDED_STATE_DICT",
    )
    if str(kind).upper() not in ("FULL_STATE_DICT", "1"):
        raise ConfigError(
            f"{where} is {kind}: no checkpoint would hold a model that can be loaded, and the last "
            "one would be missing at the end. Set it to FULL_STATE_DICT"
        )
    _check_even(c, what)
    _check_no_copy(c, what)


def _check_fsdp_version(c: Any, settings: Mapping[str, Any]) -> None:
    version, where = _fsdp_value(c, settings, "version", "FSDP_VERSION", "2" if c.fsdp else "1")
    if str(version).strip() != "2":
        raise ConfigError(
            f"{where} is {version}: FSDP's first version flattens the weights behind a wrapper, "
            "which sampling and adapters cannot see through, and transformers removes it. Set it "
            "to 2 (accelerate launch --fsdp_version 2)"
        )


def _fsdp_value(
    c: Any, settings: Mapping[str, Any], name: str, variable: str, default: str
) -> tuple[Any, str]:
    """A setting's value, and where it comes from: transformers', or accelerate's environment."""
    if name in settings or c.fsdp:
        return settings.get(name, default), f"fsdp_config's {name}"
    return os.environ.get(variable, default), f"the environment's {variable} (accelerate launch)"


def _check_even(c: Any, what: str) -> None:
    given = c.accelerator_config
    even = given.get("even_batches", True) if isinstance(given, Mapping) else True
    if not even:
        raise ConfigError(
            f"{what} and accelerator_config has even_batches false: a process without a batch "
            "would leave the others waiting for its part of the weights. Set it to true"
        )


def _check_no_copy(c: Any, what: str) -> None:
    if c.generation_copy == "always":
        raise ConfigError(
            f"{what} and generation_copy is always: weights that processes divide are not copied, "
            "sampling gathers them layer by layer. Set generation_copy to auto or never"
        )


# ---- DeepSpeed -----------------------------------------------------------------------------------


def _check_deepspeed(c: Any) -> None:
    given, source = c.deepspeed, "deepspeed"
    if not given and _is_true("ACCELERATE_USE_DEEPSPEED"):
        source = "the environment (accelerate launch sets it)"
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        given = _launched_zero() if file == "none" else file
    if not given or not isinstance(given, str | Mapping):  # `check_kinds` refuses what is neither
        return
    settings = _read_object(given, source)
    tensor_parallel = settings.get("tensor_parallel")
    if isinstance(tensor_parallel, Mapping) and tensor_parallel.get("autotp_size", 1) != 1:
        raise ConfigError(
            f"{source} asks for DeepSpeed's tensor parallelism: it {_OTHER_PARALLELISM}"
        )
    unread = [name for name in _UNREAD_BY_TRAINER if settings.get(name)]
    if unread:
        raise ConfigError(
            f"{source} has {', '.join(unread)}, which nothing here reads: remove it "
            "(gradient_checkpointing is transformers' own option)"
        )
    zero = settings.get("zero_optimization")
    if isinstance(zero, Mapping) and _moves_weights(zero):
        raise ConfigError(
            f"{source} has zero_optimization.offload_param, which keeps the weights off the "
            "accelerator, from where every sampled token would fetch all of them: remove it "
            "(offload_optimizer may stay)"
        )
    if _zero_stage(settings) == "3" and not _gathers_to_save(settings):
        raise ConfigError(
            f"{source} asks for ZeRO stage 3 without stage3_gather_16bit_weights_on_model_save, so "
            "no checkpoint would hold a model that can be loaded, and the last one would be "
            "missing at the end: set it to true in zero_optimization (accelerate launch "
            "--zero3_save_16bit_model true)"
        )
    if _zero_stage(settings) == "3":
        _check_no_copy(c, f"{source} asks for DeepSpeed")
    _check_even(c, f"{source} asks for DeepSpeed")


def _launched_zero() -> dict[str, Any]:
    """What `accelerate launch` asks for without a file of DeepSpeed's settings."""
    device = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    return {"zero_optimization": {"stage": "auto", "offload_param": {"device": device}}}


def _zero_stage(settings: Mapping[str, Any]) -> str:
    zero = settings.get("zero_optimization")
    stage = str(zero.get("stage", 0)) if isinstance(zero, Mapping) else "0"
    if stage == "auto":  # accelerate takes it from here, and 2 is its default
        return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2").strip()
    return stage


def _gathers_to_save(settings: Mapping[str, Any]) -> bool:
    zero = settings["zero_optimization"]
    if "stage3_gather_16bit_weights_on_model_save" in zero:
        return _says_true(zero["stage3_gather_16bit_weights_on_model_save"])
    return _is_true("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL")


def _moves_weights(zero: Mapping[str, Any]) -> bool:
    offload = zero.get("offload_param")
    return isinstance(offload, Mapping) and str(offload.get("device", "none")) != "none"


def _read_object(given: str | Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Settings from a mapping, a JSON file, JSON text, or JSON in base64."""
    if isinstance(given, Mapping):
        return given
    try:
        if given.lstrip().startswith("{"):
            text = given
        elif Path(given).exists():
            text = Path(given).read_text(encoding="utf-8")
        else:
            text = base64.urlsafe_b64decode(given).decode("utf-8")
        settings = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{source} names {given!r}, which is neither a JSON file nor JSON ({error}): correct it"
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{source} names {given!r}, which holds no JSON object: correct it")
    return settings
