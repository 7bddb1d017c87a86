"""Print the speed tables of docs/results.md from the committed benchmark results.

    python scripts/bench_table.py benchmarks/results

`--readme` prints the README's table, and `--grid` the tables of docs/experiments.md: every P, R and
K that was measured, and how a step grows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# (prompt, completion, K), in the order of the table.
POINTS = ((64, 64, 4), (256, 64, 8), (512, 128, 8))

# Whole rounds: the peer's name, and its result file. Its best settings stand in the README, too.
ROUNDS = (
    ("GRPO", "round-grpo"),
    ("GRPO with a KL term", "round-grpo_kl"),
    ("GRPO at its best settings", "round-grpo_best"),
    ("Online DPO", "round-online_dpo"),
    ("Online DPO at its best settings", "round-online_dpo_best"),
    ("GRPO at its best settings, its code changed", "round-grpo_compact_head"),
)


def main(folder: Path) -> None:
    """The training step at three points in two number types, then sampling and whole rounds."""
    print(
        "| training step | token bound | over padded rows | over TRL | memory, of padded rows | "
        "of TRL |"
    )
    print("|---|---|---|---|---|---|")
    for p, r, k in POINTS:
        for dtype in ("fp32", "bf16"):
            found = read(folder / f"train_step-p{p}-r{r}-k{k}-{dtype}.json")
            print(
                f"| P {p}, R {r}, K {k}, {dtype} | {found['token_bound']:.2f}x | "
                f"{found['speedup_vs_strong_baseline']:.2f}x "
                f"| {shown(found, 'speedup_vs_trl', '.2f', 'x')} | "
                f"{found['memory_ratio_vs_strong_baseline']:.0%} "
                f"| {shown(found, 'memory_ratio_vs_trl', '.0%')} |"
            )
    sampling = read(folder / "generation-bf16.json")
    rate = sampling["tokens_per_second"]
    print()
    print("| bf16 | ours | TRL | ratio |")
    print("|---|---|---|---|")
    print(
        f"| sampling, tokens per second | {rate['neat']:.0f} | {rate['trl']:.0f} | "
        f"{sampling['speedup_vs_trl']:.1f}x |"
    )
    for name, file in ROUNDS:
        path = folder / f"{file}-bf16.json"
        if not path.is_file():
            continue
        found = read(path)
        setting = found["setting"]
        peer = found["seconds"][setting["peer"]]["median"]
        print(
            f"| a round against {name}: {setting['prompts']} prompts, K {setting['k']}, seconds "
            f"| {found['seconds']['neat']['median']:.1f} | {peer:.1f} | "
            f"{found['speedup_vs_trl']:.1f}x |"
        )


def readme(folder: Path) -> None:
    """The training step at one point, sampling, and a whole round, against TRL."""
    print("| on two CPU cores, SmolLM2-135M, bf16 | times faster than TRL |")
    print("|---|---|")
    step = read(folder / "train_step-p256-r64-k8-bf16.json")
    memory = step["memory_ratio_vs_trl"]
    print(
        "| training step: prompt 256, 8 completions of 64 tokens | "
        f"{step['speedup_vs_trl']:.1f}x, with {memory:.0%} of the memory |"
    )
    sampling = read(folder / "generation-bf16.json")
    print(f"| sampling | {sampling['speedup_vs_trl']:.1f}x |")
    for name, file in ROUNDS:
        if file.endswith("_best"):
            found = read(folder / f"{file}-bf16.json")
            print(f"| a whole round, against {name} | {found['speedup_vs_trl']:.1f}x |")


def grid(folder: Path) -> None:
    """Over padded rows at every measured point, with the share of the token bound.

    Then time and memory as one thing grows.
    """
    print(
        "| prompt, completion, K | token bound | over padded rows, fp32 | share of bound | over "
        "padded rows, bf16 | share of bound |"
    )
    print("|---|---|---|---|---|---|")
    for p in (64, 256, 512):
        for r in (64, 128):
            for k in (4, 8):
                fp32, bf16 = (
                    read(folder / f"train_step-p{p}-r{r}-k{k}-{dtype}.json")
                    for dtype in ("fp32", "bf16")
                )
                cells = [
                    f"{x['speedup_vs_strong_baseline']:.2f}x | {x['share_of_token_bound']:.0%}"
                    for x in (fp32, bf16)
                ]
                print(f"| {p}, {r}, {k} | {fp32['token_bound']:.2f}x | {' | '.join(cells)} |")
    growth = read(folder / "scaling-bf16.json")
    print()
    print("| bf16 | ours, seconds | padded rows, seconds | ratio | ours, GiB | padded rows, GiB |")
    print("|---|---|---|---|---|---|")
    for point in growth["points"]:
        ours, theirs = (point["seconds"][side]["median"] for side in ("neat", "strong"))
        gib = [point["peak_bytes"][side] / 2**30 for side in ("neat", "strong")]
        name = f"{point['varied']} {point[point['varied']]}"
        print(
            f"| {name} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f}x | {gib[0]:.2f} | "
            f"{gib[1]:.2f} |"
        )


def shown(found: dict[str, Any], key: str, form: str, unit: str = "") -> str:
    """A number, or a dash where that side was not run."""
    return f"{found[key]:{form}}{unit}" if key in found else "—"


def read(path: Path) -> dict[str, Any]:
    """A result file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--grid", action="store_true")
    args = parser.parse_args()
    (grid if args.grid else readme if args.readme else main)(args.folder)
