"""What a micro-batch says of the step: a numerator and a denominator a metric, on the device."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neat_align.config.objective_options import LOG_RATIO_LOSSES
from neat_align.learning import pairs as pair_masks
from neat_align.learning.losses import LossTerms
from neat_align.learning.objective import (
    MicroBatch,
    ObjectiveParams,
    RankedScores,
    Scores,
    ranked_scores,
    ranking_losses,
    score_tables,
)
from neat_align.learning.step_metrics import sum_dtype
from neat_align.rounds.completions import ORIGINS

_TERMS = ("ranking", "lm", "negative", "kl", "distil")
_OF_AN_ORIGIN = ("ranking/active_pair_fraction", "ranking/gradient_share", "logps")
METRICS: tuple[str, ...] = (
    *(f"loss/{term}" for term in _TERMS),
    "ranking/accuracy",
    "ranking/active_pair_fraction",
    *(f"{name}/{origin}" for origin in ORIGINS for name in _OF_AN_ORIGIN),
    "logps/best",
    "packing/padding_fraction",
    "packing/tokens_per_micro_batch",
)
"""What `step_facts` gives a numerator and a denominator of, in this order."""
SHARE_NEEDS = {f"ranking/gradient_share/{o}": f"logps/{o}" for o in ORIGINS}
"""An origin without a completion has no share of the gradient, rather than 0."""


def step_facts(
    micro_batch: MicroBatch,
    logps: Float[Tensor, "rows tokens"],
    terms: LossTerms,
    p: ObjectiveParams,
) -> Float[Tensor, "metrics 2"]:
    """Numerator and denominator of each of `METRICS` in this batch, to be summed over micro-batches
    and ranks. No gradient passes, and no number leaves the device.

    A pair counts for the origin of its loser. `gradient_share` is the origin's part of the summed
    absolute gradient of the ranking loss with respect to the scores. `accuracy` is of plain scores,
    also where the ranking loss weighs tokens. The shares of a step's loss
    have denominator 0.
    """
    b, pairs, best = micro_batch.groups, micro_batch.pairs, micro_batch.target_rows
    logps, mask, wide = logps.detach(), b.rows.completion_mask, sum_dtype(logps.device)
    scores = score_tables(b, logps, p)
    ranked = ranked_scores(b, logps, p, scores)
    active = pair_masks.active_pairs(
        _compared(ranked.winners, p),
        pairs,
        loser_scores=None if ranked.losers is None else _compared(ranked.losers, p),
        ranking_loss=p.ranking_loss,
        margin=p.hinge_margin,
        beta=p.beta,
        gamma=p.gamma,
    )
    correct, total = pair_masks.ranking_accuracy(scores.policy, pairs)
    tokens, nats = mask.sum(-1).to(wide), torch.where(mask, logps, 0.0).to(wide).sum(-1)
    pull = _pull(ranked, pairs, p).to(wide)
    by_slot = torch.stack(
        [active.sum(1), pairs.sum(1), pull, torch.zeros_like(pull), b.table(nats), b.table(tokens)],
        -1,
    )
    is_of = b.origins[..., None] == torch.arange(len(ORIGINS), device=logps.device)
    # Chosen, not multiplied: what is not finite in one origin stays there.
    of_origin = torch.where(is_of[..., None], by_slot[:, :, None], 0.0).sum((0, 1))
    of_origin[:, 3] = pull.sum()  # whose share it is, whichever origins this batch holds
    shares = torch.stack([getattr(terms, name).detach() for name in _TERMS]).to(wide)
    padding, fed = micro_batch.packing.to(wide)
    one = torch.ones_like(fed)
    return torch.cat(
        [
            torch.stack([shares, torch.zeros_like(shares)], -1),
            torch.stack([correct, total, active.sum(), total]).to(wide).view(2, 2),
            of_origin.view(-1, 2),
            torch.stack([nats[best].sum(), tokens[best].sum(), padding, one, fed, one]).view(3, 2),
        ]
    )


def _compared(scores: Scores, p: ObjectiveParams) -> Float[Tensor, "groups k"]:
    """What the ranking loss takes differences of."""
    return scores.log_ratios if p.ranking_loss in LOG_RATIO_LOSSES else scores.policy


def _pull(
    ranked: RankedScores, pairs: Bool[Tensor, "groups k k"], p: ObjectiveParams
) -> Float[Tensor, "groups k"]:
    """The absolute gradient of the ranking loss with respect to each completion's score.

    Where a completion scores differently as a winner and as a loser: of what raises both alike.
    """
    with torch.enable_grad():
        raise_by = torch.zeros_like(ranked.winners.policy, requires_grad=True)
        winners, losers = ranked.winners, ranked.losers
        raised = RankedScores(
            replace(winners, policy=winners.policy + raise_by),
            None if losers is None else replace(losers, policy=losers.policy + raise_by),
        )
        loss = ranking_losses(raised, pairs, p).sum()
        (gradient,) = torch.autograd.grad(loss, raise_by)
    return gradient.abs()
