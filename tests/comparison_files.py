"""A comparison as `neat-align compare` leaves it: five methods, three seeds, two rounds, made up
with a seed.
"""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean
from typing import Any

from neat_align.files.atomic import write_json

SEEDS = [0, 1, 2]
ROUNDS = 3
# (gain of reward at the last round, of the judge, KL a round) and whether it collapses.
METHODS: dict[str, tuple[float, float, float, bool]] = {
    "neat": (0.17, 0.07, 0.010, False),
    "neat-pp": (0.13, 0.05, 0.009, False),
    "rrhf": (0.02, 0.0, 0.006, False),
    "dpo": (0.10, -0.02, 0.014, False),
    "raft-hot": (0.30, -0.10, 0.060, True),
}
QUESTIONS = [
    "My neighbour plays loud music every night. What should I say to her?",
    "Could you look over my cover letter?",
    "I missed the deadline by two days and my supervisor has not answered any of my messages "
    "since. How do I begin the next one?",
    "Write a short thank-you note to a colleague.",
    "Explain what a mortgage is, as if I were twelve.",
]
ANSWERS = [
    "Happy to help. Start with what you like about living next door, then say which hours are "
    "hard for you.",
    "Of course – paste it here and I will go through it line by line with you.\n\nTwo things to "
    "check first: the opening and the length.",
    "That sounds stressful, and it is fixable. Apologise once, say when the work will be there, "
    "and ask nothing else of them.",
    "I don't know. Ask somebody else.",
]


def comparison() -> dict[str, Any]:
    """comparison.json."""
    rng = random.Random(4)
    runs = [_run(name, seed, rng) for name in METHODS for seed in SEEDS]
    methods = [{"name": "base", "description": "the start policy", "settings": {}}]
    described = {
        "neat": "contrastive instructions, ranking loss and LM loss",
        "dpo": "best against worst of four plain samples",
    }
    methods += [
        {
            "name": m,
            "description": described.get(m, ""),
            "settings": {"num_positive": 2, "ranking_loss": "logistic"},
        }
        for m in METHODS
    ]
    budget = {
        "rounds": ROUNDS,
        "prompts_per_round": 32,
        "completions_per_prompt": 4,
        "sampled_completions": 384,
        "optimizer_steps": 12,
    }
    return {
        "format": 1,
        "name": "demo",
        "model": "SmolLM2-135M-Instruct",
        "dataset": "demo",
        "seeds": SEEDS,
        "rewards": ["vader"],
        "judges": ["minilm_tone"],
        "budget": budget | {"held_out_prompts": 64, "samples_per_prompt": 2},
        "kl_target": 0.015,
        "methods": methods,
        "runs": runs,
        "table": [_base_row(), *(_row(m, i) for i, m in enumerate(METHODS))],
        "frontier": [_curve(m, [r for r in runs if r["method"] == m]) for m in METHODS],
        "commit": "0123abc",
        "date": "2026-11-24T10:00:00+00:00",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": {"cpu": "a processor", "threads": 2},
    }


def _run(method: str, seed: int, rng: random.Random) -> dict[str, Any]:
    gain, judged, kl, collapses = METHODS[method]
    points = []
    for r in range(1, ROUNDS + 1):
        share = (r / ROUNDS) ** 0.7
        points.append(
            {
                "round": r,
                "kl": kl * r * rng.uniform(0.8, 1.2),
                "reward": 0.31 + gain * share + rng.gauss(0, 0.015),
                "judges": {"minilm_tone": 0.60 + judged * share + rng.gauss(0, 0.01)},
                "perplexity": 11.0 * (1 + 0.01 * r),
                "distinct2": 0.62 - 0.01 * r,
                "mean_length": 55.0 + r,
                "clipped": 0.8,
                "repetition": 0.03,
                "refusals": 0.0,
                "pair_accuracy": None,
                "entropy": 1.3,
                "contrast": {"plain": 0.4, "positive": 0.7, "negative": 0.1},
                "training": {"contrast/inversion_rate": 0.1, "loss": 1.7 / r},
            }
        )
    why = (
        "one answer to every prompt: distinct-2 fell to 12 % of the start's"
        if collapses and seed != 1
        else None
    )
    facts = {
        "collapsed": why,
        "seconds": 61.2 + seed,
        "trained_tokens": 12_345 + 100 * seed,
        "points": points,
    }
    return {"method": method, "strength": "learning_rate=2e-4", "seed": seed, **facts}


