r"""Which settings make a round of TRL's trainers faster on a CPU?

    python benchmarks/round_settings.py --json OUT

One step as `round.py` times it, at a small size: TRL as it comes, each setting that is worth a try
by itself, and those together that `round.py` takes for its best peers. Seconds of a whole step and
of the sampling in it, in turn; a setting that fails is reported with its error. What no run can
show, and why it is left out, stands in `round.py`. The size matters to attention: see the best with
and without torch's fused attention where `round.py` is to be run, with

    python benchmarks/round_settings.py --prompt 256 --completion 64 --prompts 4 --only best \
        "best, eager attention"
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from typing import Any

import harness
from round import PEERS, Side, one_step, online_dpo, prepared


@dataclass(frozen=True)
class Tried:
    """A side with more training arguments than its own."""

    side: Side
    arguments: dict[str, Any] = field(default_factory=dict)

    def whole(self) -> Side:
        """The side that has them."""

        def settings(args: Any, folder: str) -> dict[str, Any]:
            return {**self.side.settings(args, folder), **self.arguments}

        return replace(self.side, settings=settings)


def tried(args: argparse.Namespace) -> dict[str, Tried]:
    """What is timed, by what it is called."""
    plain, best = PEERS[args.method], PEERS[f"{args.method}_best"]
    found = {
        "as it comes": Tried(plain),
        "eager attention": Tried(replace(plain, attention="eager")),
        "medium precision of fp32 products": Tried(replace(plain, matmul="medium")),
        "static cache": Tried(plain, {"cache_implementation": "static"}),
    }
    rows = args.prompts * (2 if args.method == "online_dpo" else args.k)
    if args.method == "grpo":
        for share, name in ((1, "all"), (4, "a quarter")):
            batches = {"gradient_accumulation_steps": share}
            found[f"{name} of the rows a pass"] = Tried(
                plain, {"per_device_train_batch_size": rows // share, **batches}
            )
        found["best, logits of completions only"] = Tried(PEERS["grpo_compact_head"])
        found["best, weights in bf16 (not equal)"] = Tried(PEERS["grpo_bf16_weights"])
    else:
        one_batch = {
            "per_device_train_batch_size": args.prompts,
            "gradient_accumulation_steps": 1,
        }
        found["all prompts in one batch"] = Tried(plain, one_batch)
        found["best, medium precision"] = Tried(replace(best, matmul="medium"))
    found["best, eager attention"] = Tried(replace(best, attention="eager"))
    found["best"] = Tried(best)
    return found


def sampling_calls() -> tuple[tuple[str, Any, str], ...]:
    """Either trainer's sampling, as `harness.timed_calls` takes it."""
    from trl import GRPOTrainer
    from trl.experimental.online_dpo import OnlineDPOTrainer

    return (
        ("sample", GRPOTrainer, "_generate_single_turn"),
        ("sample", OnlineDPOTrainer, "_generate"),
    )


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--method", choices=("grpo", "online_dpo"), default="grpo")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=16)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="rows per forward pass")
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="bf16")
    parser.add_argument("--only", nargs="*", help="what is timed, of the names in the table")
    parser.set_defaults(repeats=1)
    args = parser.parse_args()
    if PEERS[args.method].trainer is online_dpo and args.k != 2:
        raise SystemExit("online_dpo samples two completions a prompt: give --k 2")
    return args


def main() -> None:
    args = arguments()
    base, tokenizer, texts = prepared(args)
    wanted = {n: t for n, t in tried(args).items() if args.only is None or n in args.only}
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    sampling: dict[str, list[float]] = {name: [] for name in wanted}
    errors: dict[str, str] = {}
    for number in range(args.repeats + 1):
        for name, one in wanted.items():
            if name in errors:
                continue
            sampled: dict[str, float] = {}
            try:
                with harness.timed_calls(sampling_calls(), sampled):
                    run = one_step(one.whole(), args, base, tokenizer, texts)
            except RuntimeError as error:
                errors[name] = str(error)
                continue
            if number > 0:
                seconds[name].append(run.seconds)
                sampling[name].append(sampled["sample"])
    report(args, seconds, sampling, errors)


def report(
    args: argparse.Namespace,
    seconds: dict[str, list[float]],
    sampling: dict[str, list[float]],
    errors: dict[str, str],
) -> None:
    """Print the table, and write the result file."""
    rows = []
    for name, values in seconds.items():
        if name in errors:
            rows.append([name, "fails", ""])
            continue
        rows.append(
            [
                name,
                f"{harness.spread(values)['median']:.2f}",
                f"{harness.spread(sampling[name])['median']:.2f}",
            ]
        )
    harness.show(
        f"a step of {args.method}, {args.dtype}", ["setting", "seconds", "of them sampling"], rows
    )
    names = ("method", "prompt", "completion", "k", "prompts", "rows", "dtype", "model")
    ran = [name for name in seconds if name not in errors]
    harness.save(
        args.json,
        {
            "setting": {name: getattr(args, name) for name in names},
            "seconds": {name: harness.spread(seconds[name]) for name in ran},
            "sampling_seconds": {name: harness.spread(sampling[name]) for name in ran},
            "fails": errors,
        },
    )


if __name__ == "__main__":
    main()
