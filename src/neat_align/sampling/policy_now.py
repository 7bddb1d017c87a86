"""A policy as it is now, for a sampler of another engine: weights, their version, scores."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from neat_align.modeling.packing import TokenIds
from neat_align.sampling.protocol import Sampler

# (prompt ids, completion ids) → per-token log-probabilities in nats, in order.
Score: TypeAlias = Callable[[Sequence[TokenIds], Sequence[TokenIds]], list[tuple[float, ...]]]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PolicyNow:
    """The policy that completions are to be drawn from.

    Attributes:
        model: the model, with its adapter if it has one; with `which` "start" it is the start
            policy, whose adapter is switched off only until the call that is given this returns.
        which: "current", the policy that learns, or "start", the one that it started from.
        adapter_is_off: the model has an adapter, and the policy is the model without it.
        eos_token_ids: what ends a completion.
        score: the trainer's own log-probabilities under this policy, at any time.
    """

    model: torch.nn.Module
    which: Literal["current", "start"]
    adapter_is_off: bool
    eos_token_ids: tuple[int, ...]
    score: Score

    @functools.cached_property
    def version(self) -> str:
        """Changes exactly when a weight does that is trained; the same for the same weights, in
        every process and in a run that goes on.
        """
        return weights_version(self.model)


# Gives a sampler of the policy as it is now: asked anew before every round and every evaluation.
MakeSampler: TypeAlias = Callable[[PolicyNow], Sampler]


def weights_version(model: torch.nn.Module) -> str:
    """Sixteen hexadecimal digits that tell the weights that are trained from others; of a model of
    which none is, all its weights.

    From names, shapes, and for each weight two sums over the bits of all its numbers, in integers:
    the same on every device. One pass over the weights.
    """
    digest = hashlib.sha256()
    weights = list(model.named_parameters())
    for name, parameter in [w for w in weights if w[1].requires_grad] or weights:
        bits = parameter.detach().reshape(-1).view(_BITS[parameter.element_size()])
        total = bits.sum(dtype=torch.int64)
        # Numbers that change places leave the first sum as it is.
        halves = bits[::2].sum(dtype=torch.int64)
        digest.update(f"{name} {tuple(parameter.shape)} {int(total)} {int(halves)}".encode())
    return digest.hexdigest()[:16]
