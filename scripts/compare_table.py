"""Print comparisons as Markdown from their committed result files.

    python scripts/compare_table.py docs/results/compare-demo.json …

`--short` prints the table of docs/results.md, `--readme` the README's, `--against METHOD` what
METHOD gains over each of the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def change(fact: Mapping[str, Any] | None) -> str:
    """A paired difference with its interval."""
    if not fact or "delta" not in fact:
        return "–"
    return f"{fact['delta']:+.3f} [{fact['low']:+.3f}, {fact['high']:+.3f}]"


def ratio(fact: Mapping[str, Any] | None) -> str:
    """A change in percent."""
    return f"{fact['ratio'] - 1:+.1%}" if fact and "ratio" in fact else "–"


def methods(result: Mapping[str, Any], *, short: bool) -> list[str]:
    """One row a method: changes over the start policy."""
    judge = f"judges/{result['judges'][0]}" if result["judges"] else "reward"
    target = result["kl_target"]
    at_kl = f"held-out reward at KL {target:.3f}" if target else "held-out reward at equal KL"
    head = ["method", "reward", "held-out reward", at_kl, "KL", "perplexity", "length"]
    others = result["judges"][1:]
    more: list[str] = (
        []
        if short
        else [
            "length-controlled reward",
            "distinct-2",
            "human pairs",
            "refusals",
            "wins over base",
            "collapsed",
        ]
    )
    columns = head + more + others
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in result["table"]:
        at, kl = row["at_budget"], row["at_equal_kl"] or {}
        if row["method"] == "base":
            cells = [f"{at['reward']['mean']:.3f}", f"{at[judge]['mean']:.3f}", "–", "0", "–", "–"]
        else:
            cells = [change(at["reward"]), change(at[judge]), change(kl.get(judge))]
            cells += [
                f"{at['kl']['mean']:.3f}",
                ratio(at.get("perplexity")),
                ratio(at.get("mean_length")),
            ]
        if more:
            wins = row["wins"].get("base")
            accuracy = at.get("pair_accuracy")
            cells += [change(at.get("length_controlled_reward")), ratio(at.get("distinct2"))]
            cells += [
                f"{accuracy['mean']:.2f}" if accuracy else "–",
                f"{at['refusals']['mean']:.1%}",
            ]
            cells += [
                f"{wins['win']:.0%} / {wins['tie']:.0%} / {wins['lose']:.0%}" if wins else "–",
                f"{row['collapsed']} of {row['runs']}",
            ]
        for name in others:
            fact = at[f"judges/{name}"]
            cells.append(f"{fact['mean']:.3f}" if row["method"] == "base" else change(fact))
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return lines


# The README's rows, and what each trains on; everybody samples as many completions.
README_METHODS = {
    "neat": "NEAT: answers under both instructions, ranked by reward",
    "rlcd-dpo": "the same answers, labelled by the instruction (RLCD, with DPO)",
    "contrast-distil": "**contrast distillation**: plain answers, no reward",
}


def readme(result: Mapping[str, Any]) -> list[str]:
    """A few methods: what is gained on the held-out reward, and at which price."""
    judge = f"judges/{result['judges'][0]}"
    lines = ["| method | held-out reward | KL | perplexity |", "|---|---|---|---|"]
    rows = {row["method"]: row["at_budget"] for row in result["table"]}
    for method, words in README_METHODS.items():
        at = rows[method]
        cells = [words, change(at[judge]), f"{at['kl']['mean']:.3f}", ratio(at.get("perplexity"))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def against(result: Mapping[str, Any], method: str) -> list[str]:
    """What a method gains over each of the others, paired."""
    judge = f"judges/{result['judges'][0]}" if result["judges"] else "reward"
    lines = [
        f"| {method} over | reward | held-out reward | reward, equal KL | held-out reward, equal "
        "KL |",
        "|---|---|---|---|---|",
    ]
    row = next(r for r in result["table"] if r["method"] == method)
    for other, facts in row["against"].items():
        budget, kl = facts["at_budget"] or {}, facts["at_equal_kl"] or {}
        cells = [
            change(budget.get("reward")),
            change(budget.get(judge)),
            change(kl.get("reward")),
            change(kl.get(judge)),
        ]
        lines.append(f"| {other} | {' | '.join(cells)} |")
    return lines


def diagnosis(result: Mapping[str, Any]) -> list[str]:
    """What the last round's training said of the negatives: means over seeds."""
    names = {
        "ranking/active_pair_fraction/negative": "pairs active",
        "ranking/gradient_share/negative": "gradient share",
        "reward/positive": "reward +",
        "reward/negative": "reward −",
        "contrast/inversion_rate": "inverted",
        "logps/positive": "log π +",
        "logps/negative": "log π −",
    }
    lines = [f"| method | {' | '.join(names.values())} |", "|" + "---|" * (len(names) + 1)]
    for method in [m["name"] for m in result["methods"] if m["name"] != "base"]:
        last = [
            r["points"][-1]["training"]
            for r in result["runs"]
            if r["method"] == method and r["points"]
        ]
        cells = []
        for name in names:
            values = [t[name] for t in last if name in t]
            cells.append(f"{sum(values) / len(values):.2f}" if values else "–")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--against")
    parser.add_argument("--diagnosis", action="store_true")
    args = parser.parse_args()
    for path in args.results:
        result = json.loads(path.read_text(encoding="utf-8"))
        if args.against:
            lines = against(result, args.against)
        elif args.readme:
            lines = readme(result)
        elif args.diagnosis:
            lines = diagnosis(result)
        else:
            lines = methods(result, short=args.short)
        print("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
