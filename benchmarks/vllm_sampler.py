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
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neat_align.files.provenance import commit, cpu_name, versions
from neat_align.modeling.logprobs import score_completions
from neat_align.modeling.precision import half_precision_copy
from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from neat_align.sampling.vllm_client import VllmClient
from neat_align.sampling.vllm_sampler import VllmSampler

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def requests(
    tokenizer: Any, prompts: int, tokens: int, k: int, first_seed: int
) -> list[SampleRequest]:
    """`k` completions each of prompts that share nothing, of so many tokens."""
    filler = tokenizer("The weather was good and the walk was long, so we talked. ").input_ids
    asked = []
    for i in range(prompts):
        ids = [*tokenizer(f"Story {i}: ").input_ids, *(filler * tokens)][:tokens]
        asked += [SampleRequest(tuple(ids), first_seed + 1000 * i + j) for j in range(k)]
    return asked


def timed(
    sampler: Callable[[], Sampler], asked: Sequence[SampleRequest], tokens: int
) -> tuple[float, list[Sample]]:
    """Completion tokens a second; making the sampler is counted."""
    start = time.perf_counter()
    samples = sampler().sample(asked, SamplingParams(tokens))
    seconds = time.perf_counter() - start
    return sum(len(s.token_ids) for s in samples) / seconds, samples


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
    dtype = DTYPES[args.dtype]
    client = VllmClient(args.server, timeout=600.0)
    served = client.model()
    pad = tokenizer.pad_token_id or 0

    def by_server() -> Sampler:
        return VllmSampler(client, served.name, (), served.max_model_len, args.concurrency)

    def by_transformers() -> Sampler:
        copied = None if dtype is None else half_precision_copy(model, dtype)
        return TransformersSampler(copied or model, (), pad, args.batch)

    result: dict[str, Any] = {"speed": {}, "gap": {}}
    for prompts in args.prompts:
        speeds: dict[str, list[float]] = {"vllm": [], "transformers": []}
        for repeat in range(args.repeats + 1):
            asked = requests(tokenizer, prompts, args.prompt, args.k, 10_000_000 * repeat)
            for side, sampler in (("vllm", by_server), ("transformers", by_transformers)):
                speed, _ = timed(sampler, asked, args.completion)
                if repeat:
                    speeds[side].append(round(speed, 1))
        medians = {side: statistics.median(found) for side, found in speeds.items() if found}
        result["speed"][str(prompts * args.k)] = {"tokens_per_second": speeds, "median": medians}
    for tokens in dict.fromkeys((1, 4, 8, args.completion)):
        asked = requests(tokenizer, args.gap_prompts, args.prompt, 8, 7)
        _, samples = timed(by_server, asked, tokens)
        result["gap"][str(tokens)] = {
            name: gaps(model, asked, samples, kind)
            for name, kind in (("against " + args.dtype, dtype), ("against fp32", None))
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--model", required=True, help="the folder that the server serves")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
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
    result = measure(args)
    facts = {k: str(v) for k, v in vars(args).items()}
    whole = {
        "settings": facts,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "versions": versions(),
        "commit": commit(),
        **result,
    }
    text = json.dumps(whole, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
