"""Does our training step stay as fast as it grows? With groups a step, with K, with the prompt.

    python benchmarks/growth.py --json OUT

Ours goes through the step engine, as in training: groups are collated, cut into micro-batches under
a token budget, and every micro-batch makes a forward and a backward pass of the ranking loss (no
optimizer step, whose time does not depend on the groups).

  groups   8, 32 and 128 small groups a step, 8 to a micro-batch: seconds a group. The small steps
           lie around the large ones, so that a machine that drifts does so for all alike
  k        2 to 16 completions of one prompt, beside padded rows (`strong` of train_step.py)
  prompt   64 to 2,048 tokens, two completions, beside the same

`exponent` is the slope of the logarithm of the time over that of K or P, from the smallest to the
largest. `tokens` is what goes through the model, P + K(R − 1) in ours and K(P + R) in padded rows:
how time would grow if each took as long. A long prompt's tokens do not, since attention grows with
its square: `arithmetic` counts that, too, and `attention_share` is its part.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
from accelerate import Accelerator
from train_step import gradient_step, make_ids, strong_logprobs

from neat_align import NEATConfig
from neat_align.learning.objective import LossCounts, MicroBatch
from neat_align.learning.step_engine import StepEngine
from neat_align.modeling.packing import pad_rows, tokens_in
from neat_align.modeling.precision import autocast
from neat_align.modeling.reference import not_kept
from neat_align.rounds.completions import Completion, CompletionGroup

# Groups a step, and the size of each.
GROUPS = (8, 32, 128)
SMALL = (32, 16, 4)
# How long steps and short ones follow each other: short ones around every longer one.
ORDER = (8, 32, 8, 128, 8, 32, 8)
# Prompt, completion and K of the sweeps' points.
SWEEPS = {
    "k": tuple((128, 32, k) for k in (2, 4, 8, 16)),
    "prompt": tuple((p, 32, 2) for p in (64, 256, 512, 1024, 2048)),
}
PLACE = {"k": 2, "prompt": 0}


# ---- what is counted -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """Tokens, attended pairs and predicted tokens of one group, on one side."""

    tokens: int
    pairs: float
    predicted: int


def ours(prompt: int, completion: int, k: int) -> Counted:
    """Packed rows: the prompt once; a completion's last token predicts nothing."""
    fed = completion - 1
    pairs = prompt * (prompt + 1) / 2 + k * (fed * prompt + fed * (fed + 1) / 2)
    return Counted(prompt + k * fed, pairs, k * completion)


def padded(prompt: int, completion: int, k: int) -> Counted:
    """A row for every completion."""
    n = prompt + completion
    return Counted(k * n, k * n * (n + 1) / 2, k * completion)


def arithmetic(counted: Counted, model: Any) -> tuple[float, float]:
    """Operations of a forward pass, and attention's part of them. (A backward pass has twice as
    many of each.)
    """
    config, embeddings = model.config, model.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in model.parameters()) - embeddings
    width = config.num_attention_heads * config.head_dim
    # Scores and their sum over values: a multiplication and an addition each.
    attention = 4 * counted.pairs * width * config.num_hidden_layers
    rest = 2 * counted.tokens * weights + 2 * counted.predicted * embeddings
    return attention + rest, attention / (attention + rest)


def exponent(values: Sequence[float], over: Sequence[float]) -> float:
    """The slope from the first to the last, of logarithms."""
    return math.log(values[-1] / values[0]) / math.log(over[-1] / over[0])


def per_group_growth(
    seconds: Sequence[Sequence[float]], order: Sequence[int]
) -> dict[int, list[float]]:
    """Seconds a group of each size over those of the smallest, a ratio for every round of steps.

    `seconds[i]` are those of the steps of round i, in this order.
    """
    ratios: dict[int, list[float]] = {n: [] for n in sorted(set(order))}
    for row in seconds:
        each = {
            n: sum(s for s, m in zip(row, order, strict=True) if m == n) / (n * order.count(n))
            for n in ratios
        }
        smallest = each[min(each)]
        for n, value in each.items():
            ratios[n].append(value / smallest)
    return ratios


# ---- what is timed -------------------------------------------------------------------------------


