"""The recipes for several GPUs: launch configurations that accelerate itself accepts, and commands
that name files which are there. (tests/test_api.py runs every recipe on a tiny model.)
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env

from neat_align.cli.options import recipe_path

RECIPES = recipe_path("demo").parent
LAUNCHES = sorted((RECIPES / "accelerate").glob("*.yaml"))
ON_GPUS = ("one-gpu-8b-lora", "eight-gpus-8b")


@pytest.fixture(autouse=True)
def no_threads_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda p: p.stem)
def test_accelerate_reads_its_configurations_and_knows_every_key(path: Path) -> None:
    """Its loader lets unknown keys of a section pass, its command line does not."""
    parser = launch_command_parser()
    node = ["--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    words = ["--config_file", str(path), *node, "-m", "neat_align", "train"]
    args, config, _ = _validate_launch_command(parser.parse_args(words))
    assert args.module
    assert args.training_script == "neat_align"
    assert args.mixed_precision == "bf16"
    assert args.num_processes == 8 * args.num_machines
    known = {action.dest for action in parser._actions}
    for section in (config.fsdp_config, config.deepspeed_config):
        assert set(section) <= known
    assert args.use_fsdp != args.use_deepspeed
    if args.use_deepspeed:
        assert args.zero_stage == 3
        recipe = yaml.safe_load(recipe_path("eight-gpus-8b").read_text(encoding="utf-8"))
        assert args.gradient_accumulation_steps == recipe["gradient_accumulation_steps"]
        return
    with patch_environment(**prepare_multi_gpu_env(args)):
        assert os.environ["FSDP_VERSION"] == "2"
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing is False


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_recipes_commands_name_files_that_are_there(name: str) -> None:
    text = recipe_path(name).read_text(encoding="utf-8")
    named = re.findall(r"recipes/([\w/.-]+\.yaml)", text)
    assert f"{name}.yaml" in named
    for file in named:
        assert (RECIPES / file).is_file(), file
    assert "Unchecked on NCCL and real GPUs" in text


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda p: p.stem)
def test_every_launch_configuration_is_used_by_a_recipe_and_says_it_is_unchecked(
    path: Path,
) -> None:
    recipe = recipe_path("eight-gpus-8b").read_text(encoding="utf-8")
    assert f"--config_file recipes/accelerate/{path.name}" in recipe
    assert "Unchecked on NCCL and real GPUs" in path.read_text(encoding="utf-8")
