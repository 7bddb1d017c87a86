"""Fit the head of the `minilm_tone` judge.

L2-regularised logistic regression on frozen MiniLM embeddings of the tone anchors.

    python scripts/fit_tone_head.py [--validate rt_polarity.jsonl]
                                    [--result docs/results/tone_head.json]

Deterministic: float64 LBFGS from zero on a convex loss. The strength of the regularisation is
fixed. Leaving each topic out in turn cannot choose it: the anchors are separable, so that log-loss
falls without end as the strength does, while AUC stays flat. 0.001 separates them well without
pushing every neutral sentence to 0 or 1. The grid is printed and recorded; no validation file takes
part in any choice.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neat_align.files.atomic import sha256_of, write_json
from neat_align.rewards.minilm_tone import HEAD_FILE, HUB_NAME, WHEEL, find_encoder, load_encoder
from neat_align.rewards.vader import VaderReward

ANCHORS = Path(__file__).parents[1] / "src" / "neat_align" / "demo" / "tone_anchors.jsonl"
STRENGTH = 0.001
GRID = (0.1, 0.01, STRENGTH, 0.0001, 0.00001)
LABELS = {"kind": 1, "pos": 1, "positive": 1, 1: 1, "rude": 0, "neg": 0, "negative": 0, 0: 0}


def fit(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weights and bias that minimise mean log-loss + strength/2 · |weights|²; the bias is free."""
    weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias],
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            torch.nn.functional.binary_cross_entropy_with_logits(x @ weights + bias, y)
            + strength / 2 * weights.square().sum()
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach(), bias.detach()


def auc(scores: Tensor, y: Tensor) -> float:
    """Probability that a random positive scores above a random negative; a tie counts half."""
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[inverse]
    positives, negatives = float(y.sum()), float((1 - y).sum())
    return (float(ranks[y == 1].sum()) - positives * (positives + 1) / 2) / (positives * negatives)


def left_out(x: Tensor, y: Tensor, topics: Sequence[str], strength: float) -> dict[str, Any]:
    """Every row scored by a head that never saw its topic."""
    logits = torch.zeros_like(y)
    for topic in sorted(set(topics)):
        held = torch.tensor([t == topic for t in topics])
        weights, bias = fit(x[~held], y[~held], strength)
        logits[held] = x[held] @ weights + bias
    per_topic = [
        auc(logits[held], y[held])
        for topic in sorted(set(topics))
        for held in [torch.tensor([t == topic for t in topics])]
    ]
    return {
        "strength": strength,
        "log_loss": round(
            float(torch.nn.functional.binary_cross_entropy_with_logits(logits, y)), 4
        ),
        "auc": round(auc(logits, y), 4),
        "accuracy": round(float(((logits > 0) == (y == 1)).double().mean()), 4),
        "topics_ranked_right": round(sum(per_topic) / len(per_topic), 4),
    }


def validate(path: Path, weights: Tensor, bias: Tensor) -> dict[str, Any]:
    """AUC of this head and of VADER on rows with `prompt`, `chosen` and `label`.

    On the rest of each sentence, then on all of it.
    """
    rows = read_rows(path)
    y = torch.tensor([LABELS[row["label"]] for row in rows], dtype=torch.float64)
    vader = VaderReward()
    result: dict[str, Any] = {"file": path.name, "sha256": sha256_of(path), "rows": len(rows)}
    for what, texts in {
        "completion": [row["chosen"] for row in rows],
        "prompt_and_completion": [f"{row['prompt']} {row['chosen']}" for row in rows],
    }.items():
        tone = encoder().embed(texts).double() @ weights + bias
        words = torch.tensor(
            [score or 0.0 for score in vader([""] * len(texts), texts, [[]] * len(texts))],
            dtype=torch.float64,
        )
        result[what] = {
            "minilm_tone_auc": round(auc(tone, y), 4),
            "vader_auc": round(auc(words, y), 4),
        }
    return result


def encoder() -> Any:
    """The frozen encoder that the judge uses."""
    return load_encoder(find_encoder())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file."""
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]


def arguments() -> argparse.Namespace:
    """Where the anchors are, and where the head and its figures go."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--anchors", type=Path, default=ANCHORS)
    parser.add_argument("--out", type=Path, default=HEAD_FILE)
    parser.add_argument(
        "--validate", type=Path, help="jsonl with prompt, chosen, label (pos or neg)"
    )
    parser.add_argument("--result", type=Path, help="write every figure here as JSON")
    return parser.parse_args()


def main() -> None:
    """Cross-validate, fit, write the head, and validate."""
    args = arguments()
    rows = read_rows(args.anchors)
    y = torch.tensor([LABELS[row["label"]] for row in rows], dtype=torch.float64)
    x = encoder().embed([row["text"] for row in rows]).double()
    topics = [row["topic"] for row in rows]
    grid = [left_out(x, y, topics, strength) for strength in GRID]
    for line in grid:
        print(line)
    cross_validation = grid[GRID.index(STRENGTH)]
    print(f"strength {STRENGTH}: leave-one-topic-out AUC {cross_validation['auc']}")
    weights, bias = fit(x, y, STRENGTH)
    weights, bias = (weights * 1e6).round() / 1e6, (bias * 1e6).round() / 1e6
    metadata = {
        "model": "P(kind) = sigmoid(weights · embedding + bias)",
        "embedding": f"{HUB_NAME}: mean of last hidden states, unit length, fp32",
        "fit": f"mean log-loss + {STRENGTH}/2 · |weights|², LBFGS in float64, "
        "scripts/fit_tone_head.py",
        "anchors": {
            "file": args.anchors.name,
            "sha256": sha256_of(args.anchors),
            "rows": len(rows),
            "topics": len(set(topics)),
        },
        "leave_one_topic_out": cross_validation,
        "measures": "tone of English text (kind or rude); not harmlessness, helpfulness or truth",
    }
    rounded = [round(w, 6) for w in weights.tolist()]
    write_json(args.out, {"metadata": metadata, "bias": bias.item(), "weights": rounded})

    result: dict[str, Any] = {"head": metadata, "grid": grid, "versions": versions()}
    if args.validate:
        result["validation"] = validate(args.validate, weights, bias)
        print(json.dumps(result["validation"], indent=1))
    if args.result:
        write_json(args.result, result)


def versions() -> dict[str, str]:
    """What the figures were made with."""
    packages = ("torch", "transformers", "tokenizers", "vaderSentiment", WHEEL)
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {"python": platform.python_version(), **found}


if __name__ == "__main__":
    main()