def make_groups(prompt: int, completion: int, k: int, count: int) -> list[CompletionGroup]:
    """Groups of random tokens with random rewards."""
    ids, answers = make_ids(prompt, completion, k)
    rng = random.Random(0)

    def answer(index: int) -> Completion:
        tokens = tuple(answers[index])
        # The KL term of the default objective reads the start policy's.
        start = (-1.5,) * len(tokens)
        reward = rng.random()
        return Completion("plain", index, "", tokens, "length", ref_logprobs=start, reward=reward)

    return [
        CompletionGroup(str(i), "", tuple(ids), tuple(answer(j) for j in range(k)))
        for i in range(count)
    ]


class Steps:
    """Steps of ours and of padded rows on one model."""

    def __init__(self, model: str, dtype: str) -> None:
        self.model = harness.load_model(model).to(harness.device()).train()
        self.dtype = harness.DTYPES[dtype]
        # Added to and never set to zero: each pass finds gradients, as all but a step's first do.
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)

    def ours(self, groups: Sequence[CompletionGroup], max_tokens: int) -> Callable[[], None]:
        """A step of the engine on these groups, from collating them to the last backward pass."""
        folder = tempfile.mkdtemp()
        args = NEATConfig(
            output_dir=folder,
            bf16=self.dtype is not None,
            use_cpu=harness.device().type == "cpu",
            report_to="none",
            max_tokens_per_micro_batch=max_tokens,
        )

        def forward_backward(
            model: torch.nn.Module, micro_batch: MicroBatch | None, counts: LossCounts
        ) -> torch.Tensor:
            loss = engine.loss(model, micro_batch, counts, autocast_dtype=self.dtype)
            loss.backward()
            return loss.detach()

        engine = StepEngine(
            args,
            Accelerator(cpu=harness.device().type == "cpu"),
            forward_backward,
            layout="packed",
            pad_token_id=0,
            reference=not_kept,
            sharded=False,
        )

        def step() -> None:
            batch = engine.collate(list(groups))
            batch["micro_batches"] = [m.to(harness.device()) for m in batch["micro_batches"]]
            engine.accumulate(self.model, batch, engine.begin([batch]))

        return step

    def padded(self, prompt: int, completion: int, k: int) -> Callable[[], None]:
        """A gradient over the padded rows of one group."""
        ids, answers = make_ids(prompt, completion, k)
        rows = pad_rows([ids] * k, answers, 0).to(harness.device())

        def logprobs() -> torch.Tensor:
            with autocast(harness.device().type, self.dtype):
                return strong_logprobs(self.model, rows)

        return lambda: gradient_step(logprobs)


def seconds_of(step: Callable[[], None]) -> float:
    harness.synchronize()
    start = time.perf_counter()
    step()
    harness.synchronize()
    return time.perf_counter() - start


def measure_groups(steps: Steps, repeats: int) -> dict[str, Any]:
    """Seconds a group at every number of groups a step."""
    prompt, completion, k = SMALL
    one = tokens_in(prompt, [completion] * k, "packed")
    sides = {n: steps.ours(make_groups(*SMALL, n), max_tokens=GROUPS[0] * one) for n in GROUPS}
    sides[GROUPS[0]]()
    rounds = [[seconds_of(sides[n]) for n in ORDER] for _ in range(repeats)]
    growth = per_group_growth(rounds, ORDER)
    each = {
        n: [s / n for row in rounds for s, m in zip(row, ORDER, strict=True) if m == n]
        for n in GROUPS
    }
    return {
        "setting": {"prompt": prompt, "completion": completion, "k": k},
        "tokens_a_group": one,
        "max_tokens_per_micro_batch": GROUPS[0] * one,
        "seconds_a_group": {str(n): harness.spread(values) for n, values in each.items()},
        "over_the_smallest": {str(n): harness.spread(values) for n, values in growth.items()},
    }


