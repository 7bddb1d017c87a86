"""A policy as it is now, for a sampler of another engine: weights, their version, scores."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from neat_align.modeling.lockstep import is_sharded
from neat_align.modeling.packing import TokenIds
from neat_align.modeling.whole_weights import whole_weights
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
        score: the trainer's own log-probabilities under this policy, at any time; where the model
            is sharded, only while completions are drawn, when all processes make the same passes.
    """

    model: torch.nn.Module
    which: Literal["current", "start"]
    adapter_is_off: bool
    eos_token_ids: tuple[int, ...]
    score: Score

    def __post_init__(self) -> None:
        if self.is_sharded:
            _ = self.version  # a collective call: made now, by all, and not when the first one asks

    @functools.cached_property
    def version(self) -> str:
        """Changes exactly when a weight does that is trained; the same for the same weights, in
        every process and in a run that goes on.
        """
        return weights_version(self.model)

    @property
    def is_sharded(self) -> bool:
        """Whether `model` holds this process's parts of the weights alone (FSDP2, ZeRO-3): it is
        then not copied, and called only while completions are drawn.
        """
        return is_sharded(self.model)

    def weights(
        self, *, trained_only: bool = False, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole weights, one at a time, in `dtype` (None: their own).

        All of the model's state dict, or of it what is trained. Where the model is sharded they
        are gathered as this goes on: every process has to go through all of them, also one that
        keeps none. What it gives may be the model's own memory: copy what is kept.
        """
        names = _trained(self.model) if trained_only else None
        return whole_weights(self.model, names, dtype)


# Gives a sampler of the policy as it is now: asked anew before every round and every evaluation.
MakeSampler: TypeAlias = Callable[[PolicyNow], Sampler]


def weights_version(model: torch.nn.Module) -> str:
    """Sixteen hexadecimal digits that tell the weights that are trained from others; of a model of
    which none is, all its weights.

    From names, shapes, and for each weight two sums over the bits of all its numbers, in integers:
    the same on every device. One pass over the weights; of sharded ones, on all processes together.
    """
    digest = hashlib.sha256()
    names = _trained(model) or {name for name, _ in model.named_parameters()}
    for name, parameter in whole_weights(model, names):
        bits = parameter.reshape(-1).view(_BITS[parameter.element_size()])
        total = bits.sum(dtype=torch.int64)
        # Numbers that change places leave the first sum as it is.
        halves = bits[::2].sum(dtype=torch.int64)
        digest.update(f"{name} {tuple(parameter.shape)} {int(total)} {int(halves)}".encode())
    return digest.hexdigest()[:16]


def _trained(model: torch.nn.Module) -> set[str]:
    """The names of the weights that are trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
