"""The model of a round's time and memory: numbers derived by hand, and docs/scale.md shows them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts_as_modules import script

ROOT = Path(__file__).resolve().parent.parent
scale: Any = script("scale_model")
# A machine of round numbers: everything that is asked of it is reached.
PLAIN = scale.Machine(
    flops=1e12,
    bandwidth=1e9,
    memory=1e12,
    node_link=1e9,
    network=1e8,
    compute=1.0,
    read=1.0,
    link=1.0,
    step_seconds=0.0,
    hop_seconds=0.0,
    usable=1.0,
)
# 2 layers: attention 2·4·2·(2 + 1) = 48 weights, feed-forward 3·4·8 = 96; head 4·10.
SMALL = scale.Shape("small", 4, 2, 2, 1, 2, 8, 10)
WORK = scale.Round(
    prompts=4,
    prompt=10,
    instruction=0,
    completions=2,
    origins=1,
    completion=6,
    longest=6,
    groups_per_step=2,
    micro_batch_tokens=44,
)
FULL, SHARDED = scale.PLANS[0], scale.PLANS[1]


def test_the_shapes_have_the_weights_that_their_makers_name() -> None:
    assert scale.LLAMA_1B.weights == pytest.approx(1.236e9, rel=1e-3)
    assert scale.LLAMA_8B.weights == pytest.approx(8.030e9, rel=1e-3)
    assert scale.LLAMA_70B.weights == pytest.approx(70.55e9, rel=1e-3)
    assert scale.LLAMA_8B.cache_width * 2 == 128 * 1024  # bytes a token in bf16
    assert (SMALL.layer_weights, SMALL.head_weights, SMALL.weights) == (144, 40, 368)
    assert replace(SMALL, tied=True).weights == 328


def test_a_group_costs_its_tokens_and_what_they_attend_to() -> None:
    # 10 + 2·6 tokens through 288 weights, 12 through the head's 40, two FLOPs each.
    matrices = 2 * (22 * 288 + 12 * 40)
    # 4·2·2·2 = 32 FLOPs a token and a token seen: the prompt's see 5 on average, answers' 10 + 3.
    attention = 32 * (10 * 5 + 12 * 13)
    assert scale.forward_flops(SMALL, WORK) == matrices + attention == 20_224
    assert scale.training_passes("full", checkpointing=True) == 4
    assert scale.training_passes("lora", checkpointing=False) == 2


def test_memory_is_counted_by_weight() -> None:
    assert scale.state_bytes(SMALL, FULL, PLAIN, 1) == 368 * (16 + 2)
    assert scale.state_bytes(SMALL, SHARDED, PLAIN, 16) == 368 * 18 / 16
    within = replace(SHARDED, sharded="node")
    assert scale.state_bytes(SMALL, within, PLAIN, 16) == 368 * 18 / 8
    lora = scale.PLANS[2]
    assert scale.state_bytes(SMALL, lora, PLAIN, 4) == pytest.approx(368 * (2 + 0.08))
    # Inputs of 2 layers and the inside of one: 44 tokens · 2 bytes · (4·2 + 10·4 + 4·8).
    assert scale.activation_bytes(SMALL, WORK) == 44 * 2 * 80


def test_a_decoding_step_reads_all_weights_and_the_cache() -> None:
    step = scale.decode_step(SMALL, WORK, PLAIN, batch=8, split=1, weight_bytes=2)
    # 328 weights, and 8 sequences of 10 + 3 tokens of 2·2·1·2 = 8 numbers, two bytes each.
    assert step["reading the cache"] == pytest.approx((328 * 2 + 8 * 13 * 8 * 2) / 1e9)
    assert step["arithmetic"] == pytest.approx(8 * (2 * 328 + 32 * 13) / 1e12)
    alone = scale.decode_step(SMALL, WORK, PLAIN, batch=1, split=2, weight_bytes=2)
    assert alone["reading weights"] == pytest.approx((656 + 208) / 2e9)


def test_sampling_is_steps_and_prompts() -> None:
    phase = scale.sampling(SMALL, FULL, WORK, PLAIN, 1)
    step = (656 + 8 * 208) / 1e9
    prompt = 4 * (2 * 10 * 288 + 32 * 5 * 10) / 1e12
    assert phase.seconds == pytest.approx(6 * step + prompt)
    assert "longest answer" in phase.bound  # all eight fit at once
    two = scale.sampling(SMALL, FULL, WORK, PLAIN, 2)  # four sequences each, weights read by both
    assert two.seconds == pytest.approx(6 * (656 + 4 * 208) / 1e9 + prompt / 2)


def test_what_does_not_fit_waits_for_a_place_and_more_than_that_is_refused() -> None:
    sequence = 16 * 8 * 2  # tokens of the longest, numbers, bytes
    state = 368 * 18 + 368 * 2
    room = replace(PLAIN, memory=state + 16 * sequence)
    many = replace(WORK, prompts=16)  # 32 sequences at 16 places
    phase = scale.sampling(SMALL, FULL, many, room, 1)
    assert phase.bound == "reading the cache"
    steps = 6 * 32 / 16
    assert phase.parts["reading the cache"] == pytest.approx(steps * (656 + 16 * 208) / 1e9)
    with pytest.raises(ValueError, match="small does not fit on 1 GPUs to sample from"):
        scale.sampling(SMALL, FULL, many, replace(room, memory=state), 1)


def test_training_sends_what_its_plan_asks_for() -> None:
    # Two steps of a group a GPU; forward four times; gradients of 368 weights in fp32, there and
    # back, half of them to the other.
    phase = scale.training(SMALL, FULL, WORK, PLAIN, 2)
    assert phase.parts["arithmetic"] == pytest.approx(2 * 4 * 20_224 / 1e12)
    assert phase.parts["the network"] == pytest.approx(2 * 2 * 4 * 368 / 2 / 1e9)
    assert phase.more == pytest.approx(2 * 28 * 368 / 1e9)
    sharded = scale.training(SMALL, SHARDED, WORK, PLAIN, 2)
    # Weights in bf16 twice for one micro-batch, gradients once, half of each from the other.
    assert sharded.parts["the network"] == pytest.approx(2 * (2 * 2 * 368 + 4 * 368) / 2 / 1e9)
    assert sharded.more == pytest.approx(phase.more / 2)
    # Sixteen GPUs are two nodes: everything over the slow link, or gradients of a shard only.
    over_all = scale.gradient_seconds(368, SHARDED, PLAIN, 16)
    assert over_all == pytest.approx(4 * 368 * 15 / 16 / 1e8)
    within = scale.gradient_seconds(368, replace(SHARDED, sharded="node"), PLAIN, 16)
    assert within == pytest.approx(4 * 368 * 7 / 8 / 1e9 + 2 * 4 * 368 / 8 / 2 / 1e8)


def test_the_plan_is_the_first_that_fits() -> None:
    names = {
        (shape.name, gpus): scale.plan_for(shape, scale.Round(), scale.H100, gpus).name
        for shape, gpus in scale.SIZES
    }
    assert names["1B", 1] == "full, DDP"
    assert names["8B", 1] == "LoRA, DDP"
    assert names["8B", 8] == "full, FSDP2"
    assert names["70B", 1] == "LoRA, 4-bit base"
    assert names["70B", 64] == "full, FSDP2"
    for (name, gpus), _ in names.items():
        shape = next(s for s, _ in scale.SIZES if s.name == name)
        assert scale.row(shape, scale.Round(), scale.H100, gpus).bytes_used <= 0.9 * 80e9


def test_sampling_ahead_gains_nothing_where_everything_scales() -> None:
    """Of work that splits evenly, GPUs that sample and GPUs that learn do no more than all do."""
    work = scale.Round(prompts=4096 * 64, groups_per_step=4096 * 8)
    free = replace(scale.H100, step_seconds=0, hop_seconds=0, node_link=1e18, network=1e18)
    ahead = scale.sampling_ahead(scale.LLAMA_1B, work, free, 64)
    assert 0.85 < ahead.gain < 1.1
    assert scale.sampling_ahead(scale.LLAMA_1B, scale.Round(), scale.H100, 512).gain > 1.2


def printed(*arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / "scripts" / "scale_model.py"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_document_shows_what_the_model_says_and_what_was_measured() -> None:
    shown = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
    result = ROOT / "docs" / "results" / "scale-check.json"
    tables = [line for line in (*printed(), *printed("--check", str(result))) if line]
    for line in tables:
        assert line in shown
    # No other table of the document holds a number.
    others = [line for line in shown if line.startswith("|") and line not in tables]
    assert not [line for line in others if re.search(r"\d", line)]
    found = json.loads(result.read_text(encoding="utf-8"))
    assert re.fullmatch(r"[0-9a-f]{12}", found["commit"]), "a result must come from a clean commit"
    assert {"torch", "transformers", "python"} <= found["versions"].keys()
    assert found["machine"]["threads"] >= 1


@pytest.mark.slow
def test_the_check_of_the_model_runs(tmp_path: Path) -> None:
    found = run_benchmark("scale_check.py", tmp_path, "--tiny", "--repeats=1")
    assert found["measured_seconds"].keys() == found["predicted_seconds"].keys()
    assert all(seconds > 0 for seconds in found["predicted_seconds"].values())


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_on_a_cpu_with_models_of_nothing(tmp_path: Path) -> None:
    only = "--only=machine,train-demo,round"
    found = run_benchmark("gpu_check.py", tmp_path, "--tiny", only)
    assert found["tiny"] is True
    assert found["failed"] == {}
    train = found["sections"]["train-demo"]
    assert set(train["seconds"]) >= {"neat", "strong"}
    assert train["max_logprob_difference"] < 1e-4
    assert found["sections"]["round"]["model"].startswith("random (tiny)")
    assert {"commit", "machine", "versions", "device"} <= found.keys()


def run_benchmark(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    path = folder / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments, "--json", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
