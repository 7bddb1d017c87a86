"""TRL's GRPOTrainer on a comparison's model, prompts and reward, for a row of its table.

    python scripts/trl_grpo.py compare-demo runs/trl-grpo --seeds 0 1 2
    neat-align compare --config recipes/compare-demo-trl.yaml --output_dir runs/compare-demo

As a method of the comparison does, it takes the prompts of each seed in the order of their rounds,
samples as many answers a prompt, makes as many optimizer steps of as many prompts, and trains the
same adapter at the same learning rate, with `beta`, the weight of its KL term, at the comparison's
`kl_weight`. Everything else is TRL's default (rewards scaled by their group's deviation, the `dapo`
loss): every step samples anew, where a round of ours is sampled at once. OUT/seedN holds the
model, and OUT/seedN/training.json what TRL logged.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from neat_align.cli.compare_file import read_spec
from neat_align.cli.options import options_from
from neat_align.comparison.spec import CompareSpec
from neat_align.config import NEATConfig
from neat_align.files.atomic import write_json
from neat_align.files.provenance import commit, versions
from neat_align.modeling.demo_model import model_source
from neat_align.modeling.loading import load_policy, load_tokenizer
from neat_align.pipeline import load_data, lora_config
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.template_inputs import read_kwargs
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rounds.prompt_order import prompt_at


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a policy a seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, help="its file, or the name of a shipped one")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="those of the comparison by default")
    parser.add_argument(
        "--answers", type=int, default=4, help="sampled a prompt; the shipped methods sample 4"
    )
    args = parser.parse_args(arguments)
    spec = read_spec(args.comparison)
    for seed in args.seeds or spec.seeds:
        folder = args.out / f"seed{seed}"
        if (folder / "training.json").is_file():
            print(f"{folder} is there")
            continue
        train(spec, seed, args.answers, folder)


def train(spec: CompareSpec, seed: int, answers: int, folder: Path) -> None:
    """One seed's policy, trained and saved to `folder`."""
    begun = time.monotonic()
    options = spec.options(spec.methods[0], {}, seed)
    with tempfile.TemporaryDirectory() as scratch:
        settings, config = options_from({**options, "output_dir": scratch})
        rows, _ = load_data(settings, config.on_bad_row)
        prompts = in_order(rows, config)
        set_seed(seed)
        model = load_policy(model_source(settings.model_name_or_path))
        tokenizer = load_tokenizer(model)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[r.function for r in resolve_rewards(settings.reward_funcs, None)],
            args=grpo_config(config, answers, len(prompts), scratch),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            peft_config=lora_config(settings),
        )
        trainer.train()
        trainer.save_model(str(folder))
    facts = {
        "comparison": spec.name,
        "seed": seed,
        "prompts": len(prompts),
        "answers": answers,
        "steps": trainer.state.global_step,
        "seconds": time.monotonic() - begun,
        "log": trainer.state.log_history,
        "commit": commit(),
        "versions": versions(),
    }
    write_json(folder / "training.json", facts)


def in_order(rows: Sequence[PromptRow], config: NEATConfig) -> list[dict[str, Any]]:
    """The prompts of all rounds, in the order in which a method of the comparison takes them."""
    if config.data_passes is not None or config.max_steps > 0:
        raise SystemExit("the comparison sets data_passes or max_steps: set num_train_epochs")
    each_round = config.groups_per_round(len(rows))
    places = range(int(config.num_train_epochs) * each_round)
    taken = [rows[prompt_at(len(rows), config.seed, place)] for place in places]
    return [{**row.columns, "prompt": row.prompt} for row in taken]


def grpo_config(config: NEATConfig, answers: int, prompts: int, scratch: str) -> GRPOConfig:
    """The comparison's settings in TRL's words."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return GRPOConfig(
        output_dir=scratch,
        seed=config.seed,
        num_generations=answers,
        per_device_train_batch_size=config.per_device_train_batch_size * answers,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_steps=prompts // per_step,
        shuffle_dataset=False,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        chat_template_kwargs=read_kwargs(config.chat_template_kwargs, "chat_template_kwargs"),
        beta=config.kl_weight,
        reward_weights=config.reward_weights,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        bf16=config.bf16,
        fp16=config.fp16,
        use_cpu=config.use_cpu,
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
