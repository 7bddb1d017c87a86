"""What must not go on silently: numbers that are not finite, and runs that collapse while their loss improves."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from neat_align.packing import GroupBatch

logger = logging.getLogger(__name__)

# Prompts that a message names; a batch may hold thousands.
NAMED = 8


def non_finite_batch(b: GroupBatch, logps: Float[Tensor, "rows tokens"], loss: Float[Tensor, ""], step: int) -> str | None:
    """What is not a finite number in this micro-batch, with the ids of its prompts; None when all is well.

    Where a log-probability is not finite, only the prompts of those completions are named; else the whole micro-batch.
    """
    bad_rows = (~torch.isfinite(logps.detach()) & b.rows.completion_mask).any(-1)
    # One number crosses from the device where all is well, as in every step.
    if bool(torch.isfinite(loss.detach()) & ~bad_rows.any()):
        return None
    at = sorted(set(b.group[bad_rows].tolist()))
    named = [b.names[i] for i in at] or list(b.names)
    what = f"the loss is {float(loss.detach())} at step {step}"
    if at:
        what += f", and log-probabilities of {int(bad_rows.sum())} completions are not finite"
    return f"{what}; prompts {name_list(named)}"


def non_finite_gradient(parameters: Iterable[tuple[str, torch.nn.Parameter]], step: int) -> str | None:
    """The first parameter whose gradient is not finite, in words; None when all are."""
    gradients = [(name, p.grad) for name, p in parameters if p.grad is not None]
    if not gradients:
        return None
    finite = torch.stack([torch.isfinite(g).all().to(gradients[0][1].device) for _, g in gradients]).tolist()
    bad = [name for (name, _), fine in zip(gradients, finite, strict=True) if not fine]
    if not bad:
        return None
    return f"the gradient of {bad[0]} is not finite at step {step} ({len(bad)} of {len(gradients)} weights)"


def not_finite(name: str, prompts: Sequence[str], values: Sequence[float]) -> str | None:
    """The prompts whose numbers are not finite, in words; None when all are. One number and one prompt id each."""
    bad = [prompt for prompt, value in zip(prompts, values, strict=True) if not math.isfinite(value)]
    return f"the {name} of {len(bad)} completions is not finite; prompts {name_list(bad)}" if bad else None


def name_list(names: Sequence[str]) -> str:
    """Prompt ids for a message: the first few, and how many more."""
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - NAMED} more" if len(unique) > NAMED else ""
    return ", ".join(unique[:NAMED]) + more


# ---- alarms ----------------------------------------------------------------------------------------------------------


@dataclass
class Alarms:
    """Warnings that a run is collapsing, each kind said once a round.

    `logp_drop` is in nats per token under the first step of the run; `ratio` is how many times over, or under, the start a
    length or entropy may go. 0 turns either off. `baselines` are the numbers of the start and belong into a checkpoint.
    """

    logp_drop: float
    ratio: float
    baselines: dict[str, float] = field(default_factory=dict)
    said: set[tuple[str, int]] = field(default_factory=set)

    def training(self, logs: Mapping[str, float], round_index: int) -> None:
        """Look at a training log line: have the best answers become less likely? (likelihood displacement)"""
        if "logps/best" not in logs or not self.logp_drop:
            return
        start, now = self.baselines.setdefault("logps/best", logs["logps/best"]), logs["logps/best"]
        if start - now > self.logp_drop:
            self._say(
                "best answers",
                round_index,
                f"the log-probability of the best answers fell from {start:.2f} to {now:.2f} nats per token, by more than "
                f"alarm_logp_drop={self.logp_drop}: the ranking loss is making good answers unlikely, too. A larger lm_weight or "
                "kl_weight, or a smaller learning rate, holds them",
            )

    def drift(self, facts: Mapping[str, float], start: Mapping[str, float], round_index: int) -> None:
        """Look at a drift measurement: has the length or the entropy of plain answers run away?"""
        for name, unit, meaning in (
            ("mean_length", "tokens", "the reward may be paid for length"),
            ("entropy", "nats per token", "answers become one, or noise"),
        ):
            if not self.ratio or not facts.get(name) or not start.get(name):
                continue
            times = facts[name] / start[name]
            if times > self.ratio or times < 1 / self.ratio:
                self._say(
                    name,
                    round_index,
                    f"the {name.replace('_', ' ')} of plain answers went from {start[name]:.3g} to {facts[name]:.3g} {unit}, "
                    f"{times:.2g} times the start (alarm_ratio={self.ratio}): {meaning}. Look at the answers (neat-align inspect)",
                )

    def _say(self, kind: str, round_index: int, message: str) -> None:
        if (kind, round_index) not in self.said:
            self.said.add((kind, round_index))
            logger.warning("round %d: %s", round_index + 1, message)
