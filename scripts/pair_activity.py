"""Do the negatives teach?

Per origin of the loser: share of pairs still active, share of the ranking gradient, and mean
log-probability.

    python scripts/pair_activity.py --out docs/results/pair-activity.json RUN_DIR...

Reads each run's metrics.jsonl; a round's number is the mean over its optimizer steps. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

ORIGINS = ("positive", "plain", "negative", "chosen", "rejected")
PREFIXES = ("ranking/active_pair_fraction", "ranking/gradient_share", "logps")


def rounds_of(run: Path) -> list[dict[str, Any]]:
    """One record a round: the round's own metrics that matter here, and means over its steps."""
    lines = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    records: list[dict[str, Any]] = []
    steps: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if "round" in line:
            steps = defaultdict(list)
            names = [f"reward/{o}" for o in ORIGINS]
            names += [
                "contrast/inversion_rate",
                "contrast/reward_gap",
                "removed/leak",
                "round/pair_fraction",
            ]
            records.append(
                {
                    "round": int(line["round"]),
                    **{k: line[k] for k in names if k in line},
                    "steps": steps,
                }
            )
        elif "loss" in line:
            for key, value in line.items():
                if key.startswith((*PREFIXES, "ranking/accuracy")):
                    steps[key].append(value)
    return [
        {
            **{k: v for k, v in r.items() if k != "steps"},
            **{k: fmean(v) for k, v in r["steps"].items()},
        }
        for r in records
    ]


def main() -> None:
    """Write the records and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = {}
    print(
        "| run | round | origin of the loser | pairs active | gradient share | log-probability, "
        "nats per token | reward | inverted |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for run in args.runs:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        found[run.name] = {
            "commit": result["commit"],
            "versions": result["versions"],
            "rounds": rounds_of(run),
        }
        for record in found[run.name]["rounds"]:
            for origin in ORIGINS:
                if f"logps/{origin}" in record:
                    active = record.get(f"ranking/active_pair_fraction/{origin}")
                    print(
                        f"| {run.name} | {record['round'] + 1} | {origin} | "
                        f"{'—' if active is None else f'{active:.2f}'} | "
                        f"{record[f'ranking/gradient_share/{origin}']:.2f} | "
                        f"{record[f'logps/{origin}']:.2f} | "
                        f"{record.get(f'reward/{origin}', float('nan')):.2f} | "
                        f"{record['contrast/inversion_rate']:.2f} |"
                    )
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
