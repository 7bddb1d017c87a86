"""benchmarks/round.py: what its numbers rest on, at a tiny size."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_model, tiny_tokenizer

pytest.importorskip("psutil", reason="the benchmarks need psutil: pip install -e '.[bench]'")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TOKENIZER = tiny_tokenizer()
SIZE = argparse.Namespace(
    peer="grpo", prompt=24, completion=3, k=2, prompts=2, rows=4, max_tokens=512, dtype="bf16"
)


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import round as found

        yield found
    finally:
        sys.path.remove(str(BENCHMARKS))


def texts(benchmark: Any) -> list[str]:
    return [benchmark.text_of(TOKENIZER, SIZE.prompt, i) for i in range(SIZE.prompts)]


def test_our_side_trains_on_whole_completions_and_its_stages_make_up_its_time(
    benchmark: Any,
) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    # Room for the longest prompt that NEATConfig allows by default.
    model.config.max_position_embeddings = 1024
    run = benchmark.one_step(benchmark.NEAT, SIZE, model, TOKENIZER, texts(benchmark))
    assert run.kept == 1.0
    assert set(run.stages) == {"sample", "score", "step", "rest"}
    assert all(0 < seconds < run.seconds for seconds in run.stages.values())
    assert sum(run.stages.values()) == pytest.approx(run.seconds)


def test_a_side_leaves_torch_as_it_found_it(benchmark: Any) -> None:
    before = torch.get_float32_matmul_precision()
    best = benchmark.PEERS["grpo_best"]
    with best.training(SIZE):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    with best.training(argparse.Namespace(**{**vars(SIZE), "dtype": "fp32"})):
        assert torch.get_float32_matmul_precision() == "highest"


def test_every_side_reports_what_it_was_configured_with(benchmark: Any) -> None:
    found = {name: side.configuration(SIZE) for name, side in benchmark.PEERS.items()}
    assert [name for name, one in found.items() if not one["equal_work"]] == ["grpo_bf16_weights"]
    for name, one in found.items():
        has_reference = name == "grpo_kl" or name.startswith("online_dpo")
        ours = benchmark.NEAT.configuration(argparse.Namespace(**{**vars(SIZE), "peer": name}))
        assert ours["training_arguments"].get("kl_weight", 1.0) == float(has_reference)
        assert one["training_arguments"].get("beta", 0.0) == 0.04 * (name == "grpo_kl")
    assert found["grpo_best"]["attn_implementation"] == "sdpa"
    assert found["online_dpo_best"]["training_arguments"]["per_device_train_batch_size"] == 2
    assert found["grpo_compact_head"]["changed_in_trl"]
    assert all("output_dir" not in one["training_arguments"] for one in found.values())


@pytest.mark.slow
def test_the_changed_head_of_trl_gives_the_same_log_probabilities(benchmark: Any) -> None:
    utils = pytest.importorskip(
        "trl.trainer.utils", reason="the comparison with TRL needs trl: pip install -e '.[bench]'"
    )
    ids = torch.randint(3, len(TOKENIZER), (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = -100

    def found() -> torch.Tensor:
        model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
        utils.add_fused_lm_head(model)
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        values: torch.Tensor = output.log_probs[:, -3:]
        values.sum().backward()
        return torch.cat([values.detach().flatten(), model.lm_head.weight.grad.flatten()])

    whole = found()
    with benchmark.compact_heads():
        compact = found()
    torch.testing.assert_close(compact, whole)
