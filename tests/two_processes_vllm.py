"""A run whose completions a vLLM server samples, in one process or in two, which hold all weights
or divide them: python two_processes_vllm.py FOLDER URL [lora] [shards | zero3]; URL may be "given".
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from neat_align import NEATTrainer, PolicyNow
from neat_align.config import neat_config
from neat_align.errors import NEATError
from neat_align.modeling.lockstep import is_sharded
from neat_align.modeling.whole_weights import whole_weights
from neat_align.sampling.transformers_sampler import TransformersSampler
from small_trainer import ROWS, config, count_e, lora
from two_shards_train import use_fsdp2, zero_settings
from vllm_server import TOKENIZER, servable_model

RANK = int(os.environ.get("RANK", "0"))


def whole_copy(policy: PolicyNow) -> TransformersSampler:
    """An engine of each process's own, which samples from all weights."""
    model = servable_model(5)
    model.load_state_dict(dict(policy.weights()))
    return TransformersSampler(model.eval(), policy.eos_token_ids, TOKENIZER.pad_token_id)


if __name__ == "__main__":
    folder, url = Path(sys.argv[1]), sys.argv[2]
    in_turn, changes = "RANK" in os.environ, dict[str, Any]()
    if "zero3" in sys.argv:
        neat_config.check_sharding = lambda c: None  # on a CPU
        changes["deepspeed"] = zero_settings("zero3")
    args = config(
        folder,
        **({} if url == "given" else {"sampler": "vllm", "vllm_server": url}),
        num_train_epochs=2,
        prompts_per_round=4,
        max_completion_length=6,
        per_device_train_batch_size=2 if in_turn else 4,
        optim="sgd",
        learning_rate=0.05,
        ddp_backend="gloo" if in_turn else None,
        **changes,
    )
    if "shards" in sys.argv and in_turn:
        use_fsdp2()
    t = NEATTrainer(
        servable_model(),
        count_e,
        args,
        ROWS,
        processing_class=TOKENIZER,
        peft_config=lora() if "lora" in sys.argv else None,
        sampler=whole_copy if url == "given" else None,
    )
    try:
        t.train()
    except NEATError as error:
        (folder / f"stopped-{RANK}.txt").write_text(f"{type(error).__name__}: {error}")
    else:
        assert is_sharded(t.policy) == (in_turn and sys.argv[-1] in ("shards", "zero3"))
        whole = {name: value.clone() for name, value in whole_weights(t.policy)}
        torch.save(whole, folder / f"weights-{RANK}.pt")
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)
