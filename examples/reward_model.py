"""Train a reward model on your own pairs with TRL's RewardTrainer, and align a model by it.

    pip install neat-align "trl>=1.16,<1.17"
    python examples/reward_model.py --model MODEL --dataset pairs.jsonl --output reward-model
    neat-align train --config recipes/quickstart.yaml --model_name_or_path MODEL \\
        --dataset_name pairs.jsonl --as_conversations true --reward_funcs reward-model

`pairs.jsonl` has prompt, chosen and rejected, in any form that neat-align reads. Pairs are held out
(`--holdout`), and the score with which neat-align will train says how many of them it orders as
people did: a reward that orders little more than half of them teaches little. The reward model sees
the same pairs as the aligned model does, so judge the result by something else, too (judge_funcs).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer

from neat_align import PromptRow, load_rows
from neat_align.prompts.row_forms import to_conversation
from neat_align.rewards.hf import ModelReward


def pairs_of(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """The rows with both answers, as conversations."""
    pairs = [row for row in rows if row.chosen is not None and row.rejected is not None]
    if len(pairs) < 2:
        raise SystemExit(
            f"{len(pairs)} of {len(rows)} rows have chosen and rejected: a reward model is trained "
            "on pairs; give data with both"
        )
    return [to_conversation(row) for row in pairs]


def as_dataset(pairs: Sequence[PromptRow]) -> Dataset:
    """The pairs in TRL's preference format."""

    def answer(text: str | None) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": text}]

    return Dataset.from_list(
        [
            {"prompt": row.prompt, "chosen": answer(row.chosen), "rejected": answer(row.rejected)}
            for row in pairs
        ]
    )


def agreement(folder: Path, pairs: Sequence[PromptRow]) -> tuple[int, int]:
    """How many pairs the saved model orders as people did, and of how many.

    It is loaded and asked as neat-align does while it trains.
    """
    reward = ModelReward.from_name(str(folder))

    def scores(answers: Sequence[str | None]) -> list[Any]:
        turns: list[Any] = [[{"role": "assistant", "content": text}] for text in answers]
        return list(reward([row.prompt for row in pairs], turns, [[]] * len(turns)))

    good, bad = (scores([getattr(row, name) for row in pairs]) for name in ("chosen", "rejected"))
    both = [
        (float(a), float(b))
        for a, b in zip(good, bad, strict=True)
        if isinstance(a, float) and isinstance(b, float)
    ]
    return sum(a > b for a, b in both), len(both)


def train(args: argparse.Namespace) -> None:
    """Train the reward model, save it, and say what it is worth on held-out pairs."""
    pairs = pairs_of(load_rows(args.dataset, split=args.split))
    step = max(2, len(pairs) // max(1, min(args.holdout, len(pairs) // 2)))
    held_out = pairs[::step]
    learnt = [row for i, row in enumerate(pairs) if i % step]
    print(f"{len(learnt)} pairs to learn from, {len(held_out)} held out")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not tokenizer.chat_template:
        raise SystemExit(f"{args.model} has no chat template: take an instruct model as the start")
    config = RewardConfig(
        output_dir=str(args.output / "training"),
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        max_length=args.max_length,
        center_rewards_coefficient=0.01,  # rewards stay around 0, so that weights compare
        bf16=args.bf16,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=10,
        report_to=[],
        seed=args.seed,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = RewardTrainer(
        model=args.model,
        args=config,
        train_dataset=as_dataset(learnt),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(args.output))
    right, asked = agreement(args.output, held_out)
    print(f"it orders {right} of {asked} held-out pairs as people did")
    print(
        "align a model by it:\n  neat-align train --config recipes/quickstart.yaml "
        f"--model_name_or_path {args.model} \\\n    --dataset_name {args.dataset} "
        f"--as_conversations true --reward_funcs {args.output}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a reward model on pairs with TRL's RewardTrainer."
    )
    add = parser.add_argument
    add("--model", required=True, help="what it starts from: a hub name or folder of a chat model")
    add("--dataset", required=True, help="pairs: a file, a folder or a hub name")
    add("--split", help="split of the data, or a part of one: train[:5000]")
    add("--output", type=Path, required=True, help="folder of the reward model")
    add("--holdout", type=int, default=200, help="pairs held out, at most half of them (200)")
    add("--epochs", type=float, default=1.0, help="passes over the pairs (1)")
    add("--learning_rate", type=float, default=1e-5, help="peak learning rate (1e-5)")
    add("--batch_size", type=int, default=8, help="pairs of a step (8)")
    add("--max_length", type=int, default=1024, help="longer pairs are left out, in tokens (1024)")
    add("--bf16", action="store_true", help="compute in bf16 autocast")
    add("--seed", type=int, default=0, help="seed of the head's start and of the order (0)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
