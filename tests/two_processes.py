"""Two rounds of training, run by test_distributed.py in one process or in two: python two_processes.py FOLDER PER_DEVICE ACCUMULATION"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from test_trainer import trainer, weights

if __name__ == "__main__":
    folder, per_device, accumulation = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    t = trainer(
        folder,
        prompts_per_round=8,
        num_train_epochs=2,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        max_tokens_per_micro_batch=150,  # groups are of unequal size: the processes cut into unequal numbers of micro-batches
        learning_rate=1e-3,
        kl_weight=0.1,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )
    t.train()
    rank = int(os.environ.get("RANK", "0"))
    torch.save(weights(t), folder / f"weights-{rank}.pt")
