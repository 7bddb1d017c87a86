"""Forward and backward over one group of K completions, against what people use today.

    python benchmarks/train_step.py --prompt 256 --completion 64 --k 8 --dtype fp32 --json OUT

Four sides get the same token ids and take the gradient of the same weighted sum of completion
log-probabilities, with respect to all weights:

  neat      packed rows: the prompt once, the head in chunks
  strong    padded rows, `logits_to_keep`, gathered log-softmax: the best that a careful user writes
  trl       GRPOTrainer._get_per_token_logps_and_entropies of TRL, with the entropy that its
            training asks for (its fused head; on a CPU that is its torch fallback, which computes
            the head at prompt positions, too)
  rrhf      padded rows, all logits, log-softmax over all: the form of RRHF's published trainer

Times are medians of runs in turn in one process. Peak memory is what is added to the model and its
gradients, each side in a process of its own. `token_bound` is K(P+R)/(P+KR): the speed-up that the
token counts alone would give.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor

from neat_align.modeling.logprobs import completion_logprobs
from neat_align.modeling.packing import PackedRows, PaddedRows, pack_rows, pad_rows
from neat_align.modeling.precision import autocast

SIDES = ("neat", "strong", "trl", "rrhf")


def make_ids(prompt: int, completion: int, k: int) -> tuple[list[int], list[list[int]]]:
    """The same random tokens for every side."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(1000, 40_000, (prompt,), generator=generator).tolist(),
        torch.randint(1000, 40_000, (k, completion), generator=generator).tolist(),
    )


def strong_logprobs(model: Any, rows: PaddedRows) -> Tensor:
    n = rows.completion_ids.shape[1]
    out = model(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        logits_to_keep=n + 1,
        use_cache=False,
    )
    logits = out.logits[:, :-1]
    return torch.gather(logits.float().log_softmax(-1), 2, rows.completion_ids[..., None]).squeeze(
        -1
    )


def rrhf_logprobs(model: Any, rows: PaddedRows) -> Tensor:
    n = rows.completion_ids.shape[1]
    logits = model(
        input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False
    ).logits
    logps = torch.gather(
        logits[:, :-1].float().log_softmax(-1), 2, rows.input_ids[:, 1:, None]
    ).squeeze(-1)
    return logps[:, -n:]


def trl_trainer(model: Any, folder: str, bf16: bool) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=folder,
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        num_generations=8,
    )
    rows = Dataset.from_dict({"prompt": ["a"] * 8})
    return GRPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args,
        rows,
        processing_class=harness.load_tokenizer(),
    )


