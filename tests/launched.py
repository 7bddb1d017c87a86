"""What a launched command trains with: rewards that fail once, on one process.

`launched:count_e` scores; with FAIL_ONCE=raise in the environment it raises in the second round of
the first try, with FAIL_ONCE=kill the second process is killed after the first checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAIL = os.environ.get("FAIL_ONCE", "")
RUN = Path(os.environ.get("RUN_FOLDER", "."))


def is_first_failure() -> bool:
    try:
        (RUN.parent / f"{RUN.name}-failed").mkdir()
    except FileExistsError:
        return False
    return True


def kill_after_the_first_checkpoint() -> None:
    while not list(RUN.glob("checkpoint-*/COMPLETE.json")):
        time.sleep(0.02)
    if is_first_failure():
        os.kill(os.getpid(), signal.SIGKILL)


if FAIL == "kill" and os.environ.get("RANK") == "1":
    threading.Thread(target=kill_after_the_first_checkpoint, daemon=True).start()


def count_e(
    prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
) -> list[float | None]:
    """How often the answer says e."""
    in_second_round = (RUN / "rounds" / "00001").exists()
    if FAIL == "raise" and in_second_round and is_first_failure():
        raise RuntimeError("the reward broke")
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text.count("e")) + 0.01 * len(text) for text in texts]
