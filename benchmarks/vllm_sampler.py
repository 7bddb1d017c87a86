"""Sampling: a running vLLM server against the transformers sampler, and how far their numbers are
apart.

    python benchmarks/vllm_sampler.py --server http://127.0.0.1:8000 --model PATH --json OUT

The same prompts, completions and tokens for both, exactly `--completion` tokens each (no end
token). One side works at a time, each on as many threads as it was given: OMP_NUM_THREADS here, and
where the server was started. The server serves PATH itself: nothing is given to it. Tokens per
second count completion tokens; the first batch of each side is not counted.

`gap` is what `sampler_tolerance` bounds: the difference between the server's log-probability of a
completion and the trainer's (autocast of `--dtype`; and in fp32), in nats, over the square root of
its tokens; of completions of `--completion` tokens and of 1, 4 and 8.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neat_align.modeling.logprobs import score_completions
from neat_align.modeling.precision import half_precision_copy
from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from neat_align.sampling.vllm_client import VllmClient
from neat_align.sampling.vllm_sampler import VllmSampler


def requests(tokenizer: Any, prompts: int, tokens: int, k: int) -> list[SampleRequest]:
    """`k` completions each of prompts that share nothing, of so many tokens."""
    filler = tokenizer("The weather was good and the walk was long, so we talked. ").input_ids
    asked = []
    for i in range(prompts):
        ids = [*tokenizer(f"Story {i}: ").input_ids, *(filler * tokens)][:tokens]
        asked += [SampleRequest(tuple(ids), 1000 * i + j) for j in range(k)]
    return asked


def gaps(
    model: Any, asked: Sequence[SampleRequest], samples: Sequence[Sample], dtype: Any
) -> dict[str, float]:
    """How far both log-probabilities of a completion are apart, in nats over the root of tokens."""
    own = score_completions(
        model,
        [r.prompt_ids for r in asked],
        [s.token_ids for s in samples],
        layout="padded",
        pad_token_id=0,
        autocast_dtype=dtype,
    )
    found = sorted(
        abs(sum(row) - s.logprob) / len(row) ** 0.5 for row, s in zip(own, samples, strict=True)
    )
    return {
        "completions": len(found),
        "median": statistics.median(found),
        "p99": found[int(0.99 * (len(found) - 1))],
        "largest": found[-1],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = harness.DTYPES[args.dtype]
    client = VllmClient(args.server, timeout=600.0)
    served = client.model()
    pad = tokenizer.pad_token_id or 0

    def by_server() -> Sampler:
        return VllmSampler(client, served.name, (), served.max_model_len, args.concurrency)

    def by_transformers() -> Sampler:
        copied = None if dtype is None else half_precision_copy(model, dtype)
        return TransformersSampler(copied or model, (), pad, args.batch)

    result: dict[str, Any] = {"speed": {}, "gap": {}}
    params = SamplingParams(args.completion)
    for prompts in args.prompts:
        asked = requests(tokenizer, prompts, args.prompt, args.k)
        seconds = harness.in_turn(
            {
                "vllm": lambda asked=asked: by_server().sample(asked, params),
                "transformers": lambda asked=asked: by_transformers().sample(asked, params),
            },
            args.repeats,
        )
        tokens = len(asked) * args.completion
        speeds = {side: [round(tokens / s, 1) for s in taken] for side, taken in seconds.items()}
        medians = {side: statistics.median(found) for side, found in speeds.items()}
        result["speed"][str(len(asked))] = {"tokens_per_second": speeds, "median": medians}
    asked = requests(tokenizer, args.gap_prompts, args.prompt, 8)
    for tokens in dict.fromkeys((1, 4, 8, args.completion)):
        samples = by_server().sample(asked, SamplingParams(tokens))
        result["gap"][str(tokens)] = {
            name: gaps(model, asked, samples, kind)
            for name, kind in (("against " + args.dtype, dtype), ("against fp32", None))
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--model", required=True, help="the folder that the server serves")
    parser.add_argument("--dtype", choices=tuple(harness.DTYPES), default="bf16")
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--k", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gap-prompts", type=int, default=16)
    parser.add_argument("--server-note", default="", help="how the server was started")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    harness.save(args.json, {"settings": settings, **measure(args)})


if __name__ == "__main__":
    main()
