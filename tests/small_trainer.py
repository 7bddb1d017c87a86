"""A NEATTrainer on a tiny random model, twelve prompts, and a reward that varies on random text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from neat_align import NEATConfig, NEATTrainer
from tiny import Family, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"What do you say to number {i}?"}],
        "chosen": [{"role": "assistant", "content": f"thank you {i}"}],
        "rejected": [{"role": "assistant", "content": f"I hate {i}"}],
    }
    for i in range(12)
]


def count_e(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    **columns: Any,
) -> list[float]:
    """How often the answer says e."""
    return [float(c[0]["content"].count("e")) + 0.01 * len(c[0]["content"]) for c in completions]


def config(folder: Path, **changes: Any) -> NEATConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "bf16": False,
        "prompts_per_round": 8,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "max_prompt_length": 200,
        "max_completion_length": 10,
        "instruction_bank": "politeness",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "drift_prompts": 0,
        "disable_tqdm": True,
        "seed": 1,
        "num_positive": 2,
        "num_negative": 2,
        "num_plain": 0,
        "lm_weight": 1.0,
        "kl_weight": 0.0,
    }
    return NEATConfig(**{**settings, **changes})


def trainer(
    folder: Path,
    family: Family = "llama",
    *,
    rows: Any = ROWS,
    reward: Any = count_e,
    **changes: Any,
) -> NEATTrainer:
    extra = {
        k: changes.pop(k)
        for k in ("peft_config", "eval_dataset", "callbacks", "judge_funcs", "model")
        if k in changes
    }
    model = extra.pop("model", None) or tiny_model(family, len(TOKENIZER), tokenizer=TOKENIZER)
    return NEATTrainer(
        model, reward, config(folder, **changes), rows, processing_class=TOKENIZER, **extra
    )


def lora() -> LoraConfig:
    """The adapter of a run. It starts from random numbers, whose seed is set here."""
    torch.manual_seed(0)
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")


class StopAt(TrainerCallback):
    """Interrupts training at the end of a step, before it is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(t: NEATTrainer) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in t.policy.state_dict().items()}


def assert_same_weights(one: NEATTrainer, other: NEATTrainer) -> None:
    """To the bit."""
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