def _base_row() -> dict[str, Any]:
    means = {
        "kl": 0.0,
        "reward": 0.31,
        "judges/minilm_tone": 0.60,
        "length_controlled_reward": 0.31,
        "perplexity": 10.9,
        "distinct2": 0.62,
    }
    means |= {"mean_length": 55.0, "clipped": 0.8, "repetition": 0.03, "refusals": 0.01}
    return {
        "method": "base",
        "runs": 3,
        "collapsed": 0,
        "at_budget": {k: {"mean": v} for k, v in means.items()},
        "at_equal_kl": None,
        "wins": {},
    }


def estimate(mean: float, delta: float, half: float) -> dict[str, float]:
    """A mean, its gain over base, and an interval around the gain."""
    return {"mean": mean, "delta": delta, "low": delta - half, "high": delta + half}


def _row(method: str, i: int) -> dict[str, Any]:
    gain, judged, kl, collapses = METHODS[method]
    ratios = {"perplexity": (11.2, 1.03), "distinct2": (0.59, 0.95), "mean_length": (58.1, 1.06)}
    at_budget: dict[str, Any] = {
        k: {"mean": mean, "ratio": ratio} for k, (mean, ratio) in ratios.items()
    }
    at_budget |= {
        k: {"mean": v}
        for k, v in {"kl": kl * ROUNDS, "clipped": 0.8, "repetition": 0.03, "refusals": 0.0}.items()
    }
    at_budget |= {
        "reward": estimate(0.31 + gain, gain, 0.04),
        "judges/minilm_tone": estimate(0.6 + judged, judged, 0.03),
        "length_controlled_reward": estimate(0.31 + 0.9 * gain, 0.9 * gain, 0.05),
    }
    reached = kl * ROUNDS > 0.015 and not collapses
    at_equal_kl = {
        "reward": estimate(0.31 + 0.7 * gain, 0.7 * gain, 0.03),
        "judges/minilm_tone": estimate(0.6 + judged / 2, judged / 2, 0.02),
    }
    wins = {}
    for other, (theirs, *_) in {
        "base": (0.0,),
        **{m: METHODS[m] for m in METHODS if m != method},
    }.items():
        net = max(-0.85, min(0.85, 2.2 * (gain - theirs)))
        wins[other] = {
            "win": 0.45 + net / 2,
            "tie": 0.1,
            "lose": 0.45 - net / 2,
            "net_low": net - 0.12,
            "net_high": net + 0.12,
        }
    return {
        "method": method,
        "runs": 3,
        "collapsed": 2 if collapses else 0,
        "at_budget": at_budget,
        "at_equal_kl": at_equal_kl if reached else None,
        "wins": wins,
    }


def _curve(method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    points = []
    for r in range(ROUNDS):
        kls, rewards = (
            [run["points"][r]["kl"] for run in runs],
            [run["points"][r]["reward"] for run in runs],
        )
        judged = [run["points"][r]["judges"]["minilm_tone"] for run in runs]
        point = {
            "round": r + 1,
            "kl": fmean(kls),
            "kl_low": min(kls),
            "kl_high": max(kls),
            "collapsed": METHODS[method][3] and r > 0,
        }
        for name, values, half in (
            ("reward", rewards, 0.035),
            ("judges/minilm_tone", judged, 0.025),
        ):
            point[name] = {
                "mean": fmean(values),
                "low": fmean(values) - half,
                "high": fmean(values) + half,
            }
        points.append(point)
    return {"method": method, "strength": "learning_rate=2e-4", "points": points}


def examples(n: int = 24) -> list[dict[str, Any]]:
    """examples.json."""
    rng = random.Random(6)
    rows = []
    for i in range(n):
        answers = {m: f"{rng.choice(ANSWERS)} ({m}, prompt {i})" for m in ("base", *METHODS)}
        rewards: dict[str, float | None] = {m: round(rng.gauss(0.3, 0.3), 4) for m in answers}
        prompt = QUESTIONS[i % len(QUESTIONS)]
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}] if i % 2 else prompt,
                "answers": answers,
                "rewards": rewards,
            }
        )
    return rows


def write_comparison(
    folder: Path, facts: dict[str, Any] | None = None, answered: list[dict[str, Any]] | None = None
) -> Path:
    """Both files, in a folder; returns the folder."""
    write_json(folder / "comparison.json", comparison() if facts is None else facts)
    write_json(folder / "examples.json", examples() if answered is None else answered)
    return folder
