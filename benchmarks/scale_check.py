"""Does the model of scripts/scale_model.py say what a small model takes? One group of phases of a
round, predicted from measured FLOP/s and bandwidth, and measured.

    python benchmarks/scale_check.py --json docs/results/scale-check.json

A random Llama of 20 million weights in fp32. The machine's figures are measured first: a product of
matrices of the model's size, the sum of a tensor larger than any cache, and what a decoding step
costs in a model whose layers are too small to compute anything. None of the phases is fitted.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import harness
import torch
from train_step import gradient_step
from transformers import AutoModelForCausalLM, LlamaConfig

from neat_align.modeling.logprobs import completion_logprobs, score_completions
from neat_align.modeling.packing import pack_rows
from neat_align.sampling.protocol import SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler

READ_BYTES = 256 * 2**20


def scale_model() -> ModuleType:
    """scripts/scale_model.py."""
    path = Path(__file__).resolve().parents[1] / "scripts" / "scale_model.py"
    spec = importlib.util.spec_from_file_location("scale_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale_model"] = module
    spec.loader.exec_module(module)
    return module


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """The median after one run to warm up."""
    return harness.spread(harness.in_turn({"it": work}, repeats)["it"])["median"]


def measured_flops(tokens: int, width: int, out: int, dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of a product of these sizes."""
    a, b = (
        torch.randn(*size, dtype=dtype, device=harness.device())
        for size in ((tokens, width), (width, out))
    )
    times = max(1, int(2e9 / (2 * tokens * width * out)))

    def products() -> None:
        for _ in range(times):
            a @ b

    return times * 2 * tokens * width * out / seconds_of(products, repeats)


def measured_bandwidth(repeats: int) -> float:
    """Bytes/s of reading memory once."""
    numbers = torch.ones(READ_BYTES // 4, device=harness.device())
    return READ_BYTES / seconds_of(numbers.sum, repeats)


def llama(shape: Any) -> Any:
    """A random model of a shape, in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(harness.device())


def sample(model: Any, work: Any, batch: int) -> None:
    """All completions of the round, each of its full length."""
    asked = [
        SampleRequest(tuple(range(5 + i, 5 + i + work.prompt)), 1000 * i + k)
        for i in range(work.prompts)
        for k in range(work.completions)
    ]
    sampler = TransformersSampler(model, (), 0, batch, None)
    assert all(
        len(s.token_ids) == work.completion
        for s in sampler.sample(asked, SamplingParams(work.completion))
    )


def phases(model: Any, work: Any) -> dict[str, Callable[[], None]]:
    """What a round does, on one machine."""
    prompts = [list(range(5 + i, 5 + i + work.prompt)) for i in range(work.prompts)]
    answers = [
        [list(range(9 + k, 9 + k + work.completion)) for k in range(work.completions)]
        for _ in prompts
    ]
    flat = [p for p in prompts for _ in range(work.completions)]

    def score() -> None:
        completions = [ids for group in answers for ids in group]
        score_completions(
            model, flat, completions, layout="packed", pad_token_id=0, autocast_dtype=None
        )

    def train() -> None:
        model.train()
        for prompt, group in zip(prompts, answers, strict=True):
            model.zero_grad(set_to_none=False)
            rows = pack_rows([prompt], [group]).to(harness.device())
            gradient_step(lambda rows=rows: completion_logprobs(model, rows))
        model.eval()

    return {
        "sampling": lambda: sample(model, work, work.prompts * work.completions),
        "log-probabilities": score,
        "training": train,
    }


def predicted(scale: ModuleType, shape: Any, work: Any, machine: Any) -> dict[str, float]:
    """The same phases by the model, with what the machine was measured to do."""
    plan = scale.Plan("fp32", "full", "no", frozen_bytes=4.0, own_engine=False)
    return {
        "sampling": scale.sampling(shape, plan, work, machine, 1).seconds,
        "log-probabilities": scale.scoring(shape, plan, work, machine, 1).seconds,
        "training": scale.training(shape, plan, work, machine, 1).seconds,
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a model of nothing: the script's test")
    args = parser.parse_args()
    scale = scale_model()
    shape = scale.Shape("20M", 384, 8, 6, 2, 64, 1024, 16_384, tied=True)
    sizes = {"prompts": 4, "prompt": 128, "completion": 64, "longest": 64, "completions": 8}
    if args.tiny:
        shape = scale.Shape("tiny", 32, 2, 4, 2, 8, 64, 512, tied=True)
        sizes = {"prompts": 2, "prompt": 16, "completion": 8, "longest": 8, "completions": 2}
    work = scale.Round(
        **sizes, instruction=0, origins=1, groups_per_step=1, scoring_passes=1, checkpointing=False
    )
    nothing = scale.replace(shape, hidden=8, heads=1, kv_heads=1, head_dim=8, intermediate=8)
    empty = llama(scale.replace(nothing, vocabulary=512))
    one_step = seconds_of(
        lambda: sample(empty, work, work.prompts * work.completions), args.repeats
    )
    flops = measured_flops(
        work.group_tokens, shape.hidden, shape.intermediate, torch.float32, args.repeats
    )
    machine = scale.Machine(
        flops=flops,
        bandwidth=measured_bandwidth(args.repeats),
        memory=1e18,
        node_link=1e18,
        network=1e18,
        compute=1.0,
        read=1.0,
        step_seconds=one_step / work.completion,
        number_bytes=4,
    )
    began = time.perf_counter()
    model = llama(shape).eval()
    measured = {n: seconds_of(w, args.repeats) for n, w in phases(model, work).items()}
    told = predicted(scale, shape, work, machine)
    result = {
        "model": {"weights": shape.weights, "dtype": "fp32", "device": harness.device().type},
        "round": sizes,
        "measured_machine": {
            "flops": machine.flops,
            "bandwidth": machine.bandwidth,
            "step_seconds": machine.step_seconds,
        },
        "predicted_seconds": told,
        "measured_seconds": measured,
        "wall_seconds": time.perf_counter() - began,
    }
    for line in scale.check_table(result):
        print(line)
    harness.save(args.json, result)


if __name__ == "__main__":
    main()
