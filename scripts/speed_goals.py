"""Print the table of docs/results.md that holds each speed goal against its committed measurement.

python scripts/speed_goals.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BENCH, DOCS = "benchmarks/results", "docs/results"


@dataclass(frozen=True)
class Goal:
    """A figure, its goal in words, what was measured in words, and whether that reaches it."""

    figure: str
    goal: str
    measured: str
    met: bool
    files: tuple[str, ...]

    @property
    def line(self) -> str:
        """A row of the table."""
        verdict = "met" if self.met else "**missed**"
        files = ", ".join(f"`{file}`" for file in self.files)
        return f"| {self.figure} | {self.goal} | {self.measured} | {verdict} | {files} |"


def goals() -> list[Goal]:
    """All of them, in the order of the table."""
    return [*_of_runs(), *_of_steps(), *_of_rounds(), *_of_commands(), _of_growth()]


def _of_runs() -> list[Goal]:
    demo, ranked = f"{DOCS}/profile-demo.json", f"{DOCS}/profile-ranked.json"
    minutes = _read(demo)["profile"]["seconds"] / 60
    shares = [_read(f)["ratios"]["score_stage_over_sampling"] for f in (demo, ranked)]
    return [
        Goal("the demo, minutes", "≤ 3.5", f"{minutes:.1f}", minutes <= 3.5, (demo,)),
        Goal(
            "score stage over sampling: demo / a ranking recipe",
            "≤ 25 %",
            " / ".join(f"{s:.0%}" for s in shares),
            max(shares) <= 0.25,
            (demo, ranked),
        ),
    ]


def _of_steps() -> list[Goal]:
    files = [f"{BENCH}/train_step-p256-r64-k8-{dtype}.json" for dtype in ("fp32", "bf16")]
    fp32, bf16 = map(_read, files)
    ratios = [x["speedup_vs_strong_baseline"] for x in (fp32, bf16)]
    memory = [x["memory_ratio_vs_strong_baseline"] for x in (fp32, bf16)]
    share = fp32["share_of_token_bound"]
    where = "P 256, R 64, K 8, fp32 / bf16"
    return [
        Goal(
            f"training step over padded rows, {where}",
            "≥ 2.9x / ≥ 2.7x",
            " / ".join(f"{r:.2f}x" for r in ratios),
            ratios[0] >= 2.9 and ratios[1] >= 2.7,
            tuple(files),
        ),
        Goal("share of the token bound there, fp32", "≥ 88 %", f"{share:.0%}", share >= 0.88, ()),
        Goal(
            "memory over model and gradients there, of padded rows",
            "≤ 35 % / ≤ 45 %",
            " / ".join(f"{m:.0%}" for m in memory),
            memory[0] <= 0.35 and memory[1] <= 0.45,
            (),
        ),
    ]


def _of_rounds() -> list[Goal]:
    found = []
    for figure, at_least, name in (
        ("whole round over GRPO", 6, "grpo"),
        ("whole round over Online DPO", 3, "online_dpo"),
        ("whole round over GRPO at its best settings", 3, "grpo_best"),
        ("whole round over Online DPO at its best settings", 3, "online_dpo_best"),
    ):
        file = f"{BENCH}/round-{name}-bf16.json"
        ratio = _read(file)["speedup_vs_trl"]
        found.append(Goal(figure, f"≥ {at_least}x", f"{ratio:.1f}x", ratio >= at_least, (file,)))
    file = f"{DOCS}/vllm-speed.json"
    speed = _read(file)["speed"]
    medians = [speed[n]["median"] for n in ("64", "256")]
    over = [m["transformers"] / m["vllm"] for m in medians]
    return [
        *found,
        Goal(
            "sampling over a vLLM CPU server, 64 / 256 sequences",
            "≥ 1.0x",
            " / ".join(f"{x:.1f}x" for x in over),
            min(over) >= 1,
            (file,),
        ),
    ]


def _of_commands() -> list[Goal]:
    file = f"{BENCH}/command_times.json"
    seconds = {name: s["median"] for name, s in _read(file)["seconds"].items()}
    limits = {"import": 0.2, "help": 0.7, "dry_run": 10}
    return [
        Goal(
            "`import neat_align` / `--help` / a dry run of the demo, seconds",
            "≤ 0.2 / 0.7 / 10",
            " / ".join(f"{seconds[name]:.2f}" for name in limits),
            all(seconds[name] <= most for name, most in limits.items()),
            (file,),
        )
    ]


def _of_growth() -> Goal:
    file = f"{BENCH}/growth-bf16.json"
    found = _read(file)
    groups = [found["groups"]["over_the_smallest"][n]["median"] for n in ("32", "128")]
    slopes = {}
    for name in ("k", "prompt"):
        ours = found[name]["growth"]["ours"]
        slopes[name] = (ours["exponent"], found[name]["growth"]["padded"]["exponent"])
    text = " / ".join(f"{g:.2f}" for g in groups)
    ours_and_padded = "; ".join(
        f"slope in {'K' if name == 'k' else 'P'} {ours:.2f}, padded rows {padded:.2f}"
        for name, (ours, padded) in slopes.items()
    )
    return Goal(
        "time a group at 4x / 16x groups a step, over 1x; slope of time in K and P",
        "at most 5 % more; below padded rows' own slope",
        f"{text}; {ours_and_padded}",
        all(g <= 1.05 for g in groups) and all(o < p for o, p in slopes.values()),
        (file,),
    )


def _read(file: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / file).read_text(encoding="utf-8")))


def main() -> None:
    """Print the table."""
    print("| figure | goal | measured | | from |")
    print("|---|---|---|---|---|")
    for goal in goals():
        print(goal.line)


if __name__ == "__main__":
    main()
