"""A reward model from your pairs, with TRL's RewardTrainer, for `reward_funcs: FOLDER`.

python scripts/train_reward_model.py --model Qwen/Qwen3-0.6B --data pairs.jsonl --output my-reward

`pairs.jsonl` has a line a pair: {"prompt": ..., "chosen": ..., "rejected": ...}, texts or lists of
messages. Needs TRL: pip install "trl>=1.16,<1.17".
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from trl import RewardConfig, RewardTrainer


def main() -> None:
    """Train on all pairs but `--holdout`, and print the accuracy on those."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a language model, by name or folder")
    parser.add_argument("--data", required=True, help="pairs: a .jsonl file")
    parser.add_argument("--output", required=True, help="folder of the reward model")
    parser.add_argument("--holdout", type=int, default=100, help="pairs that are kept back")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024, help="longer pairs are left out")
    options = parser.parse_args()

    pairs = load_dataset("json", data_files=options.data, split="train")
    pairs = pairs.select_columns(["prompt", "chosen", "rejected"])
    if not 0 < options.holdout < len(pairs):
        parser.error(f"--holdout is {options.holdout} and there are {len(pairs)} pairs")
    parts = pairs.train_test_split(test_size=options.holdout, seed=0)
    trainer = RewardTrainer(
        model=options.model,
        args=RewardConfig(
            output_dir=f"{options.output}-training",
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            max_length=options.max_length,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(options.output)  # the tokenizer goes with it
    print(f"{options.output}: right about {accuracy:.0%} of {options.holdout} held-out pairs")


if __name__ == "__main__":
    main()
