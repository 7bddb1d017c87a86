"""Runs whose weights two processes divide are those of one process that has all of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch import launch

SCRIPT = "two_shards_train.py"
pytestmark = [pytest.mark.distributed, pytest.mark.slow]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def read(folder: Path, name: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / name, weights_only=True)
    return found


def facts(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"facts-{rank}.json").read_text())
    return found


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float
) -> None:
    """Within `limit` of each tensor's largest number."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert float((found[name] - value).abs().max()) <= limit * scale, name


@pytest.mark.parametrize("what", ["full-checkpointing", "tied-padded", "distil-lora"])
def test_fsdp2_trains_what_one_process_trains(tmp_path: Path, what: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    launch(SCRIPT, one, what, processes=1)
    launch(SCRIPT, two, what)
    assert facts(two)["sharding"] == "fsdp2"
    assert facts(two)["is_sharded"]
    # A frozen copy is divided too; an adapter that is switched off is the policy.
    assert facts(two)["reference_is_sharded"]
    assert facts(two)["layout"] == facts(one)["layout"]
    assert facts(two)["layout"] == ("padded" if "padded" in what else "packed")
    # Ranks cut their groups into other numbers of micro-batches: those with fewer add passes.
    assert sum(facts(two, rank)["passes_added"] for rank in (0, 1)) > 0
    assert facts(two)["loss"] == pytest.approx(facts(one)["loss"], rel=1e-6)
    for rank in (0, 1):
        gradients = read(two, f"gradients-{rank}.pt")
        assert_close(gradients, read(one, "gradients-0.pt"), 1e-6)
        assert_close(read(two, f"weights-{rank}.pt"), read(one, "weights-0.pt"), 1e-6)


def test_an_fsdp2_run_that_was_stopped_goes_on_exactly(tmp_path: Path) -> None:
    """A signal to the second process; what is then missing makes a checkpoint incomplete."""
    launch(SCRIPT, tmp_path / "whole", "full")
    cut = tmp_path / "cut"
    launch(SCRIPT, cut, "cut")
    for rank in (0, 1):
        said = (cut / f"stopped-{rank}.txt").read_text()
        assert said.startswith("RunInterrupted: stopped by SIGTERM after step 2; checkpoint-2 is")
    complete = json.loads((cut / "checkpoint-2" / "COMPLETE.json").read_text())["files"]
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin", "rng_state_1.pth", "model.safetensors"):
        assert name in complete
    launch(SCRIPT, cut, "resume")
    for rank in (0, 1):
        expected = read(tmp_path / "whole", f"weights-{rank}.pt")
        assert_close(read(cut, f"weights-{rank}.pt"), expected, 0.0)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "CollapseError: the loss is nan at step 2"),
        ("fail", "RewardError: reward function 'failing' raised ValueError on a batch"),
    ],
)
def test_what_goes_wrong_on_one_process_ends_both(tmp_path: Path, what: str, message: str) -> None:
    launch(SCRIPT, tmp_path, what)
    for rank in (0, 1):
        assert (tmp_path / f"stopped-{rank}.txt").read_text().startswith(message)


@needs_deepspeed
@pytest.mark.parametrize("what", ["full", "distil-lora"])
def test_zero_3_trains_what_one_process_trains(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed keeps gradients in fp32, and AdamW's first steps are signs: weights loosely."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    one, two = tmp_path / "one", tmp_path / "two"
    launch(SCRIPT, one, what, processes=1)
    launch(SCRIPT, two, f"zero3-{what}")
    assert facts(two)["sharding"] == "zero3"
    assert facts(two)["is_sharded"]
    assert facts(two)["reference_is_sharded"]
    assert facts(two)["loss"] == pytest.approx(facts(one)["loss"], rel=1e-5)
    name = "adapter_model.safetensors" if "lora" in what else "model.safetensors"
    for step in (1, 3):
        alone, together = (load_file(f / f"checkpoint-{step}" / name) for f in (one, two))
        assert alone.keys() == together.keys()
        for weight, value in alone.items():
            torch.testing.assert_close(together[weight], value, rtol=0, atol=1e-3)
    files = json.loads((two / "checkpoint-3" / "COMPLETE.json").read_text())["files"]
    for rank in (0, 1):
        assert f"global_step3/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in files


@needs_deepspeed
def test_a_zero_3_run_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch(SCRIPT, tmp_path / "whole", "zero3")
    launch(SCRIPT, tmp_path / "cut", "zero3-cut")
    launch(SCRIPT, tmp_path / "cut", "zero3-resume")
    whole, cut = (
        load_file(tmp_path / name / "checkpoint-3" / "model.safetensors")
        for name in ("whole", "cut")
    )
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=0, atol=0)