def measure_sweep(steps: Steps, name: str, repeats: int) -> dict[str, Any]:
    """Every point of a sweep on both sides, all of them in turn."""
    points = SWEEPS[name]
    sides: dict[str, Callable[[], None]] = {}
    for i, point in enumerate(points):
        groups = make_groups(*point, 1)
        sides[f"ours {i}"] = steps.ours(groups, max_tokens=ours(*point).tokens)
        sides[f"padded {i}"] = steps.padded(*point)
    seconds = harness.in_turn(sides, repeats)
    found = []
    for i, point in enumerate(points):
        at: dict[str, Any] = dict(zip(("prompt", "completion", "k"), point, strict=True))
        for side, count in (("ours", ours), ("padded", padded)):
            counted = count(*point)
            operations, share = arithmetic(counted, steps.model)
            at[side] = {
                "seconds": harness.spread(seconds[f"{side} {i}"]),
                "tokens": counted.tokens,
                "arithmetic": operations,
                "attention_share": share,
            }
        at["speedup"] = harness.speedup(seconds[f"padded {i}"], seconds[f"ours {i}"])["median"]
        at["token_bound"] = at["padded"]["tokens"] / at["ours"]["tokens"]
        found.append(at)
    return {"points": found, "growth": growth_of(found, name, seconds)}


def growth_of(
    points: Sequence[Mapping[str, Any]], name: str, seconds: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """From the smallest point to the largest: how many times as much of everything, and the slopes.

    Times as many seconds are paired by round.
    """
    over = [float(p[name]) for p in points]
    made: dict[str, Any] = {}
    for side in ("ours", "padded"):
        first, last = seconds[f"{side} 0"], seconds[f"{side} {len(points) - 1}"]
        grown = harness.speedup(last, first)
        made[side] = {"seconds": grown["median"], "seconds_range": [grown["min"], grown["max"]]}
        made[side]["exponent"] = exponent([1, grown["median"]], [over[0], over[-1]])
        for of in ("tokens", "arithmetic"):
            values = [p[side][of] for p in points]
            made[side][of] = values[-1] / values[0]
            made[side][f"exponent_of_{of}"] = exponent(values, over)
    return made


# ---- what is said --------------------------------------------------------------------------------


def show_groups(found: Mapping[str, Any]) -> None:
    rows = []
    for n, each in found["seconds_a_group"].items():
        over = found["over_the_smallest"][n]
        change = f"{over['median'] - 1:+.1%}"
        span = f"{over['min'] - 1:+.1%} to {over['max'] - 1:+.1%}"
        rows.append([n, f"{1000 * each['median']:.1f}", change, span])
    columns = ["groups a step", "ms a group", f"over {GROUPS[0]}", "range"]
    harness.show(
        "groups of P {prompt}, R {completion}, K {k}".format(**found["setting"]), columns, rows
    )


def show_sweep(name: str, found: Mapping[str, Any]) -> None:
    rows = []
    for at in found["points"]:
        row = [str(at[name])]
        for side in (at["ours"], at["padded"]):
            median = side["seconds"]["median"]
            row += [f"{median:.2f}", f"{1000 * median / side['tokens']:.2f}"]
        share = f"{at['speedup'] / at['token_bound']:.0%}"
        attention = f"{at['ours']['attention_share']:.0%}"
        rows.append([*row, f"{at['speedup']:.2f}x", share, attention])
    columns = [name, "ours, s", "ms/token", "padded, s", "ms/token", "ratio", "of bound", "att."]
    harness.show(f"one group, as {name} grows", columns, rows)
    rows = [
        [side, *(f"{g[of]:.2f}" for of in ("seconds", "tokens", "arithmetic")), *_slopes(g)]
        for side, g in found["growth"].items()
    ]
    ends = f"{found['points'][0][name]} to {found['points'][-1][name]}"
    columns = ["times as many", "seconds", "tokens", "operations", "slopes of these"]
    harness.show(f"{name} {ends}", columns, rows)


def _slopes(grown: Mapping[str, Any]) -> list[str]:
    names = ("exponent", "exponent_of_tokens", "exponent_of_arithmetic")
    return [" ".join(f"{grown[name]:.2f}" for name in names)]


def main() -> None:
    """All three, a table each, and the result file."""
    parser: argparse.ArgumentParser = harness.parser(__doc__)
    parser.set_defaults(repeats=2)
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="bf16")
    args = parser.parse_args()
    steps = Steps(args.model, args.dtype)
    groups = measure_groups(steps, args.repeats)
    show_groups(groups)
    result: dict[str, Any] = {
        "setting": {"dtype": args.dtype, "model": args.model, "device": harness.device().type},
        "groups": groups,
    }
    for name in SWEEPS:
        result[name] = measure_sweep(steps, name, args.repeats)
        show_sweep(name, result[name])
    harness.save(args.json, result)


if __name__ == "__main__":
    main()
