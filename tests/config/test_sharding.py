"""Weights divided between processes: what is let through, and what would train something else."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.parallelism_config import ParallelismConfig

import neat_align
from neat_align import NEATConfig
from neat_align.config.sharding import check_sharding, load_whole
from neat_align.errors import ConfigError

ZERO_3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_batch_size": "auto",
}
UNGATHERED = {"zero_optimization": {"stage": 3}}
AUTO = {"zero_optimization": {"stage": "auto"}}
# What `accelerate launch` with an FSDP2 configuration that can be used here sets.
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
    "LOCAL_RANK": "0",
}


def asked(**changes: Any) -> SimpleNamespace:
    """A configuration as it is when it is checked, on a machine with an accelerator."""
    options = ("fsdp", "fsdp_config", "parallelism_config", "deepspeed", "accelerator_config")
    settings = {**dict.fromkeys(options), "use_cpu": False, "generation_copy": "auto"}
    return SimpleNamespace(**{**settings, **changes})


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("LOCAL_RANK", "0")
    return monkeypatch


# ---- FSDP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"fsdp": True},
        {"fsdp": "full_shard auto_wrap"},
        {"fsdp": ["full_shard"]},
        {"fsdp": True, "fsdp_config": {"version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}},
        {"fsdp": True, "fsdp_config": '{"reshard_after_forward": false}'},
        {"fsdp": True, "accelerator_config": {"even_batches": True}},
        {"fsdp": True, "fsdp_config": {"fsdp_cpu_ram_efficient_loading": "true"}},
    ],
)
def test_fsdp2_on_accelerators_is_let_through(
    changes: dict[str, Any], launched: pytest.MonkeyPatch
) -> None:
    check_sharding(asked(**changes))


def test_fsdp2_that_accelerate_launch_asks_for_is_let_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    check_sharding(asked())


@pytest.mark.parametrize(("said", "once"), [("true", True), ("1", True), ("false", False)])
def test_the_first_process_alone_loads_the_policy_and_every_process_any_other_model(
    said: str, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers goes by the variable, for whatever is loaded later: a reward model, say."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", said)
    settings = asked(deepspeed_plugin=None)
    load_whole(settings)
    assert settings.loads_once is once
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_without_fsdp_every_process_loads_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    settings = asked(deepspeed_plugin=None)
    load_whole(settings)
    assert settings.loads_once is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_config": {"version": 2}}, "fsdp_config is set and fsdp is not, so transformers"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "fsdp_config's version is 1: FSDP's first"),
        ({"fsdp": True, "fsdp_config": {"fsdp_version": "1"}}, "version is 1: FSDP's first versio"),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "cpu_offload is True: it keeps the"),
        ({"fsdp": "full_shard offload"}, "cpu_offload is True: it keeps the weights in the CPU's"),
        ({"fsdp": ["offload"]}, "cpu_offload is True: it keeps the weights in the CPU's memory"),
        (
            {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
            "state_dict_type is SHARDED_STATE_DICT: no checkpoint would hold a model.*FULL_STATE",
        ),
        ({"fsdp": True, "fsdp_config": {"xla": True}}, "xla is True: it is for TPUs"),
        (
            {"fsdp": True, "accelerator_config": {"even_batches": False}},
            "fsdp is set and accelerator_config has even_batches false: a process without a batch",
        ),
        ({"fsdp": True, "use_cpu": True}, "fsdp is set and the run is on a CPU: accelerate would"),
        (
            {"fsdp": True, "generation_copy": "always"},
            "fsdp is set and generation_copy is always: weights that processes divide are not cop",
        ),
        ({"fsdp": True, "fsdp_config": "no.json"}, "fsdp_config names 'no.json', which is neither"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "parallelism_config is set: it div"),
    ],
)
def test_fsdp_that_would_be_something_else_is_refused(
    changes: dict[str, Any], message: str, launched: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sharding(asked(**changes))


def test_fsdp_on_this_machine_is_refused_before_anything_is_set_up() -> None:
    with pytest.raises(ConfigError, match="fsdp is set and the run is on a CPU: accelerate would"):
        NEATConfig(output_dir="run", bf16=False, use_cpu=True, fsdp="full_shard")


def test_one_process_has_nobody_to_share_weights_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(
        ConfigError, match=r"fsdp is set and there is one process.*torchrun --nproc"
    ):
        check_sharding(asked(fsdp=True))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        # accelerate's own defaults are the first version and a state dict in parts
        ("FSDP_VERSION", None, "FSDP_VERSION .*is 1: FSDP's first version .*--fsdp_version 2"),
        ("FSDP_STATE_DICT_TYPE", None, "FSDP_STATE_DICT_TYPE .*is SHARDED_STATE_DICT: no checkpo"),
        ("FSDP_STATE_DICT_TYPE", "LOCAL_STATE_DICT", "is LOCAL_STATE_DICT: no checkpoint would"),
        ("FSDP_OFFLOAD_PARAMS", "true", "FSDP_OFFLOAD_PARAMS .*is true: it keeps the weights in"),
        ("LOCAL_RANK", None, "ACCELERATE_USE_FSDP=true .* there is one process"),
    ],
)
def test_fsdp_that_accelerate_launch_would_do_otherwise_is_refused(
    name: str, value: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, usual in {**LAUNCHED, name: value}.items():
        if usual is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, usual)
    with pytest.raises(ConfigError, match=message):
        check_sharding(asked())


@pytest.mark.parametrize(
    "variable", ["ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"]
)
def test_other_parallelism_that_accelerate_launch_asks_for_is_refused(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=rf"{variable}=true .*divides a layer or a row"):
        check_sharding(asked())


# ---- DeepSpeed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        *({"zero_optimization": {"stage": stage}} for stage in (0, 1, 2, "auto")),
        {},
        ZERO_3,
        json.dumps(ZERO_3),
        base64.urlsafe_b64encode(json.dumps(ZERO_3).encode()).decode(),
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    ],
)
def test_deepspeed_is_let_through(given: Any) -> None:
    check_sharding(asked(deepspeed=given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (UNGATHERED, "ZeRO stage 3 without stage3_gather_16bit_weights_on_model_save.*set it to"),
        (
            {"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}},
            "deepspeed asks for DeepSpeed's tensor parallelism: it divides a layer or a row",
        ),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "has activation_checkpointing"),
        ({"data_efficiency": {"enabled": True}}, "has data_efficiency, which nothing here reads"),
        (
            {
                "zero_optimization": {
                    **ZERO_3["zero_optimization"],
                    "offload_param": {"device": "cpu"},
                }
            },  # type: ignore[dict-item]
            "zero_optimization.offload_param, which keeps the weights off the accelerator",
        ),
    ],
)
def test_deepspeed_that_would_be_something_else_is_refused(
    given: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sharding(asked(deepspeed=given))


def test_zero_3_neither_copies_weights_nor_leaves_a_process_without_a_batch() -> None:
    with pytest.raises(ConfigError, match="DeepSpeed and generation_copy is always: weights that"):
        check_sharding(asked(deepspeed=ZERO_3, generation_copy="always"))
    with pytest.raises(ConfigError, match="DeepSpeed and accelerator_config has even_batches fals"):
        check_sharding(asked(deepspeed=ZERO_3, accelerator_config={"even_batches": False}))
    check_sharding(asked(deepspeed=AUTO, generation_copy="always"))  # whole weights


def test_deepspeed_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(UNGATHERED))
    with pytest.raises(ConfigError, match=r"^deepspeed asks for ZeRO stage 3 without"):
        check_sharding(asked(deepspeed=str(file)))
    for text in ("[]", "no JSON"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"^deepspeed names .*zero\.json.*: correct it"):
            check_sharding(asked(deepspeed=str(file)))
    with pytest.raises(ConfigError, match=r"^deepspeed names 'no-such-file', which is neither"):
        check_sharding(asked(deepspeed="no-such-file"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_sharding(asked())  # accelerate's own default is stage 2
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(ConfigError, match=r"^the environment .* ZeRO stage 3 without"):
        check_sharding(asked())
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "true")
    check_sharding(asked())
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    file.write_text(json.dumps(UNGATHERED | AUTO))  # accelerate then takes the launcher's stage
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false")
    with pytest.raises(ConfigError, match=r"^the environment .* ZeRO stage 3 without"):
        check_sharding(asked())
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    with pytest.raises(ConfigError, match=r"zero_optimization\.offload_param, which keeps the wei"):
        check_sharding(asked())


# ---- the launch configurations that come with the recipes ----------------------------------------

CONFIGURATIONS = sorted(
    (Path(neat_align.__file__).parent / "cli/recipes/accelerate").glob("*.yaml")
)


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=[f.stem for f in CONFIGURATIONS])
def test_shipped_launch_configurations_are_let_through(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the variables that `accelerate launch` makes of them."""
    settings = yaml.safe_load(file.read_text())
    fsdp, zero = settings.get("fsdp_config"), settings.get("deepspeed_config")
    monkeypatch.setenv("LOCAL_RANK", "0")
    if fsdp:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        for name, value in fsdp.items():
            monkeypatch.setenv(
                name.upper(), str(value).lower() if value in (True, False) else str(value)
            )
    if zero:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        for name, value in zero.items():
            monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name.upper()}", str(value).lower())
    check_sharding(asked())
