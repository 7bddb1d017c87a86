"""Print the demo's table in docs/results.md from the committed result files.

python scripts/demo_table.py docs/results/demo-seed*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(paths: list[str]) -> None:
    """One row a seed."""
    print(
        "| seed | reward before → after | change, 95 % interval | second judge | perplexity | "
        "distinct-2 | length | KL | minutes | GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    results = [json.loads(Path(p).read_text(encoding="utf-8")) for p in paths]
    for r in sorted(results, key=lambda r: r["seed"]):
        low, high = r["reward_delta_ci95"]
        change = {
            key: r[f"{key}_after"] / r[f"{key}_before"] - 1
            for key in ("perplexity", "distinct2", "mean_length")
        }
        print(
            f"| {r['seed']} | {r['reward_before']:.2f} → {r['reward_after']:.2f} | "
            f"{r['reward_delta']:+.2f} [{low:+.2f}, {high:+.2f}] | {r['second_judge_delta']:+.3f} "
            f"| {change['perplexity']:+.1%} | {change['distinct2']:+.1%} | "
            f"{change['mean_length']:+.1%} | {r['kl_per_token']:.3f} | "
            f"{r['wall_seconds'] / 60:.1f} | {r['peak_rss_bytes'] / 2**30:.1f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
