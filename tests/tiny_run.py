"""A deterministic tiny run for scripts that kill it: python tiny_run.py FOLDER [--resume] [--kill-at N [--after]]

Two rounds of two steps on a random model, in seconds. `--kill-at N` kills the process (SIGKILL) at its N-th rename, before
it or `--after` it: everything durable is renamed into place. At the end FOLDER/weights.pt holds the weights, and stdout the
number of renames. Run again with --resume; rounds/, metrics.jsonl (but for times) and weights are those of an unbroken run.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch

from test_survival import small
from test_trainer import weights

renames = 0


def kill_at(number: int, *, after: bool) -> None:
    replace = Path.replace

    def counting(self: Path, target: Any) -> Path:
        global renames
        renames += 1
        if renames == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        done = replace(self, target)
        if renames == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    Path.replace = counting  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--after", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(1)
    kill_at(a.kill_at, after=a.after)
    t = small(a.folder)
    t.train(resume_from_checkpoint=True if a.resume else None)
    torch.save(weights(t), a.folder / "weights.pt")
    print(renames)
