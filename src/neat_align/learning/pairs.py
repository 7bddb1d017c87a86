"""Which completions of a group are compared, and how well the policy orders them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ACTIVE_WEIGHT = 0.1
"""A pair of a sigmoid loss counts as active when its gradient is above this share of the largest
that it can have.
"""


def preferred_pairs(
    keys: Float[Tensor, "groups k"], present: Bool[Tensor, "groups k"], margin: float
) -> Bool[Tensor, "groups k k"]:
    """Which completions are ordered: [g, i, j] is true when i ≻ j.

        i ≻ j  ⇔  s_i − s_j > `margin`,    both present

    `keys` are rewards (or origin ranks), in reward units, higher is better; ties and near-ties make
    no pair. A slot that is padding or whose reward abstained is not `present` and is in no pair
    whatever its key holds. A present NaN orders nothing; refusing it is the caller's duty, as it
    knows which reward function returned it.
    """
    both = present[:, :, None] & present[:, None, :]
    return (keys[:, :, None] - keys[:, None, :] > margin) & both


def best_against_worst(
    keys: Float[Tensor, "groups k"], present: Bool[Tensor, "groups k"], margin: float
) -> Bool[Tensor, "groups k k"]:
    """One pair a group: its best completion above its worst, the earlier one where several are
    equal (DPO's, SimPO's data).

    No pair where the two keys are within `margin`. `keys` and `present` are those of
    `preferred_pairs`.
    """
    best = torch.where(present, keys, -math.inf).argmax(dim=-1)
    worst = torch.where(present, keys, math.inf).argmin(dim=-1)
    slots = torch.arange(keys.shape[-1], device=keys.device)
    chosen = (slots == best[:, None])[:, :, None] & (slots == worst[:, None])[:, None, :]
    return chosen & preferred_pairs(keys, present, margin)


def sides(
    pairs: Bool[Tensor, "groups k k"],
) -> tuple[Bool[Tensor, "groups k"], Bool[Tensor, "groups k"]]:
    """Which completions are desirable and which undesirable, for a loss that wants labels.

        desirable  ⇔  |{j : i ≻ j}| > |{j : j ≻ i}|,    undesirable  ⇔  <

    A completion that ranks above as many as below (in the middle, tied with all, absent) is
    neither. A group with a pair has both: its best one ranks above something and below nothing.
    """
    balance = pairs.sum(dim=-1) - pairs.sum(dim=-2)
    return balance > 0, balance < 0


def reference_point(
    ratios: Float[Tensor, "groups k"], pairs: Bool[Tensor, "groups k k"]
) -> Float[Tensor, " groups"]:
    """KTO's z₀ of each group: the mean log-ratio to the reference of the completions that are in a
    pair, at least 0. No gradient passes.

    In the unit of the scores. What is in no pair has no say, so that it may be left out of a batch.
    """
    ranked = pairs.any(dim=-1) | pairs.any(dim=-2)
    total = torch.where(ranked, ratios.detach(), 0.0).sum(dim=-1)
    return (total / ranked.sum(dim=-1).clamp(min=1)).clamp(min=0)


def penalised(
    keys: Float[Tensor, "groups k"],
    present: Bool[Tensor, "groups k"],
    is_negative: Bool[Tensor, "groups k"],
) -> Bool[Tensor, "groups k"]:
    """Which completions a penalty falls on: of negative origin, with a reward strictly below their
    group's median.

    The median is over present completions. To be below it is to be below the upper median, the
    element n // 2 of the sorted keys: between the two middle elements of an even group there is
    none. So no mean of two rewards is formed, and the answer depends on the order of the rewards
    alone. Ours; no paper of the family selects this way.
    """
    ascending = torch.where(present, keys, math.inf).sort(dim=-1).values
    middle = present.sum(dim=-1, keepdim=True) // 2
    return (keys < ascending.gather(-1, middle)) & present & is_negative


# ---- diagnostics ---------------------------------------------------------------------------------


def active_pairs(
    scores: Float[Tensor, "groups k"],
    pairs: Bool[Tensor, "groups k k"],
    *,
    ranking_loss: str,
    margin: float,
    beta: float,
    gamma: float,
    loser_scores: Float[Tensor, "groups k"] | None = None,
) -> Bool[Tensor, "groups k k"]:
    """Which pairs still teach something.

        hinge                   m + ℓ_j − ℓ_i > 0
        logistic                σ(−(β(ℓ_i − ℓ_j) − γ)) > `ACTIVE_WEIGHT`
        listwise, dpo           the same with γ = 0
        kto                     4σ(x)(1 − σ(x)) > `ACTIVE_WEIGHT`, x = β(r − z₀), for one of the two
        none                    never

    The sigmoid is the pair's gradient as a share of β; in `listwise`, where the losers of one
    winner share a gradient, it is what the pair would have alone, an upper bound. `kto` has a
    gradient a completion and not a pair: what counts is that one of the two has a label (`sides`)
    and its gradient is above that share of the largest. For `dpo` and `kto` hand in log-ratios,
    `scores - ref_scores`. What a loss does not have (`margin`, `beta` or `gamma`) is
    not read. `loser_scores` are those of `score_gaps`. No gradient passes.
    """
    losers = None if loser_scores is None else loser_scores.detach()
    gaps = score_gaps(scores.detach(), pairs, losers)
    if ranking_loss == "hinge":
        return (margin - gaps > 0) & pairs
    if ranking_loss == "logistic":
        return (torch.sigmoid(gamma - beta * gaps) > ACTIVE_WEIGHT) & pairs
    if ranking_loss in ("listwise", "dpo"):
        return (torch.sigmoid(-beta * gaps) > ACTIVE_WEIGHT) & pairs
    if ranking_loss == "kto":
        ratios, (good, bad) = scores.detach(), sides(pairs)
        share = torch.sigmoid(beta * (ratios - reference_point(ratios, pairs)[:, None]))
        learns = (4 * share * (1 - share) > ACTIVE_WEIGHT) & (good | bad)
        return (learns[:, :, None] | learns[:, None, :]) & pairs
    if ranking_loss == "none":
        return torch.zeros_like(pairs)
    raise ValueError(
        f"ranking_loss is {ranking_loss!r}; it must be hinge, logistic, listwise, dpo, kto or none"
    )


def ranking_accuracy(
    scores: Float[Tensor, "groups k"], pairs: Bool[Tensor, "groups k k"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """How many pairs the policy's scores order as the rewards do, and of how many; equal scores
    count half.

    Two counts over the whole batch, to be summed over batches and processes before they are
    divided. No gradient passes.
    """
    gaps = score_gaps(scores.detach(), pairs)
    correct = (gaps > 0) & pairs
    tied = (gaps == 0) & pairs
    return correct.sum().float() + 0.5 * tied.sum().float(), pairs.sum()


# ---- shared parts --------------------------------------------------------------------------------


def score_gaps(
    scores: Float[Tensor, "groups k"],
    pairs: Bool[Tensor, "groups k k"],
    loser_scores: Float[Tensor, "groups k"] | None = None,
) -> Float[Tensor, "groups k k"]:
    """ℓ_i − ℓ_j at [g, i, j] where i ≻ j, and 0 elsewhere, whatever an unpaired slot holds.

    `loser_scores` are what completions score as the worse one of a pair, ℓ_j, where that differs.
    """
    losers = scores if loser_scores is None else loser_scores
    return torch.where(pairs, scores[:, :, None] - losers[:, None, :], 0.0)
