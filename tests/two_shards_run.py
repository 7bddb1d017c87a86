"""Whole runs of `neat-align train` and `evaluate` whose weights two processes divide:
torchrun --nproc-per-node 2 two_shards_run.py FOLDER MODEL WHAT; in one process the model is whole.

WHAT has lora (an adapter is trained), evaluate (no training), early (and then a script evaluates a
model that is to be trained), fail (a reward raises on the second process in the first round),
zero2 and zero3 (DeepSpeed), once (the first process alone loads the weights), cut (SIGTERM before
the second step) and resume. MODEL is a folder. Each rank writes FOLDER/facts-RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from neat_align.cli import progress
from neat_align.cli.evaluate import evaluate_held_out
from neat_align.config import neat_config
from neat_align.errors import NEATError, RunInterrupted
from neat_align.modeling.lockstep import is_sharded
from neat_align.pipeline import build_trainer, run_training
from neat_align.script_arguments import ScriptArguments
from small_trainer import ROWS, config, count_e
from two_shards_train import RANK, use_fsdp2, zero_settings

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
WHAT = sys.argv[3]
RUN = Path(sys.argv[1]) / "run"


def reward(*args: Any, **columns: Any) -> list[float]:
    """How often the answer says e; with `fail` not in the first round of the second process."""
    if "fail" in WHAT and RANK == 1 and (RUN / "evaluation-before.json").exists():
        raise ValueError("no score here")
    return count_e(*args, **columns)


class Watch(TrainerCallback):
    """Whether the model was divided at each evaluation; SIGTERM before the second step."""

    def __init__(self) -> None:
        self.divided: list[bool] = []
        self.loaded: list[str] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.loaded = sorted({str(weight.device) for weight in model.parameters()})

    def on_evaluate(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.divided.append(is_sharded(model))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "cut" in WHAT and RANK == 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def script(folder: Path) -> ScriptArguments:
    data = folder / f"rows-{RANK}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ScriptArguments(
        model_name_or_path=sys.argv[2],
        dataset_name=str(data),
        holdout=3,
        reward_funcs=["__main__:reward"],
        use_peft="lora" in WHAT,
        lora_r=1,
        resume="resume" in WHAT,
    )


def run(folder: Path, watch: Watch) -> None:
    changes: dict[str, Any] = {}
    if "once" in WHAT:
        neat_config.check_sharding = lambda c: None  # on a CPU
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    if "zero" in WHAT:
        neat_config.check_sharding = lambda c: None
        changes["deepspeed"] = zero_settings(WHAT)
    args = config(
        RUN,
        num_train_epochs=2,
        prompts_per_round=4,
        per_device_train_batch_size=4 // PROCESSES,
        gradient_accumulation_steps=1,
        drift_prompts=2,
        kl_weight=0.1,
        learning_rate=1e-3,
        ddp_backend="gloo" if PROCESSES > 1 else None,
        **changes,
    )
    if PROCESSES > 1 and "zero" not in WHAT:
        use_fsdp2()
    told = script(folder)
    if "evaluate" not in WHAT:
        run_training(told, args, [watch])
        return
    progress.terminal_callbacks = lambda _: [watch]
    evaluate_held_out(told, args)
    if "early" in WHAT:
        build_trainer(told, args, [watch]).evaluate()


if __name__ == "__main__":
    folder, watch = Path(sys.argv[1]), Watch()
    said = ""
    try:
        run(folder, watch)
    except (NEATError, RunInterrupted) as error:
        said = f"{type(error).__name__}: {error}"
    facts = {"divided": watch.divided, "said": said, "loaded": watch.loaded}
    (folder / f"facts-{RANK}.json").write_text(json.dumps(facts))
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)
