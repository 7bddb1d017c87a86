"""What a person sees while a run works: bars for stages and steps, and one short line a round instead of every metric."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback


@contextlib.contextmanager
def stage_bars(title: str, disable: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A tqdm bar per stage, reported to by (stage, finished, of how many)."""
    bars: dict[str, Any] = {}

    def report(stage: str, finished: int, total: int) -> None:
        if stage not in bars or bars[stage].total != total:
            if stage in bars:
                bars[stage].close()
            bars[stage] = tqdm(total=total, desc=f"{title}: {stage}", leave=False, disable=disable, dynamic_ncols=True)
        bars[stage].update(finished - bars[stage].n)

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


class RoundProgressCallback(ProgressCallback):
    """Trainer's bar, with the numbers that matter beside it; everything else goes to metrics.jsonl."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Steps update the bar; rounds, evaluations and drift write a line above it."""
        bar: Any = self.training_bar
        if not state.is_world_process_zero or bar is None or not logs:
            return
        if "loss" in logs:
            shown = {"loss": logs["loss"], "accuracy": logs.get("ranking/accuracy")}
            bar.set_postfix({k: f"{v:.2f}" for k, v in shown.items() if v is not None})
        elif line := summary_line(logs):
            bar.write(line)


def summary_line(logs: dict[str, Any]) -> str:
    """One line, at most 80 columns, for a round, a drift check or an evaluation; '' for any other log."""
    if "round" in logs:
        parts = [f"round {int(logs['round']) + 1}"]
        names = {
            "reward/positive": "reward +",
            "reward/plain": "plain",
            "reward/negative": "reward −",
            "contrast/inversion_rate": "inverted",
        }
    elif "drift/kl" in logs:
        parts = ["  drift"]
        names = {"drift/kl": "KL", "drift/distinct2": "distinct-2", "drift/mean_length": "length"}
    elif any(k.startswith(("eval_", "before_", "after_")) for k in logs):
        parts = ["  held out"]
        suffixes = {"reward": "reward", "kl": "KL", "distinct2": "distinct-2", "perplexity": "perplexity"}
        names = {k: suffixes[k.split("_", 1)[1]] for k in logs if k.split("_", 1)[-1] in suffixes}
    else:
        return ""
    parts += [f"{label} {logs[k]:.3g}" for k, label in names.items() if k in logs]
    return "  ".join(parts)