def make_sides(
    args: argparse.Namespace, wanted: tuple[str, ...]
) -> tuple[Any, dict[str, Callable[[], Tensor]]]:
    """The model, and a function a side: [k, completion] log-probabilities with their gradient."""
    model = harness.load_model(args.model)
    # TRL asks for checkpointing by default; here every side keeps its activations.
    dtype = harness.DTYPES[args.dtype]
    prompt, completions = make_ids(args.prompt, args.completion, args.k)
    folder = tempfile.mkdtemp()
    trainer = trl_trainer(model, folder, dtype is not None) if "trl" in wanted else None
    model = model.to(harness.device()).train()
    padded = pad_rows([prompt] * args.k, completions, 0).to(harness.device())
    packed: PackedRows = pack_rows([prompt], [completions]).to(harness.device())

    def under_autocast(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with autocast(harness.device().type, dtype):
                return function()

        return run

    def trl() -> Tensor:
        assert trainer is not None
        made = trainer._get_per_token_logps_and_entropies(
            model, padded.input_ids, padded.attention_mask, args.completion, compute_entropy=True
        )
        return made[0]

    sides: dict[str, Callable[[], Tensor]] = {
        "neat": under_autocast(lambda: completion_logprobs(model, packed)),
        "strong": under_autocast(lambda: strong_logprobs(model, padded)),
        "trl": trl,
        "rrhf": under_autocast(lambda: rrhf_logprobs(model, padded)),
    }
    return model, {name: sides[name] for name in wanted}


def gradient_step(logps: Callable[[], Tensor]) -> None:
    """Backward of a sum that weighs every token differently."""
    out = logps()
    weights = torch.linspace(0.5, 1.5, out.numel(), device=out.device).view_as(out)
    (out * weights).mean().backward()


def memory_of(args: argparse.Namespace) -> None:
    """Peak bytes over model and gradients of one side, as JSON."""
    model, sides = make_sides(args, (args.memory_of,))
    harness.in_memory(model)
    (side,) = sides.values()
    with harness.PeakMemory() as peak:
        gradient_step(side)
    print(json.dumps(peak.bytes))


def compared(args: argparse.Namespace) -> tuple[float, float]:
    """Largest difference of log-probabilities, and relative error of the gradient, in fp32.

    Ours against strong.
    """
    model, sides = make_sides(
        argparse.Namespace(**{**vars(args), "dtype": "fp32"}), ("neat", "strong")
    )
    found, gradients = {}, {}
    for name, side in sides.items():
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            found[name] = side()
        gradient_step(side)
        gradients[name] = torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )
    difference = float((found["neat"] - found["strong"]).abs().max())
    return difference, float(
        (gradients["neat"] - gradients["strong"]).norm() / gradients["strong"].norm()
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one setting."""
    wanted = SIDES if args.sides is None else tuple(args.sides.split(","))
    difference, gradient_error = compared(args)
    model, sides = make_sides(args, wanted)

    def stepping(side: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad(set_to_none=False)
            gradient_step(side)

        return step

    seconds = harness.in_turn({name: stepping(side) for name, side in sides.items()}, args.repeats)
    del model, sides
    options = ("prompt", "completion", "k", "dtype", "model")
    setting = [f"--{name}={getattr(args, name)}" for name in options]
    memory: dict[str, Any] = {}
    if not args.no_memory:
        for name in wanted:
            memory[name] = harness.in_own_process([*setting, f"--memory-of={name}"])
    p, r, k = args.prompt, args.completion, args.k
    result: dict[str, Any] = {
        "setting": {
            "prompt": p,
            "completion": r,
            "k": k,
            "dtype": args.dtype,
            "model": args.model,
            "device": harness.device().type,
        },
        "seconds": {name: harness.spread(values) for name, values in seconds.items()},
        "peak_bytes_over_model_and_gradients": memory,
        "token_bound": k * (p + r) / (p + k * r),
        "max_logprob_difference": difference,
        "relative_gradient_error": gradient_error,
    }
    names = {"strong": "strong_baseline", "trl": "trl", "rrhf": "rrhf"}
    for side in wanted[1:]:
        ratio = harness.speedup(seconds[side], seconds["neat"])
        result[f"speedup_vs_{names[side]}"] = ratio["median"]
        result[f"speedup_vs_{names[side]}_range"] = [ratio["min"], ratio["max"]]
        if memory:
            result[f"memory_ratio_vs_{names[side]}"] = memory["neat"] / memory[side]
    if "strong" in wanted:
        reached = result["speedup_vs_strong_baseline"]
        result["share_of_token_bound"] = reached / result["token_bound"]
    return result


def point_parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of a benchmark of one group."""
    parser = harness.parser(description)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="fp32")
    return parser


def main() -> None:
    parser = point_parser(__doc__)
    parser.add_argument("--sides", help="comma-separated, neat first; all by default")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory processes out")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        memory_of(args)
        return
    result = measure(args)
    memory = result["peak_bytes_over_model_and_gradients"]
    rows = []
    for name, taken in result["seconds"].items():
        ratio = taken["median"] / result["seconds"]["neat"]["median"]
        gib = f"{memory[name] / harness.GIB:.2f}" if memory else ""
        rows.append(
            [
                name,
                f"{taken['median']:.3f}",
                f"{taken['min']:.3f}–{taken['max']:.3f}",
                f"{ratio:.2f}x",
                gib,
            ]
        )
    title = (
        f"prompt {args.prompt}, completion {args.completion}, K {args.k}, {args.dtype}, token "
        f"bound {result['token_bound']:.2f}x"
    )
    harness.show(title, ["side", "seconds", "range", "over ours", "GiB"], rows)
    difference, error = result["max_logprob_difference"], result["relative_gradient_error"]
    print(
        f"fp32, ours against strong: log-probabilities differ by at most {difference:.1e} nats, "
        f"gradients by {error:.1e} relative"
    )
    harness.save(args.json, result)


if __name__ == "__main__":
    main()
