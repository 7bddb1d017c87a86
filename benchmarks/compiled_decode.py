"""Does a compiled decoding step on a static cache beat the sampler's own on a growing one?

    python benchmarks/compiled_decode.py --json OUT

`--rows` sequences of `--prompt` tokens, `--completion` tokens each, greedily, the prompts read
anew every time; what is compiled is compiled in the first, uncounted run, whose seconds are given.

  neat             the sampler's rows: a cache that grows, `decode_attention` on a CPU
  static           transformers' static cache, as long as the longest row, the model as it is
  static compiled  the same, its step compiled by torch (CUDA graphs on a GPU), as transformers'
                   `generate` does by itself on a GPU
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import harness
import torch
from transformers import StaticCache

from neat_align.modeling.precision import half_precision_copy, inference
from neat_align.sampling.decode_check import fast_decoding
from neat_align.sampling.token_rows import CachedRows

Decode = Callable[[], torch.Tensor]


def growing(model: Any, prompts: torch.Tensor, tokens: int) -> Decode:
    rows = [tuple(row) for row in prompts.tolist()]

    def decode() -> torch.Tensor:
        with inference(model, None), fast_decoding(model):
            cached = CachedRows(model, rows, pad_token_id=0)
            drawn = [cached.logits.argmax(-1)]
            for _ in range(tokens - 1):
                cached.advance(drawn[-1])
                drawn.append(cached.logits.argmax(-1))
        return torch.stack(drawn, 1)

    return decode


def static(model: Any, prompts: torch.Tensor, tokens: int, step: Callable[..., Any]) -> Decode:
    width = prompts.shape[1]
    # One cache for every run: another one would be compiled anew.
    cache = StaticCache(config=model.config, max_cache_len=width + tokens)

    def decode() -> torch.Tensor:
        cache.reset()
        with torch.no_grad():
            output = model(input_ids=prompts, past_key_values=cache, logits_to_keep=1)
            last = output.logits[:, -1].argmax(-1)
            drawn = [last]
            for i in range(tokens - 1):
                at = torch.full((len(prompts), 1), width + i, device=prompts.device)
                output = step(
                    input_ids=last[:, None],
                    position_ids=at,
                    past_key_values=cache,
                    logits_to_keep=1,
                )
                last = output.logits[:, -1].argmax(-1).clone()
                drawn.append(last)
        return torch.stack(drawn, 1)

    return decode


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="bf16")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    model = harness.load_model(args.model).to(harness.device()).eval()
    dtype = harness.DTYPES[args.dtype]
    if dtype is not None:
        model = half_precision_copy(model, dtype)
    mode = "reduce-overhead" if harness.device().type == "cuda" else "default"
    found: dict[str, Any] = {}
    for count in args.rows:
        torch.compiler.reset()
        ids = torch.arange(count * args.prompt, device=harness.device()) * 7919 % 40_000 + 100
        prompts = ids.view(count, args.prompt)
        compiled = torch.compile(model.forward, mode=mode, fullgraph=True)
        sides = {
            "neat": growing(model, prompts, args.completion),
            "static": static(model, prompts, args.completion, model),
            "static compiled": static(model, prompts, args.completion, compiled),
        }
        first = {name: timed_once(side) for name, side in sides.items()}
        seconds = harness.in_turn(sides, args.repeats)
        found[f"{count} rows"] = {
            "first run": first,
            "seconds": {name: harness.spread(values) for name, values in seconds.items()},
            "ours over it": {
                name: harness.speedup(seconds["neat"], values)["median"]
                for name, values in seconds.items()
            },
        }
        rows = [
            [name, f"{first[name]:.1f}", f"{harness.spread(values)['median']:.2f}"]
            for name, values in seconds.items()
        ]
        harness.show(f"{count} rows, {args.dtype}", ["side", "first run s", "seconds"], rows)
    names = ("prompt", "completion", "dtype", "model", "repeats")
    setting = {name: getattr(args, name) for name in names} | {"device": harness.device().type}
    harness.save(args.json, {"setting": setting, "rows": found})


def timed_once(side: Decode) -> float:
    start = time.perf_counter()
    side()
    harness.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
