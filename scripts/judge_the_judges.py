"""What every shipped judge says of answers under a positive, no, and a negative instruction.

    python scripts/judge_the_judges.py [--pairs hh_harmless_dev.jsonl]
                                       [--result docs/results/judges.json]

The demo's model answers the demo's held-out prompts, each with one pair of the politeness bank as a
user suffix, two answers of up to 48 tokens each way; every judge scores the same answers. A judge
that is worth reporting puts positive above plain above negative. With `--pairs` (lines of
`prompt`, `chosen` and `rejected`): how often each judge scores the answer that raters of HH-RLHF
chose higher; `harmless_pairs` was fitted to those, so its figures are in harmless_head.json. No
text is kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neat_align.demo.rows import demo_rows
from neat_align.evaluation.statistics import cohens_d, mean_interval
from neat_align.files.atomic import sha256_of, write_json
from neat_align.files.provenance import commit, cpu_name, versions
from neat_align.modeling.demo_model import demo_model_path
from neat_align.prompts.instruction_banks import Polarity, load_bank
from neat_align.prompts.placement import instructed
from neat_align.prompts.row_forms import transcript_messages
from neat_align.prompts.rows import Message, PromptRow
from neat_align.rewards.resolve import SHIPPED, resolve_rewards

POLARITIES: tuple[Polarity, ...] = ("positive", "plain", "negative")
# `similarity` holds an answer against its row's chosen one, which these prompts do not have.
JUDGES = [judge for judge in SHIPPED if judge != "similarity"]
BANK, SAMPLES, TOKENS, TEMPERATURE, BATCH, SEED = "politeness", 2, 48, 0.7, 32, 0


def prompts_under(rows: Sequence[PromptRow], polarity: Polarity) -> list[Any]:
    """Every row's prompt as a conversation, with its pair's instruction, `SAMPLES` times."""
    pairs = load_bank(BANK).pairs
    prompts = []
    for i, row in enumerate(rows):
        pair = pairs[i % len(pairs)]
        prompt = row.prompt
        if polarity != "plain":
            prompt, _ = instructed(prompt, pair.of(polarity), "user_suffix")
        prompts += [prompt] * SAMPLES
    return prompts


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Sequence[Any]) -> list[str]:
    """One sampled answer to each prompt."""
    torch.manual_seed(SEED)
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH):
        rendered = [
            tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
            for p in prompts[start : start + BATCH]
        ]
        inputs = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False)
        drawn = model.generate(
            **inputs,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            max_new_tokens=TOKENS,
        )
        ids = drawn[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def scored(judge: str, prompts: Sequence[Any], texts: Sequence[str]) -> np.ndarray:
    """The judge's score of each text, nan where it abstains."""
    (reward,) = resolve_rewards(judge, None)
    given: Any = reward.function(
        prompts=prompts, completions=texts, completion_ids=[[]] * len(texts)
    )
    return np.array([np.nan if s is None else float(s) for s in given])


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Mean over prompts of a's minus b's mean score, with its interval."""
    means = [np.nanmean(x.reshape(-1, SAMPLES), axis=1) for x in (a, b)]
    both = (means[0] - means[1])[~np.isnan(means[0] - means[1])]
    low, high = mean_interval(both.tolist())
    return {"mean": round(float(both.mean()), 4), "interval": [round(low, 4), round(high, 4)]}


def on_samples(judges: Sequence[str], rows: Sequence[PromptRow]) -> dict[str, Any]:
    """Means under each instruction, differences between them, and Cohen's d."""
    path = demo_model_path()
    tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    plain = prompts_under(rows, "plain")
    texts = {p: answers(model, tokenizer, prompts_under(rows, p)) for p in POLARITIES}
    result: dict[str, Any] = {
        "characters": {p: round(float(np.mean([len(t) for t in texts[p]])), 1) for p in POLARITIES}
    }
    every = {judge: {p: scored(judge, plain, texts[p]) for p in POLARITIES} for judge in judges}
    for judge, by in every.items():
        result[judge] = {
            "mean": {p: round(float(np.nanmean(by[p])), 4) for p in POLARITIES},
            "positive_minus_plain": difference(by["positive"], by["plain"]),
            "plain_minus_negative": difference(by["plain"], by["negative"]),
            "positive_minus_negative": difference(by["positive"], by["negative"]),
            "cohens_d": round(
                cohens_d(*(by[p][~np.isnan(by[p])].tolist() for p in ("positive", "negative")))
                or 0.0,
                3,
            ),
        }
    pooled = np.array([np.concatenate([by[p] for p in POLARITIES]) for by in every.values()])
    whole = pooled[:, ~np.isnan(pooled).any(0)]
    result["correlations"] = {"order": list(judges), "matrix": np.corrcoef(whole).round(3).tolist()}
    return result


def on_pairs(judges: Sequence[str], path: Path) -> dict[str, Any]:
    """Share of pairs whose chosen answer scores higher; a tie counts half."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    prompts: list[list[Message]] = [transcript_messages(line["prompt"]) for line in lines]
    result: dict[str, Any] = {"file": path.name, "sha256": sha256_of(path)}
    for judge in judges:
        chosen, rejected = (
            scored(judge, prompts, [line[kind] for line in lines])
            for kind in ("chosen", "rejected")
        )
        known = ~np.isnan(chosen - rejected)
        right = (chosen > rejected)[known] + 0.5 * (chosen == rejected)[known]
        low, high = mean_interval(right.tolist())
        result[judge] = {
            "pairs": int(known.sum()),
            "accuracy": round(float(right.mean()), 4),
            "interval": [round(low, 4), round(high, 4)],
            "ties": int((chosen == rejected)[known].sum()),
        }
    return result


def main() -> None:
    """Sample, score, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--judges", nargs="+", default=JUDGES)
    parser.add_argument("--result", type=Path, help="write every figure here as JSON")
    args = parser.parse_args()
    started_from, rows = commit(), demo_rows("heldout")
    setting = {
        "bank": BANK, "placement": "user_suffix", "prompts": len(rows), "samples": SAMPLES,
        "tokens": TOKENS, "temperature": TEMPERATURE, "seed": SEED,
    }  # fmt: skip
    result: dict[str, Any] = {"setting": setting, "samples": on_samples(args.judges, rows)}
    if args.pairs and args.pairs.is_file():
        result["hh_pairs"] = on_pairs([j for j in args.judges if j != "harmless_pairs"], args.pairs)
    elif args.pairs:
        print(f"skipped: {args.pairs} is not here")
    result |= {"commit": started_from, "versions": versions(), "processor": cpu_name()}
    print(json.dumps(result, indent=1))
    if args.result:
        write_json(args.result, result)


if __name__ == "__main__":
    main()
