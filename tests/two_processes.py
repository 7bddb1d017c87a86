"""Rounds of training, run by test_distributed.py in one process or in two:
python two_processes.py FOLDER PER_DEVICE ACCUMULATION [WHAT]

WHAT may be nan or signal (after the second step, on the second process), and resume. uneven: the
second process has fewer groups in a round's last step, and none of some origins; a log line stands
for four steps, and the last two steps have none. uneven-cut and uneven-resume: the same, stopped
between two log lines, and gone on with. distil: contrast distillation from the current policy,
beside the ranking loss. round-cut and round-resume: stopped at the end of the first round, and gone
on with, which may be in another number of processes. whole: as without WHAT, with AdamW, as signal
and resume have it; all else takes plain gradient steps, which leave a difference of rounding what
it is (Adam's first steps are signs).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from neat_align import CollapseError
from neat_align.errors import RunInterrupted
from small_trainer import ROWS, trainer, weights

RANK = int(os.environ.get("RANK", "0"))


class OnSecondProcess(TrainerCallback):
    """After the second step, on the second process alone: a broken weight, or SIGTERM."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self.what == "round-cut" and RANK == 0 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if RANK != 1 or state.global_step != 2:
            return
        if self.what == "nan":
            t.policy.get_output_embeddings().weight.data[0, 0] = float("nan")
        elif self.what in ("signal", "uneven-cut"):
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    folder, per_device, accumulation = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    what = sys.argv[4] if len(sys.argv) > 4 else ""
    uneven: dict[str, Any] = {
        "prompts_per_round": 7,
        "num_train_epochs": 3,
        "logging_steps": 4,
        "rows": [row if i == 0 else {"prompt": row["prompt"]} for i, row in enumerate(ROWS)],
        "use_human_completions": True,
        "num_plain": 1,
        "ranking_loss": "dpo",
        "negative_penalty": "unlikelihood",
        "negative_weight": 0.1,
        "accelerator_config": {"even_batches": False},
        "drift_prompts": 2,
    }
    even: dict[str, Any] = {"prompts_per_round": 8, "num_train_epochs": 2}
    distilling: dict[str, Any] = {
        **even,
        "num_positive": 1,
        "num_plain": 2,
        "distil_weight": 1.0,
        "distil_teacher": "current",
    }
    settings = uneven if what.startswith("uneven") else even
    adam = what in ("whole", "signal", "resume", "nan")
    t = trainer(
        folder,
        **(distilling if what == "distil" else settings),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        # groups are of unequal size: the processes cut into unequal numbers of micro-batches
        max_tokens_per_micro_batch=150,
        optim="adamw_torch" if adam else "sgd",
        learning_rate=1e-3 if adam else 0.05,
        kl_weight=0.1,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        callbacks=[OnSecondProcess(what)],
    )
    try:
        output = t.train(resume_from_checkpoint=True if what.endswith("resume") else None)
    except (CollapseError, RunInterrupted) as error:
        (folder / f"stopped-{RANK}.txt").write_text(
            f"{type(error).__name__} at {t.state.global_step}: {error}"
        )
    else:
        (folder / f"output-{RANK}.json").write_text(json.dumps(output.metrics))
        (folder / f"history-{RANK}.json").write_text(json.dumps(t.state.log_history))
        assert output.training_loss == output.metrics["train_loss"]
    torch.save(weights(t), folder / f"weights-{RANK}.pt")
    if torch.distributed.is_initialized():
        # What an error left of the process group has threads, which the interpreter's end aborts
        # on, now and then: leave without it.
        torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
