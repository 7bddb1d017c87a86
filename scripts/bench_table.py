"""Print the README's speed table from the committed benchmark results: python scripts/bench_table.py benchmarks/results"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# (prompt, completion, K), in the order of the table.
POINTS = ((64, 64, 4), (256, 64, 8), (512, 128, 8))


def main(folder: Path) -> None:
    """The training step at three points in two number types, then sampling and whole rounds."""
    print("| training step | token bound | over padded rows | over TRL | memory, of padded rows | of TRL |")
    print("|---|---|---|---|---|---|")
    for p, r, k in POINTS:
        for dtype in ("fp32", "bf16"):
            found = read(folder / f"train_step-p{p}-r{r}-k{k}-{dtype}.json")
            print(
                f"| P {p}, R {r}, K {k}, {dtype} | {found['token_bound']:.2f}x | {found['speedup_vs_strong_baseline']:.2f}x "
                f"| {shown(found, 'speedup_vs_trl', '.2f', 'x')} | {found['memory_ratio_vs_strong_baseline']:.0%} "
                f"| {shown(found, 'memory_ratio_vs_trl', '.0%')} |"
            )
    sampling = read(folder / "generation-bf16.json")
    rounds = {"GRPO": folder / "round-grpo-bf16.json", "Online DPO": folder / "round-online_dpo-bf16.json"}
    rate = sampling["tokens_per_second"]
    print()
    print("| bf16 | ours | TRL | ratio |")
    print("|---|---|---|---|")
    print(f"| sampling, tokens per second | {rate['neat']:.0f} | {rate['trl']:.0f} | {sampling['speedup_vs_trl']:.1f}x |")
    for name, path in rounds.items():
        if not path.is_file():
            continue
        found = read(path)
        setting = found["setting"]
        peer = found["seconds"][setting["peer"]]["median"]
        print(
            f"| a round against {name}: {setting['prompts']} prompts, K {setting['k']}, seconds "
            f"| {found['seconds']['neat']['median']:.1f} | {peer:.1f} | {found['speedup_vs_trl']:.1f}x |"
        )


def shown(found: dict[str, Any], key: str, form: str, unit: str = "") -> str:
    """A number, or a dash where that side was not run."""
    return f"{found[key]:{form}}{unit}" if key in found else "—"


def read(path: Path) -> dict[str, Any]:
    """A result file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
