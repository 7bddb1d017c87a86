"""Rounds of training of a model whose weights two processes share, as accelerate's FSDP2 divides
them: torchrun --nproc-per-node 2 two_shards_train.py FOLDER [WHAT]; in one process the model is
whole. Each rank writes the gradients of its first step and its weights, gathered, to FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from neat_align import NEATTrainer
from neat_align.config import neat_config
from neat_align.rounds.round_files import FinishedRound, read_round
from small_trainer import ROWS, TOKENIZER, config, count_e
from tiny import tiny_model

RANK = int(os.environ.get("RANK", "0"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class FirstGradients(TrainerCallback):
    """Every gradient of the first step, before it is clipped or used."""

    found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.found:
            self.found |= {
                n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None
            }


def use_fsdp2() -> None:
    """Let accelerate divide the weights on CPUs too, where it would train as DDP, unasked."""
    state: Any = Accelerator(cpu=True).state
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )


class Given(NEATTrainer):
    """Learns from rounds that one process made."""

    def make_round(self, index: int) -> FinishedRound:
        made = read_round(Path(os.environ["ROUNDS"]) / f"{index:05d}")
        assert made is not None
        return made


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    what = sys.argv[2] if len(sys.argv) > 2 else ""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    changes: dict[str, Any] = {}
    if "distil" in what:
        changes = {"distil_weight": 1.0, "distil_teacher": "current", "num_plain": 2}
    if "zero" in what:
        neat_config.check_sharding = lambda c: None  # on a CPU
        changes["deepspeed"] = {
            "zero_optimization": {
                "stage": int(what[what.index("zero") + 4]),
                "stage3_gather_16bit_weights_on_model_save": True,
                "stage3_param_persistence_threshold": 0,
            },
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER).double()
    args = config(
        folder,
        prompts_per_round=4,
        num_train_epochs=2,
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=1,
        max_tokens_per_micro_batch=150,
        max_grad_norm=0.0,
        kl_weight=0.1,
        learning_rate=1e-3,
        drift_prompts=0 if "given" in what else 2,
        ddp_backend="gloo" if processes > 1 else None,
        **changes,
    )
    args.device  # sets torch.distributed up
    if processes > 1 and "zero" not in what:
        use_fsdp2()
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    gradients = FirstGradients()
    kind = Given if "given" in what else NEATTrainer
    t = kind(
        model,
        count_e,
        args,
        ROWS,
        ROWS[:3],
        processing_class=TOKENIZER,
        callbacks=[gradients],
        peft_config=lora if "lora" in what else None,
    )
    output = t.train(resume_from_checkpoint=True if "resume" in what else None)
    torch.save(gradients.found, folder / f"gradients-{RANK}.pt")
    weights = {n: whole(p) for n, p in t.policy.named_parameters()}
    torch.save(weights, folder / f"weights-{RANK}.pt")
    (folder / f"facts-{RANK}.json").write_text(
        json.dumps({"layout": t.parts.engine.layout, "loss": output.training_loss})
    )
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)
