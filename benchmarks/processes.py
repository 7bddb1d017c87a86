"""A round and its training step in two processes of one thread, against one process of two.

    python benchmarks/processes.py --json OUT [--model demo] [--repeats N]

Both have the same prompts, seeds and groups a step, and as many threads in all. Every run is a
launch of its own, and only what comes after loading is timed: `make_round` (sampling, rewards,
log-probabilities), and the rest of `train` (one step of plain gradient descent). Compared are the
round's groups, token by token, and what the step added to the weights, which is the gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import harness
import torch
import transformers
from round import reward, text_of

from neat_align import NEATConfig, NEATTrainer
from neat_align.rounds.group_file import GroupFile

SIDES = {"one process": 1, "two processes": 2}
LEARNING_RATE = 1.0


def work(args: argparse.Namespace) -> None:
    """Be one process of a run: make the round, train on it, and say how long that took."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    torch.set_num_threads(2 // processes)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    model, tokenizer = harness.load_model(args.model), harness.load_tokenizer()
    tokenizer.chat_template = None
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    settings = NEATConfig(
        output_dir=str(args.work / "run"),
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=args.prompts // processes,
        prompts_per_round=args.prompts,
        num_train_epochs=1,
        num_positive=2,
        num_negative=2,
        num_plain=0,
        max_completion_length=args.completion,
        generation_batch_size=4 * args.prompts // processes,
        generation_copy="never",
        drift_prompts=0,
        ddp_backend="gloo" if processes > 1 else None,
    )
    rows = [{"prompt": text_of(tokenizer, args.prompt, i)} for i in range(args.prompts)]
    trainer = NEATTrainer(model, reward, settings, rows, processing_class=tokenizer)
    make, took = trainer.make_round, []

    def timed(index: int) -> Any:
        begun = time.perf_counter()
        made = make(index)
        took.append(time.perf_counter() - begun)
        return made

    trainer.make_round = timed  # type: ignore[method-assign]
    begun = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - begun
    if rank == 0:
        moved = {n: (w.detach() - start[n]).cpu() for n, w in trainer.policy.named_parameters()}
        torch.save(moved, args.work / "moved.pt")
        facts = {"round": took[0], "train": whole - took[0]}
        (args.work / "seconds.json").write_text(json.dumps(facts), encoding="utf-8")
    if processes > 1:
        torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(0)


def launch(processes: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A run in so many processes. Seconds of its parts, its groups' tokens and its gradient."""
    folder.mkdir()
    launcher: list[str] = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        launcher += ["--master-port", str(harness.free_port())]
    own = ["--work", str(folder), "--model", args.model, "--prompts", str(args.prompts)]
    own += ["--prompt", str(args.prompt), "--completion", str(args.completion)]
    done = subprocess.run(
        [sys.executable, *launcher, __file__, *own],
        env={**os.environ, "OMP_NUM_THREADS": str(2 // processes)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"a run in {processes} processes failed:\n{done.stderr[-3000:]}")
    groups = GroupFile(folder / "run" / "rounds" / "00000" / "groups.parquet")
    return {
        "seconds": json.loads((folder / "seconds.json").read_text(encoding="utf-8")),
        "groups": {g.prompt_id: [c.token_ids for c in g.completions] for g in groups},
        "moved": torch.load(folder / "moved.pt", weights_only=True),
    }


def gradient_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The norm of the gradients' difference over the norm of the first."""
    apart = sum(float((two[name] - g).double().square().sum()) for name, g in one.items())
    whole = sum(float(g.double().square().sum()) for g in one.values())
    return float((apart / whole) ** 0.5)


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--completion", type=int, default=32)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.work:
        work(args)
        return
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"round": [], "train": []} for name in SIDES
    }
    same_groups, differences = True, []
    with tempfile.TemporaryDirectory(prefix="neat-align-processes-") as base:
        for number in range(args.repeats):
            runs = {}
            order = list(SIDES)[:: 1 if number % 2 == 0 else -1]
            for name in order:
                runs[name] = launch(SIDES[name], Path(base) / f"{number}-{SIDES[name]}", args)
                for part, taken in runs[name]["seconds"].items():
                    seconds[name][part].append(taken)
            one, two = runs["one process"], runs["two processes"]
            same_groups &= one["groups"] == two["groups"]
            differences.append(gradient_difference(one["moved"], two["moved"]))
    ratios = {
        part: harness.speedup(seconds["two processes"][part], seconds["one process"][part])
        for part in ("round", "train")
    }
    harness.show(
        "two processes over one, same threads in all",
        ["part", "one, s", "two, s", "two over one"],
        [
            [
                part,
                *(f"{harness.spread(seconds[name][part])['median']:.2f}" for name in SIDES),
                f"{ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})",
            ]
            for part, ratio in ratios.items()
        ],
    )
    facts = {
        "settings": {"model": args.model, "prompts": args.prompts, "prompt_tokens": args.prompt}
        | {"completion_tokens": args.completion, "completions": 4, "dtype": "fp32"},
        "seconds": {n: {p: harness.spread(v) for p, v in s.items()} for n, s in seconds.items()},
        "two_over_one": ratios,
        "same_groups": same_groups,
        "gradient_difference": max(differences),
    }
    harness.save(args.json, facts)


if __name__ == "__main__":
    main()
