"""What a training step is made of, in operators: ours and padded rows.

    python benchmarks/step_profile.py --dtype fp32 --json OUT

Forward and backward over one group, as `train_step.py` times it, under torch's profiler, which
slows both. `products` are those of weights, `attention` is batched products, the softmax between
them and torch's fused kernel; `copies` are changes of type, gathers and concatenations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import harness
import torch
from train_step import gradient_step, make_sides, point_parser

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::addmm_"),
    "attention": (
        *("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data"),
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "copies": (
        *("aten::copy_", "aten::cat", "aten::index_select", "aten::gather", "aten::fill_"),
        *("aten::scatter_add_", "aten::index_copy_", "aten::index_add_"),
    ),
}


def kind_of(operator: str) -> str:
    """The kind that an operator is counted under."""
    return next((kind for kind, names in KINDS.items() if operator in names), "other operators")


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of each kind in one step, after one to warm up."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return dict(seconds)


def main() -> None:
    args = point_parser(__doc__).parse_args()
    model, sides = make_sides(args, ("neat", "strong"))

    def step(side: Callable[[], torch.Tensor]) -> None:
        model.zero_grad(set_to_none=False)
        gradient_step(side)

    found = {name: profiled(lambda side=side: step(side)) for name, side in sides.items()}
    kinds = [*KINDS, "other operators"]
    rows = [
        [name, *(f"{seconds.get(kind, 0):.2f}" for kind in kinds), f"{sum(seconds.values()):.2f}"]
        for name, seconds in found.items()
    ]
    title = f"seconds of a step, P {args.prompt}, R {args.completion}, K {args.k}, {args.dtype}"
    harness.show(title, ["side", *kinds, "all"], rows)
    setting = {
        name: getattr(args, name) for name in ("prompt", "completion", "k", "dtype", "model")
    }
    harness.save(args.json, {"setting": setting, "seconds": found})


if __name__ == "__main__":
    main()
