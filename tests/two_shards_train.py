"""Rounds of training of a model whose weights two processes share, as accelerate's FSDP2 divides
them: torchrun --nproc-per-node 2 two_shards_train.py FOLDER [WHAT]; in one process the model is
whole. Each rank writes the gradients of its first step and its weights, gathered, to FOLDER.
"""

from __future__ import annotations

import json
import os
import signal
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
from neat_align.errors import NEATError, RunInterrupted
from neat_align.modeling.lockstep import is_sharded
from neat_align.trainer.shared_reference import sharding_of
from small_trainer import ROWS, TOKENIZER, config, count_e
from tiny import tiny_model

RANK = int(os.environ.get("RANK", "0"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


# Every third prompt is long: processes cut their groups into other numbers of micro-batches.
LONG = [
    {"prompt": [{"role": "user", "content": row["prompt"][0]["content"] * (1 + 2 * (i % 3 == 0))}]}
    for i, row in enumerate(ROWS)
]


class FirstGradients(TrainerCallback):
    """Every gradient of the first step, before it is clipped or used."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

        self.passes_added = 0

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.passes_added += t.parts.engine._passes_to_add
        if not self.found:
            self.found |= {
                n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None
            }


def without_numbers(model: torch.nn.Module) -> None:
    """Put the weights, which may be tied, on the meta device."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in list(model.modules()):
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            made.setdefault(id(weight), torch.nn.Parameter(weight.detach().to("meta")))
            module.register_parameter(name, made[id(weight)])


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


def zero_settings(what: str) -> dict[str, Any]:
    """DeepSpeed's configuration; `what` has zero and the stage."""
    return {
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


class OnSecondProcess(TrainerCallback):
    """Before the second step, on the second process alone: a broken weight, or SIGTERM."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if RANK != 1 or state.global_step != 1:
            return
        if "nan" in self.what:
            head = t.policy.get_output_embeddings().weight
            (head.to_local() if isinstance(head, DTensor) else head).data[0, 0] = float("nan")
        elif "cut" in self.what:
            os.kill(os.getpid(), signal.SIGTERM)


def failing(*args: Any, **columns: Any) -> list[float]:
    """A reward that fails on the second process."""
    if RANK == 1:
        raise ValueError("no score here")
    return count_e(*args, **columns)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    what = sys.argv[2] if len(sys.argv) > 2 else ""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    changes: dict[str, Any] = {}
    if "distil" in what:
        changes = {"distil_weight": 1.0, "distil_teacher": "current", "num_plain": 2}
    # Room for two short groups, and not for a short and a long one.
    is_padded = "padded" in what or "zero" in what
    budget = {(False, False): 130, (False, True): 170, (True, False): 300, (True, True): 450}[
        is_padded, "distil" in what
    ]
    if "padded" in what:
        changes["prefix_sharing"] = "off"
    if "checkpointing" in what:
        changes["gradient_checkpointing"] = True
    if "zero" in what:
        neat_config.check_sharding = lambda c: None  # on a CPU
        changes["deepspeed"] = zero_settings(what)
    args = config(
        folder,
        prompts_per_round=4,
        num_train_epochs=3,
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=1,
        max_tokens_per_micro_batch=budget,
        max_grad_norm=0.0,
        kl_weight=0.1,
        learning_rate=1e-3,
        drift_prompts=0 if "given" in what else 2,
        ddp_backend="gloo" if processes > 1 else None,
        **changes,
    )
    if processes > 1 and "zero" not in what:
        use_fsdp2()
    model = tiny_model(
        "gpt2" if "tied" in what else "llama", len(TOKENIZER), tokenizer=TOKENIZER
    ).double()
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    if "once" in what and processes > 1:
        args.loads_once = True  # type: ignore[misc]
        if RANK:
            without_numbers(model)
    gradients = FirstGradients()
    t = NEATTrainer(
        model,
        failing if "fail" in what else count_e,
        args,
        LONG,
        LONG[:3],
        processing_class=TOKENIZER,
        callbacks=[gradients, OnSecondProcess(what)],
        peft_config=lora if "lora" in what else None,
    )
    try:
        output = t.train(resume_from_checkpoint=True if "resume" in what else None)
    except (NEATError, RunInterrupted) as error:
        (folder / f"stopped-{RANK}.txt").write_text(f"{type(error).__name__}: {error}")
    else:
        torch.save(gradients.found, folder / f"gradients-{RANK}.pt")
        weights = {n: whole(p) for n, p in t.policy.named_parameters()}
        torch.save(weights, folder / f"weights-{RANK}.pt")
        with t.parts.setup.reference() as start:
            facts = {
                "layout": t.parts.engine.layout,
                "sharding": sharding_of(t.accelerator),
                "is_sharded": is_sharded(t.policy),
                "reference_is_sharded": is_sharded(start),
                "passes_added": gradients.passes_added,
                "loss": output.training_loss,
            }
        (folder / f"facts-{RANK}.json").write_text(json.dumps(facts))
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)
