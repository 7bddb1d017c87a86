"""A run whose completions a vLLM server samples, in one process or in two:
python two_processes_vllm.py FOLDER URL [lora]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from neat_align import NEATTrainer
from small_trainer import ROWS, config, count_e, lora, weights
from vllm_server import TOKENIZER, servable_model

RANK = int(os.environ.get("RANK", "0"))

if __name__ == "__main__":
    folder, url = Path(sys.argv[1]), sys.argv[2]
    t = NEATTrainer(
        servable_model(),
        count_e,
        config(
            folder,
            sampler="vllm",
            vllm_server=url,
            num_train_epochs=2,
            prompts_per_round=4,
            max_completion_length=6,
            per_device_train_batch_size=2 if "RANK" in os.environ else 4,
            optim="sgd",
            learning_rate=0.05,
            ddp_backend="gloo" if "RANK" in os.environ else None,
        ),
        ROWS,
        processing_class=TOKENIZER,
        peft_config=lora() if "lora" in sys.argv else None,
    )
    t.train()
    torch.save(weights(t), folder / f"weights-{RANK}.pt")
