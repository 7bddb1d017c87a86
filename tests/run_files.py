"""A run directory as training leaves it, made up with a seed by the package's own writers."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

from neat_align.evaluation.before_after import before_after
from neat_align.evaluation.held_out import Evaluation
from neat_align.files.atomic import append_json_line, sha256_of, write_json, write_table
from neat_align.prompts.rows import Prompt
from neat_align.reporting.round_rewards import rewards_of
from neat_align.reporting.run_files import RoundGroups
from neat_align.rounds.completions import Completion, CompletionGroup, Origin, groups_to_table
from neat_align.rounds.metrics import RoundMeasures
from neat_align.rounds.text_metrics import distinct_n
from pages import BREAKOUT, HOSTILE

ORIGINS: tuple[Origin, ...] = ("positive", "positive", "negative", "negative", "chosen", "rejected")
QUESTIONS = [
    "My neighbour plays loud music every night. What should I say to her?",
    "Could you look over my cover letter?",
    "I missed the deadline by two days and my supervisor has not answered any of my messages "
    "since. How do I begin the next one?",
    "Write a short thank-you note to a colleague.",
]
GOOD = [
    "Happy to help. Start with what you like about living next door, then say which hours are "
    "hard for you.",
    "Of course – paste it here and I will go through it line by line with you.\n\nTwo things to "
    "check first: the opening and the length.",
    "That sounds stressful, and it is fixable. Apologise once, say when the work will be there, "
    "and ask nothing else of them.",
]
PAIRS_DRAWN = (("Answer kindly.", "Answer rudely."), ("Be patient and warm.", "Be curt and cold."))
BAD = [
    "Figure it out yourself, nobody cares.",
    "What a stupid question. Anyone with half a brain knows this.",
]


def fake_group(number: int, round_index: int, rng: random.Random) -> CompletionGroup:
    """A group of six answers, negatives below positives most of the time."""
    completions = []
    for i, origin in enumerate(ORIGINS):
        bad = origin in ("negative", "rejected")
        text = f"{rng.choice(BAD if bad else GOOD)} ({origin} {i}, prompt {number})"
        reward = rng.gauss(-0.4 + 0.12 * round_index if bad else 0.3 + 0.12 * round_index, 0.25)
        pair = PAIRS_DRAWN[number % len(PAIRS_DRAWN)]
        instruction = {"positive": pair[0], "negative": pair[1]}.get(origin)
        ids = tuple(range(rng.randint(12, 60)))
        finish: Any = "length" if rng.random() < 0.15 else "stop"
        extra = {
            "policy_logprobs": (-1.0, -2.0),
            "ref_logprobs": (-1.0, -2.1),
            "reward_components": (reward,),
        }
        completions.append(
            Completion(
                origin, i, text, ids, finish, instruction, number, -30.0, reward=reward, **extra
            )
        )
    prompt: Prompt = [
        {"role": "system", "content": "You help."},
        {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]},
    ]
    return CompletionGroup(
        f"id-{round_index}-{number}", prompt, tuple(range(9)), tuple(completions)
    )


def write_round(
    folder: Path,
    index: int,
    groups: list[CompletionGroup],
    names: list[str] | None = None,
    **metrics: float,
) -> None:
    """A finished round as `expand` leaves it."""
    names = ["tone"] if names is None else names
    write_table(folder / "groups.parquet", groups_to_table(groups, names))
    measures = RoundMeasures(names)
    for group in groups:
        measures.add(group)
    removed = Counter(empty=1, duplicate=2 * index, leak=index)
    found = measures.metrics(len(groups), removed) | metrics
    facts = {
        "format": 1,
        "round": index,
        "groups": len(groups),
        "prompts": len(groups),
        "next_position": 0,
        "reward_names": names,
    }
    write_json(
        folder / "manifest.json",
        facts | {"groups_sha256": sha256_of(folder / "groups.parquet"), "metrics": found},
    )


def fake_evaluation(n: int, level: float, seed: int, *, kl: float | None) -> Evaluation:
    """A held-out evaluation of n prompts with rewards around a level."""
    rng = random.Random(seed)
    completions = [
        [f"{rng.choice(GOOD if rng.random() < level + 0.4 else BAD)} [{seed}/{i}]"]
        for i in range(n)
    ]
    return Evaluation(
        prompt_ids=[f"held-{i}" for i in range(n)],
        prompts=[
            [{"role": "user", "content": f"{QUESTIONS[i % len(QUESTIONS)]} ({i})"}]
            for i in range(n)
        ],
        completions=completions,
        rewards=[rng.gauss(level, 0.15) for _ in range(n)],
        judges={"vader": [rng.gauss(level, 0.2) for _ in range(n)]},
        lengths=[rng.uniform(38, 44) for _ in range(n)],
        clipped=[0.0] * n,
        distinct2=distinct_n(t for texts in completions for t in texts) * 0 + 0.71,
        perplexity=14.2 - level,
        kl=kl,
        entropy=2.1,
        contrast={"plain": level, "positive": level + 0.1, "negative": level - 0.4 * (1 - level)},
    )


def build_run(folder: Path, *, rounds: int = 3, groups: int = 12, prompts: int = 40) -> Path:
    """A run directory without anything to warn of, made by the package's own writers."""
    rng = random.Random(5)
    config = {
        "num_train_epochs": rounds,
        "max_steps": -1,
        "prompts_per_round": groups,
        "ranking_loss": "logistic",
        "learning_rate": 1e-4,
    }
    config |= {
        "instruction_bank": "politeness",
        "rank_by": "reward",
        "hub_token": "hf_abcdef",
        "lr_scheduler_kwargs": None,
    }
    record = {
        "config": config,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "seed": 42,
        "rewards": ["tone"],
    }
    write_json(folder / "run.json", record | {"data": {"rows": 96, "sha256": "0" * 64}})
    log = folder / "metrics.jsonl"
    append_json_line(log, {"step": 0, "epoch": 0, "drift/kl": 0.0, "drift/distinct2": 0.7})
    steps = 8
    for r in range(rounds):
        made = [fake_group(i, r, rng) for i in range(groups)]
        write_round(folder / "rounds" / f"{r:05d}", r, made)
        append_json_line(log, {"step": r * steps, "round": float(r), "reward": 0.1, "epoch": r})
        for i in range(1, steps + 1):
            t = r + i / steps
            line = {
                "step": r * steps + i,
                "epoch": t,
                "loss": 2.9 * math.exp(-0.2 * t) + rng.gauss(0, 0.08),
                "loss/ranking": 0.7 - 0.1 * t,
            }
            line |= {
                "loss/lm": 2.2 * math.exp(-0.2 * t) + rng.gauss(0, 0.07),
                "ranking/accuracy": min(0.98, 0.6 + 0.1 * t),
            }
            line |= {
                "ranking/active_pair_fraction": 0.9 - 0.1 * t,
                "ranking/active_pair_fraction/negative": 0.8 - 0.1 * t,
            }
            append_json_line(log, line)
        drift = {
            "drift/kl": 0.05 * (r + 1),
            "drift/distinct2_ratio": 0.99,
            "drift/length_ratio": 1.02,
        }
        append_json_line(log, {"step": (r + 1) * steps, "epoch": float(r + 1), **drift})
        append_json_line(
            log,
            {
                "step": (r + 1) * steps,
                "epoch": float(r + 1),
                "eval_reward": 0.31 + 0.07 * (r + 1),
                "eval_kl": 0.05,
            },
        )
    before, after = (
        fake_evaluation(prompts, 0.31, 1, kl=0.0),
        fake_evaluation(prompts, 0.52, 2, kl=0.15),
    )
    write_json(folder / "evaluation-before.json", before.to_json())
    write_json(folder / "evaluation-after.json", after.to_json())
    result = before_after(before, after) | {
        "name": "polite",
        "seed": 42,
        "wall_seconds": 754.0,
        "peak_rss_bytes": 2 * 2**30,
    }
    write_json(
        folder / "result.json",
        result | {"stopped_because": None, "rounds": rounds, "model": "tiny"},
    )
    return folder


