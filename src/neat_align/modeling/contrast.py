"""The contrast of two instructions at every token, as a distribution to learn or to sample from.

    q(v) ∝ p0(v | x) · r(v)^α,    log r(v) = mean over pairs of log p0(v | x, +) − log p0(v | x, −)

p0 is the policy without training. Contrastive decoding (2210.15097) divides a large model by a
small one; here one model under a positive instruction is divided by itself under a negative one,
and p0 on the plain prompt stays a factor, so that α = 0 changes nothing. What is moved can be kept
to plausible tokens, as there: the others hardly ever are what the instructions differ in, and a
ratio of two small probabilities is mostly noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softshrink


def mean_log_ratio(
    pairs: Iterable[tuple[Float[Tensor, "n vocab"], Float[Tensor, "n vocab"]]],
    clip: float | None = None,
) -> Float[Tensor, "n vocab"]:
    """The mean over pairs of log p(v | +) − log p(v | −), in nats.

    `pairs` gives the log-probabilities under each pair's positive and negative instruction; one
    pair is held at a time. With `clip` each pair's ratio is kept within ± so many nats.
    Raises ValueError without pairs.
    """
    total: Tensor | None = None
    count = 0
    for positive, negative in pairs:
        ratio = positive - negative
        if clip is not None:
            ratio = ratio.clamp(-clip, clip)
        total = ratio if total is None else total.add_(ratio)
        count += 1
    if total is None:
        raise ValueError("a contrast needs a pair of instructions")
    return total if count == 1 else total.div_(count)


def contrast_logprobs(
    start: Float[Tensor, "n vocab"],
    log_ratio: Float[Tensor, "n vocab"],
    alpha: float | Float[Tensor, "n 1"],
    min_p: float = 0.0,
    threshold: float = 0.0,
    *,
    raise_only: bool = False,
) -> Float[Tensor, "n vocab"]:
    """log q(v) in nats, from log p0(v | x) and the log-ratio.

        q(v) = p0(v) · r(v)^α · P / Σ_{u ∈ S} p0(u) r(u)^α  for v ∈ S,    q(v) = p0(v) elsewhere

    S are the plausible tokens, p0(v) ≥ `min_p` · max p0, and P is their p0 together: the
    other tokens keep exactly what they had. With `min_p` 0 all tokens are plausible. A
    constant that is added to a row of `log_ratio` changes nothing.

    With `threshold` the log-ratio is centred (its mean under p0 over S is 0) and brought that many
    nats nearer to 0: what the instructions hardly differ in stays as it was. With `raise_only` it
    is centred, and where it would push a token down that token is left: it only loses to those that
    are raised.
    """
    plausible = plausible_tokens(start, min_p)
    moved = start + contrast_shift(
        start, log_ratio, alpha, plausible, threshold=threshold, raise_only=raise_only
    )
    if plausible is None:
        return moved.log_softmax(-1)
    mass = start.masked_fill(~plausible, -torch.inf).logsumexp(-1, keepdim=True)
    moved_mass = moved.masked_fill(~plausible, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.where(plausible, moved + (mass - moved_mass), start)


def contrast_shift(
    start: Float[Tensor, "n vocab"],
    log_ratio: Float[Tensor, "n vocab"],
    alpha: float | Float[Tensor, "n 1"],
    plausible: Bool[Tensor, "n vocab"] | None,
    *,
    threshold: float,
    raise_only: bool,
) -> Float[Tensor, "n vocab"]:
    """What is added to log p0 before it is normalised: α times the log-ratio, as `threshold` and
    `raise_only` leave it.
    """
    if threshold > 0 or raise_only:
        log_ratio = centred(start, log_ratio, plausible)
    if threshold > 0:
        log_ratio = softshrink(log_ratio, threshold)
    shift = alpha * log_ratio
    return shift.clamp(min=0) if raise_only else shift


def centred(
    start: Float[Tensor, "n vocab"],
    log_ratio: Float[Tensor, "n vocab"],
    plausible: Bool[Tensor, "n vocab"] | None = None,
) -> Float[Tensor, "n vocab"]:
    """The log-ratio less its mean under p0, over the plausible tokens where they are given."""
    p0 = plausible_p0(start, plausible)
    mean = (p0 * log_ratio).sum(-1, keepdim=True) / p0.sum(-1, keepdim=True)
    return log_ratio - mean


def plausible_p0(
    start: Float[Tensor, "n vocab"], plausible: Bool[Tensor, "n vocab"] | None
) -> Float[Tensor, "n vocab"]:
    """p0 of the plausible tokens and 0 of the others; of all tokens where none are given."""
    p0 = start.exp()
    return p0 if plausible is None else p0.masked_fill(~plausible, 0.0)


def plausible_tokens(
    start: Float[Tensor, "n vocab"], min_p: float
) -> Bool[Tensor, "n vocab"] | None:
    """Where p0(v) is at least `min_p` times the row's largest; None, for all, where that is 0."""
    if min_p <= 0:
        return None
    return start >= start.amax(-1, keepdim=True) + math.log(min_p)
