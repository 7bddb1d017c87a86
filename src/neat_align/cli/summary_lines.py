"""One line for what was measured: a round, a drift check, an evaluation."""

from __future__ import annotations

from typing import Any

# What a line shows of a log, and the word for it.
_ROUND = {
    "reward/positive": "reward +",
    "reward/plain": "plain",
    "reward/negative": "reward −",
    "contrast/inversion_rate": "inverted",
}
_DRIFT = {"drift/kl": "KL", "drift/distinct2": "distinct-2", "drift/mean_length": "length"}
# After `eval_`, `before_` or `after_`.
_HELD_OUT = {
    "reward": "reward",
    "kl": "KL",
    "distinct2": "distinct-2",
    "perplexity": "perplexity",
}


def summary_line(logs: dict[str, Any]) -> str:
    """One line, at most 80 columns, for a round, a drift check or an evaluation; '' for any other
    log.
    """
    if "round" in logs:
        parts, words = [f"round {int(logs['round']) + 1}"], _ROUND
    elif "drift/kl" in logs:
        parts, words = ["  drift"], _DRIFT
    elif any(k.startswith(("eval_", "before_", "after_")) for k in logs):
        parts = ["  held out"]
        words = {k: _HELD_OUT.get(k.split("_", 1)[-1], "") for k in logs}
    else:
        return ""
    parts += [f"{word} {logs[k]:.3g}" for k, word in words.items() if word and k in logs]
    return "  ".join(parts)