def contrast_group(
    prompt: int, pair: tuple[str, str], good: list[float], bad: list[float]
) -> CompletionGroup:
    """A prompt's rewards under a pair of instructions."""
    sides: list[tuple[Origin, str, list[float]]] = [
        ("positive", pair[0], good),
        ("negative", pair[1], bad),
    ]
    made = [
        Completion(o, i, "a text", (1,), instruction=text, reward=r, reward_components=(r,))
        for o, text, rewards in sides
        for i, r in enumerate(rewards)
    ]
    return CompletionGroup(f"id-{prompt}", "asked", (1,), tuple(made))


def report_round(name: str, groups: list[CompletionGroup]) -> RoundGroups:
    """A round as the report reads it."""
    return RoundGroups(name, {}, tuple(groups), rewards_of(groups))


def change_json(path: Path, **changes: Any) -> None:
    """Replace some values of a JSON file."""
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def poison(run_dir: Path) -> None:
    """Hostile text everywhere that text can come from outside."""
    text = HOSTILE + BREAKOUT
    completions = tuple(
        Completion(
            origin,
            i,
            f"{text} {origin}",
            (1, 2),
            "stop",
            f"{text} bank",
            3,
            -1.0,
            reward=float(-i),
            reward_components=(0.0,),
        )
        for i, origin in enumerate(ORIGINS)
    )
    groups = [CompletionGroup(text, f"{text} prompt", (1,), completions)]
    write_round(run_dir / "rounds" / "00002", 2, groups, [f"{text} reward".replace("/", "|")])
    before = json.loads((run_dir / "evaluation-before.json").read_text())
    changes = {"prompts": [f"{text} asked"] * 40, "completions": [[f"{text} answered"]] * 40}
    change_json(run_dir / "evaluation-before.json", **changes)
    change_json(
        run_dir / "evaluation-after.json",
        **changes | {"prompts": [[{"role": text, "content": text}] for _ in before["prompts"]]},
    )
    change_json(
        run_dir / "run.json",
        rewards=[text],
        versions={text: text},
        config={text: text, "instruction_bank": text},
    )
    change_json(
        run_dir / "result.json",
        name=text,
        second_judge=text,
        model=text,
        stopped_because=text,
        held_out_prompts=text,
    )
