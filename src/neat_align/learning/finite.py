"""Losses, log-probabilities and gradients that are not finite numbers, found before they reach a
weight.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from neat_align.errors import name_list
from neat_align.learning.batches import GroupBatch


def non_finite_batch(
    b: GroupBatch, logps: Float[Tensor, "rows tokens"], loss: Float[Tensor, ""], step: int
) -> str | None:
    """What is not a finite number in this micro-batch, with the ids of its prompts; None when all
    is well.

    Where a log-probability is not finite, only the prompts of those completions are named; else the
    whole micro-batch.
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


def non_finite_gradient(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], step: int
) -> str | None:
    """The first parameter whose gradient is not finite, in words; None when all are."""
    gradients = [(name, p.grad) for name, p in parameters if p.grad is not None]
    if not gradients:
        return None
    finite = torch.stack(
        [torch.isfinite(g).all().to(gradients[0][1].device) for _, g in gradients]
    ).tolist()
    bad = [name for (name, _), fine in zip(gradients, finite, strict=True) if not fine]
    if not bad:
        return None
    return (
        f"the gradient of {bad[0]} is not finite at step {step} ({len(bad)} of "
        f"{len(gradients)} weights)"
    )
