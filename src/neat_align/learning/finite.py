"""Losses, log-probabilities and gradients that are not finite numbers, found before they reach a
weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from neat_align.errors import name_list
from neat_align.learning.batches import GroupBatch


@dataclass(frozen=True)
class CheckedBatch:
    """Whether a micro-batch's numbers are finite: still on the device, to be read once a step.

    `bad_rows` are the completions with a log-probability that is not; `group` says whose they are,
    `names` are the groups' prompt ids.
    """

    loss: Float[Tensor, ""]
    bad_rows: Bool[Tensor, " rows"]
    group: Int[Tensor, " rows"]
    names: tuple[str, ...]

    @property
    def is_fine(self) -> Bool[Tensor, ""]:
        """Whether all is finite."""
        return torch.isfinite(self.loss) & ~self.bad_rows.any()

    def in_words(self, step: int) -> str:
        """What is not finite, with the ids of its prompts.

        Where a log-probability is not, only the prompts of those completions are named; else the
        whole micro-batch.
        """
        at = sorted(set(self.group[self.bad_rows].tolist()))
        named = [self.names[i] for i in at] or list(self.names)
        what = f"the loss is {float(self.loss)} at step {step}"
        if at:
            bad = int(self.bad_rows.sum())
            what += f", and log-probabilities of {bad} completions are not finite"
        return f"{what}; prompts {name_list(named)}"


def checked_batch(
    b: GroupBatch, logps: Float[Tensor, "rows tokens"], loss: Float[Tensor, ""]
) -> CheckedBatch:
    """Look at a micro-batch's numbers without reading any."""
    bad_rows = (~torch.isfinite(logps.detach()) & b.rows.completion_mask).any(-1)
    return CheckedBatch(loss.detach(), bad_rows, b.group, b.names)


@dataclass(frozen=True)
class Found:
    """What is not finite in a step on this rank: micro-batches, and weights by their gradient.

    `of` is how many weights have a gradient.
    """

    batches: tuple[CheckedBatch, ...] = ()
    weights: tuple[str, ...] = ()
    of: int = 0


def non_finite(
    batches: Sequence[CheckedBatch], parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> Found:
    """What is not finite in these micro-batches and gradients. Waits for the device once."""
    gradients = [(name, _here(p.grad)) for name, p in parameters if p.grad is not None]
    flags = [b.is_fine for b in batches] + [torch.isfinite(g).all() for _, g in gradients]
    if not flags:
        return Found()
    fine = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    in_batches, in_weights = fine[: len(batches)], fine[len(batches) :]
    return Found(
        tuple(b for b, ok in zip(batches, in_batches, strict=True) if not ok),
        tuple(name for (name, _), ok in zip(gradients, in_weights, strict=True) if not ok),
        len(gradients),
    )


def _here(gradient: Tensor) -> Tensor:
    """The part of a gradient that this rank holds; of a whole one, all of it."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
