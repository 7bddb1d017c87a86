"""Is a prompt kept once for its completions decoded faster than one that is kept for each?

    python benchmarks/shared_decode.py --json OUT

Steps of one token a row, after prompts of `P` tokens, `N` of them with `E` completions each, both
kinds of rows in turn in one process. `again` counts the tokens of prompts that one kind keeps more
than once: `row_kinds.SHARED_FROM` says from how many on the sampler takes the other.

  whole    a cache of whole rows (`token_rows.CachedRows`)
  shared   prompts once, completions' own tokens beside them (`shared_rows.SharedRows`)
"""

from __future__ import annotations

import time
from typing import Any

import harness
import torch

from neat_align.modeling.precision import half_precision_copy, inference
from neat_align.modeling.shared_prefix import attending_by
from neat_align.sampling.decode_attention import ATTENTION, SHARED_ATTENTION
from neat_align.sampling.shared_rows import SharedRows
from neat_align.sampling.token_rows import CachedRows

SIDES = {"whole": (CachedRows, ATTENTION), "shared": (SharedRows, SHARED_ATTENTION)}
# Tokens of a prompt, prompts, completions of each. The fourth is that of a round against GRPO in
# `round.py`, the fifth about the demo's.
POINTS = ((30, 8, 2), (64, 4, 8), (256, 2, 4), (273, 8, 4), (100, 32, 4), (512, 4, 8))


def step_seconds(model: Any, side: str, prompts: list[tuple[int, ...]], tokens: int) -> float:
    """Seconds a token of all rows; reading the prompts, which is alike, is not counted."""
    kind, attention = SIDES[side]
    with attending_by(model, attention), inference(model, None):
        rows = kind(model, prompts, 0)
        start = time.perf_counter()
        for _ in range(tokens):
            rows.advance(rows.logits.argmax(-1))
        return (time.perf_counter() - start) / tokens


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="bf16")
    args = parser.parse_args()
    model = harness.load_model(args.model).eval()
    dtype = harness.DTYPES[args.dtype]
    if dtype is not None:
        model = half_precision_copy(model, dtype)
    found: dict[str, Any] = {}
    rows = []
    for length, count, each in POINTS:
        ids = (torch.arange(length * count) * 7919 % 40_000 + 100).view(count, length)
        prompts = [tuple(row) for row in ids.tolist() for _ in range(each)]
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(args.repeats + 1):
            for side, values in seconds.items():
                value = step_seconds(model, side, prompts, args.completion)
                if number:
                    values.append(value)
        ratio = harness.speedup(seconds["whole"], seconds["shared"])
        again = length * count * (each - 1)
        found[f"P {length}, {count} prompts, {each} each"] = {
            "again": again,
            "seconds": {side: harness.spread(values) for side, values in seconds.items()},
            "speedup": ratio["median"],
            "speedup_range": [ratio["min"], ratio["max"]],
        }
        means = [f"{harness.spread(seconds[side])['median'] * 1e3:.1f}" for side in SIDES]
        shape = f"{length} x {count} x {each}"
        rows.append([shape, f"{again:,}", *means, f"{ratio['median']:.2f}x"])
    harness.show(
        f"one token of all rows, {args.dtype}",
        ["shape", "again", "whole ms", "shared ms", ""],
        rows,
    )
    setting = {name: getattr(args, name) for name in ("completion", "dtype", "model", "repeats")}
    harness.save(args.json, {"setting": setting, "points": found})


if __name__ == "__main__":
    main()
