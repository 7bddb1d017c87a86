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
from small_trainer import TOKENIZER, logged
from tiny import tiny_model

SCRIPT, RUN_SCRIPT = "two_shards_train.py", "two_shards_run.py"
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


def steps(folder: Path) -> list[dict[str, Any]]:
    """What was logged of each step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float
) -> None:
    """Within `limit` of each tensor's largest number."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert float((found[name] - value).abs().max()) <= limit * scale, name


@pytest.mark.parametrize("what", ["full-checkpointing", "once-tied-padded", "once-distil-lora"])
def test_fsdp2_trains_what_one_process_trains(tmp_path: Path, what: str) -> None:
    """With `once` the first process alone has the weights to begin with."""
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
    """DeepSpeed keeps gradients in fp32, and AdamW's first steps are signs: weights loosely, and no
    round but the first two, before such a sign has moved an answer.
    """
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    one, two = tmp_path / "one", tmp_path / "two"
    launch(SCRIPT, one, what, processes=1)
    launch(SCRIPT, two, f"zero3-{what}")
    assert facts(two)["sharding"] == "zero3"
    assert facts(two)["is_sharded"]
    assert facts(two)["reference_is_sharded"]
    for alone, together in zip(steps(one)[:2], steps(two)[:2], strict=True):
        for number in ("loss", "grad_norm", "loss/ranking", "loss/lm", "loss/distil"):
            assert together[number] == pytest.approx(alone[number], rel=1e-4, abs=1e-6), number
    name = "adapter_model.safetensors" if "lora" in what else "model.safetensors"
    first, second = (load_file(folder / "checkpoint-1" / name) for folder in (one, two))
    assert first.keys() == second.keys()
    for weight, value in first.items():
        torch.testing.assert_close(second[weight], value, rtol=0, atol=5e-4)
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


# ---- what is evaluated before training -----------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def evaluation(folder: Path, when: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / f"evaluation-{when}.json").read_text())
    return found


def assert_same_evaluation(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same answers and rewards, and the same numbers but for rounding."""
    assert found["completions"] == expected["completions"]
    assert found["rewards"] == expected["rewards"]
    numbers = ("perplexity", "kl", "entropy")
    for name in [n for n in numbers if expected[n] is not None]:
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def befores(folder: Path) -> int:
    """How often the evaluation before training stands in metrics.jsonl."""
    return sum("before_reward" in line for line in logged(folder / "run"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    launch(RUN_SCRIPT, folder, model, "full", processes=1)
    return folder


def test_the_start_is_evaluated_once_its_weights_are_divided(
    tmp_path: Path, model: str, alone: Path
) -> None:
    """Also where the run then stops in its first round, and goes on without a checkpoint.

    The first process alone loads the weights.
    """
    launch(RUN_SCRIPT, tmp_path, model, "once-fail")
    assert [facts(tmp_path, rank)["loaded"] for rank in (0, 1)] == [["cpu"], ["meta"]]
    for rank in (0, 1):
        assert facts(tmp_path, rank)["said"].startswith("RewardError: ")
        assert facts(tmp_path, rank)["divided"] == [True]
    assert befores(tmp_path) == 1
    launch(RUN_SCRIPT, tmp_path, model, "once-resume")
    for rank in (0, 1):
        assert facts(tmp_path, rank)["divided"] == [True]  # the evaluation after training alone
    assert befores(tmp_path) == 1
    assert "before_reward" in logged(tmp_path / "run")[0]
    for when in ("before", "after"):
        assert_same_evaluation(evaluation(tmp_path, when), evaluation(alone, when))


def test_the_evaluate_command_divides_a_model_and_a_script_may_not_do_so_before_training(
    tmp_path: Path, model: str, alone: Path
) -> None:
    """A new adapter changes nothing. One row of it has no room for two processes."""
    launch(RUN_SCRIPT, tmp_path, model, "once-evaluate-early-lora")
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert_same_evaluation(found, evaluation(alone, "before"))
    for rank in (0, 1):
        assert facts(tmp_path, rank)["divided"] == [True]
        said = facts(tmp_path, rank)["said"]
        assert said.startswith(
            "ConfigError: the policy is called before it is trained, and the run is divided by"
        )
        assert "eval_on_start: true" in said


@needs_deepspeed
@pytest.mark.parametrize("what", ["zero3", "zero2"])
def test_under_deepspeed_the_start_is_evaluated_as_one_process_does(
    tmp_path: Path, model: str, alone: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch(RUN_SCRIPT, tmp_path, model, what)
    assert facts(tmp_path)["divided"] == [what == "zero3"] * 2
    expected = evaluation(alone, "before")
    assert_same_evaluation(evaluation(tmp_path, "before"), expected)
    launch(RUN_SCRIPT, tmp_path / "evaluated", model, f"evaluate-{what}")
    found = json.loads((tmp_path / "evaluated" / "run" / "evaluation.json").read_text())
    assert_same_evaluation(found, expected)
