"""How time and memory of a training step grow.

With K, with the prompt, with the completion, with the groups per batch.

    python benchmarks/scaling.py --json OUT

Ours against the strong baseline of train_step.py, which gets the same groups as padded rows. One
thing changes at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import harness
from torch import Tensor
from train_step import gradient_step, make_ids, strong_logprobs

from neat_align.modeling.logprobs import completion_logprobs
from neat_align.modeling.packing import pack_rows, pad_rows
from neat_align.modeling.precision import autocast

BASE = {"prompt": 256, "completion": 64, "k": 4, "groups": 1}
STEPS = {"k": (2, 4, 8), "prompt": (64, 256, 512), "completion": (32, 64, 128), "groups": (1, 2, 4)}


def make_sides(model: Any, point: dict[str, int], dtype: str) -> dict[str, Callable[[], None]]:
    prompt, completions = make_ids(point["prompt"], point["completion"], point["k"])
    groups = point["groups"]
    packed = pack_rows([prompt] * groups, [completions] * groups).to(harness.device())
    padded = pad_rows([prompt] * (groups * point["k"]), completions * groups, 0).to(
        harness.device()
    )

    def step(logps: Callable[[], Tensor]) -> None:
        def under_autocast() -> Tensor:
            with autocast(harness.device().type, harness.DTYPES[dtype]):
                return logps()

        model.zero_grad(set_to_none=False)
        gradient_step(under_autocast)

    return {
        "neat": lambda: step(lambda: completion_logprobs(model, packed)),
        "strong": lambda: step(lambda: strong_logprobs(model, padded)),
    }


def memory_of(args: argparse.Namespace) -> None:
    """Peak bytes over model and gradients of one side at one point, as JSON."""
    model = harness.load_model(args.model).to(harness.device()).train()
    harness.in_memory(model)
    side = make_sides(model, json.loads(args.point), args.dtype)[args.memory_of]
    with harness.PeakMemory() as peak:
        side()
    print(json.dumps(peak.bytes))


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="bf16")
    parser.add_argument("--memory-of", choices=("neat", "strong"), help=argparse.SUPPRESS)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        memory_of(args)
        return
    model = harness.load_model(args.model).to(harness.device()).train()
    points = [(name, BASE | {name: value}) for name, values in STEPS.items() for value in values]
    measured = []
    for name, point in points:
        seconds = harness.in_turn(make_sides(model, point, args.dtype), args.repeats)
        setting = [f"--dtype={args.dtype}", f"--model={args.model}", f"--point={json.dumps(point)}"]
        memory = {
            side: harness.in_own_process([*setting, f"--memory-of={side}"]) for side in seconds
        }
        measured.append(
            {
                "varied": name,
                **point,
                "seconds": {s: harness.spread(v) for s, v in seconds.items()},
                "peak_bytes": memory,
            }
        )
    rows = []
    for m in measured:
        ours, theirs = (m["seconds"][side]["median"] for side in ("neat", "strong"))
        gib = {side: m["peak_bytes"][side] / harness.GIB for side in ("neat", "strong")}
        times = [f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}x"]
        rows.append(
            [
                f"{m['varied']} = {m[m['varied']]}",
                *times,
                f"{gib['neat']:.2f}",
                f"{gib['strong']:.2f}",
            ]
        )
    columns = ["varied", "neat, s", "strong, s", "ratio", "neat, GiB", "strong, GiB"]
    harness.show(f"a training step, {args.dtype}; else P 256, R 64, K 4, one group", columns, rows)
    result = {
        "dtype": args.dtype,
        "model": args.model,
        "device": harness.device().type,
        "base": BASE,
        "points": measured,
    }
    harness.save(args.json, result)


if __name__ == "__main__":
    main()
