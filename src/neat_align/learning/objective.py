"""The objective: from a batch's log-probabilities to the terms of a step's loss.

Each term is divided by a count over the whole optimizer step (every micro-batch, every rank).
The counts depend on the data alone, so they are known before the first forward pass, and 1×8 groups
give the same gradient as 8×1. What each term reads depends on the data alone, too: it is chosen on
the CPU (`micro_batch_of`), since a choice made on a GPU would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError
from neat_align.learning import losses
from neat_align.learning import pairs as pair_masks
from neat_align.learning.batches import GroupBatch
from neat_align.learning.distillation import DistilParams, distil_params
from neat_align.learning.teacher_rows import TeacherRows, TeachParams
from neat_align.modeling.packing import (
    Rows,
    in_pinned_memory,
    padding_fraction,
    to_device,
)
from neat_align.rounds.completions import ORIGINS
from neat_align.rounds.ranking import PairSelection


@dataclass(frozen=True)
class ObjectiveParams:
    """The objective's settings, resolved: every number is there, whether or not the chosen loss
    reads it.
    """

    ranking_loss: str
    pair_selection: PairSelection
    reward_margin: float
    hinge_margin: float
    beta: float
    gamma: float
    length_power: float
    token_weight_scale: float
    token_weight_clip: float
    reduction: Literal["mean", "sum"]
    negative_penalty: str
    npo_beta: float
    lm_weight: float
    negative_weight: float
    kl_weight: float
    needs_reference: bool
    distil_weight: float
    distil: DistilParams
    teach: TeachParams

    @property
    def reads_logprobs(self) -> bool:
        """Whether a term with a gradient reads the chosen tokens' log-probabilities."""
        weights = (self.lm_weight, self.negative_weight, self.kl_weight)
        return self.ranking_loss != "none" or any(weights)


@dataclass(frozen=True)
class LossCounts:
    """What each term of a step's loss is divided by: groups with a pair, groups with a
    language-modelling target, penalised completions, completions, distilled answers. At least 1
    each.
    """

    ranking: float
    lm: float
    negative: float
    kl: float
    distil: float


@dataclass(frozen=True)
class MicroBatch:
    """The groups of one forward and backward pass, and what each term of the loss reads of them.

    `pairs` says which completion ranks above which; `target_rows` and `penalised_rows` are the rows
    of the language-modelling targets and of the completions that the negative penalty is for.
    `teacher` are the distilled answers under the teacher's prompts.
    `counts` are this batch's shares of what the terms are divided by (`LossCounts`, unclamped);
    `packing` are the share of places that hold nothing and the number of tokens.
    """

    groups: GroupBatch
    pairs: Bool[Tensor, "groups k k"]
    target_rows: Int[Tensor, " targets"]
    penalised_rows: Int[Tensor, " penalised"]
    teacher: tuple[TeacherRows, ...]
    counts: tuple[float, ...]
    packing: Float[Tensor, "2"]

    @property
    def rows(self) -> Rows:
        """What goes through the model."""
        return self.groups.rows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        """The same micro-batch on another device."""
        return to_device(self, device, non_blocking)

    def pin_memory(self) -> MicroBatch:
        """The same micro-batch in pinned memory."""
        return in_pinned_memory(self)


def micro_batch_of(
    b: GroupBatch, p: ObjectiveParams, teacher: tuple[TeacherRows, ...] = ()
) -> MicroBatch:
    """These groups as one micro-batch; call it before they are copied to a device."""
    pairs, penalised = pairs_of(b, p), penalised_of(b, p)
    target_rows = b.best_row[b.best_row >= 0]
    return MicroBatch(
        groups=b,
        pairs=pairs,
        target_rows=target_rows,
        penalised_rows=penalised[b.group, b.slot].nonzero().squeeze(-1),
        counts=(
            float(pairs.any(-1).any(-1).sum()),
            float(len(target_rows)),
            float(penalised.sum()),
            float(len(b.group)),
            float(sum(len(rows.lengths) for rows in teacher)),
        ),
        teacher=teacher,
        packing=torch.tensor([padding_fraction(b.rows), float(b.rows.input_ids.numel())]),
    )


def objective_params(config: NEATConfig) -> ObjectiveParams:
    """The objective's settings of a configuration."""
    return ObjectiveParams(
        ranking_loss=config.ranking_loss,
        pair_selection=cast("PairSelection", config.pair_selection),
        reward_margin=config.reward_margin,
        hinge_margin=config.hinge_margin or 0.0,
        beta=config.resolved_beta,
        gamma=config.gamma or 0.0,
        length_power=config.length_power,
        token_weight_scale=config.token_weight_scale,
        token_weight_clip=config.token_weight_clip,
        reduction=cast("Literal['mean', 'sum']", config.pair_reduction),
        negative_penalty=config.negative_penalty,
        npo_beta=config.resolved_npo_beta,
        lm_weight=config.lm_weight,
        negative_weight=config.negative_weight,
        kl_weight=config.kl_weight,
        needs_reference=config.needs_reference,
        distil_weight=config.distil_weight,
        distil=distil_params(config),
        teach=TeachParams(
            answers=cast("Literal['all', 'lower_half']", config.distil_answers),
            first=config.distil_first,
            pairs=config.taught_pairs,
            negatives=config.distil_toward == "contrast",
        ),
    )


def pairs_of(b: GroupBatch, p: ObjectiveParams) -> Bool[Tensor, "groups k k"]:
    """Which completion ranks above which."""
    is_ranked = b.present & ~b.keys.isnan()
    if p.pair_selection == "best_worst":
        return pair_masks.best_against_worst(b.keys, is_ranked, p.reward_margin)
    return pair_masks.preferred_pairs(b.keys, is_ranked, p.reward_margin)


def penalised_of(b: GroupBatch, p: ObjectiveParams) -> Bool[Tensor, "groups k"]:
    """Which completions the negative penalty is for."""
    negative = b.origins == ORIGINS.index("negative")
    if p.negative_penalty == "none":
        return torch.zeros_like(negative)
    return pair_masks.penalised(b.keys, b.present & ~b.keys.isnan(), negative)


def counts_of(batches: Sequence[MicroBatch]) -> tuple[float, ...]:
    """The counts of these batches, unclamped: to be summed over processes first."""
    return tuple(sum(b.counts[i] for b in batches) for i in range(len(fields(LossCounts))))


@dataclass(frozen=True)
class Scores:
    """Scores of the policy and of the start policy as [groups, k] tables, in nats (per token, with
    length_power 1).
    """

    policy: Float[Tensor, "groups k"]
    reference: Float[Tensor, "groups k"]

    @property
    def log_ratios(self) -> Float[Tensor, "groups k"]:
        """How much more the policy scores than the start policy."""
        return self.policy - self.reference


@dataclass(frozen=True)
class RankedScores:
    """What completions score as the better and as the worse one of a pair.

    They differ where tokens are weighed; `losers` is None where they do not.
    """

    winners: Scores
    losers: Scores | None = None


def ranking_losses(
    scores: RankedScores, pairs: Bool[Tensor, "groups k k"], p: ObjectiveParams
) -> Float[Tensor, " groups"]:
    """The chosen ranking loss of each group. Raises ValueError for `kto` with weighed tokens."""
    own, ref, losers = scores.winners.policy, scores.winners.reference, scores.losers
    low = None if losers is None else losers.policy
    beta, reduction = p.beta, p.reduction
    if p.ranking_loss == "none":
        return own.sum(dim=-1) * 0.0  # with a gradient, which is 0
    if p.ranking_loss == "hinge":
        return losses.hinge_loss(
            own, pairs, margin=p.hinge_margin, reduction=reduction, loser_scores=low
        )
    if p.ranking_loss == "logistic":
        return losses.logistic_loss(
            own, pairs, beta=beta, gamma=p.gamma, reduction=reduction, loser_scores=low
        )
    if p.ranking_loss == "listwise":
        return losses.listwise_loss(own, pairs, beta=beta, reduction=reduction, loser_scores=low)
    if p.ranking_loss == "dpo":
        both = None if losers is None else (losers.policy, losers.reference)
        return losses.dpo_loss(own, ref, pairs, beta=beta, reduction=reduction, loser_scores=both)
    if p.ranking_loss == "kto":
        if losers is not None:
            raise ValueError("kto has no pairs, in which the tokens of a loser are weighed apart")
        return losses.kto_loss(own, ref, pairs, beta=beta, reduction=reduction)
    raise ValueError(f"there is no ranking loss {p.ranking_loss!r}")


def score_tables(
    b: GroupBatch,
    logps: Float[Tensor, "rows tokens"],
    p: ObjectiveParams,
    weights: Float[Tensor, "rows tokens"] | None = None,
) -> Scores:
    """What completions score; `weights` are those of `losses.completion_scores`."""
    mask = b.rows.completion_mask
    own, ref = (
        b.table(losses.completion_scores(values, mask, p.length_power, weights))
        for values in (logps, b.ref_logps)
    )
    return Scores(own, ref)


def ranked_scores(
    b: GroupBatch, logps: Float[Tensor, "rows tokens"], p: ObjectiveParams, plain: Scores
) -> RankedScores:
    """What the ranking loss compares: the plain scores, unless tokens are weighed.

    Raises ConfigError for groups without contrasts where they are.
    """
    if not p.token_weight_scale:
        return RankedScores(plain)
    if not b.has_contrasts:
        raise ConfigError(
            "the round's groups have no token_contrasts, which token_weight_scale needs: make the "
            "round again"
        )
    winners, losers = (
        score_tables(
            b, logps, p, losses.token_weights(b.contrasts, scale=scale, clip=p.token_weight_clip)
        )
        for scale in (p.token_weight_scale, -p.token_weight_scale)
    )
    return RankedScores(winners, losers)


def loss_terms(
    micro_batch: MicroBatch,
    logps: Float[Tensor, "rows tokens"],
    counts: LossCounts,
    p: ObjectiveParams,
    distilled: Float[Tensor, " answers"] | None = None,
) -> losses.LossTerms:
    """This batch's share of each term of the step's loss.

    `distilled` are the divergences of the distilled answers (`distillation`), where there are any.
    """
    b, best, penalised = (
        micro_batch.groups,
        micro_batch.target_rows,
        micro_batch.penalised_rows,
    )
    if p.needs_reference and not b.has_ref:
        raise ConfigError(
            "the round's groups have no ref_logprobs, which dpo, kto, npo and the KL term need: "
            "make the round again"
        )
    mask = b.rows.completion_mask
    scores = score_tables(b, logps, p)
    if p.negative_penalty == "npo":
        own = scores.policy[b.group, b.slot][penalised]
        ref = scores.reference[b.group, b.slot][penalised]
        negative = losses.npo_penalty(own, ref, beta=p.npo_beta)
    else:
        negative = losses.unlikelihood_penalty(logps[penalised], mask[penalised])
    # Without a term that needs it, some groups have it for the round's metrics: not the step's.
    needs_ref = p.needs_reference
    kl = losses.kl_k3(logps, b.ref_logps, mask).sum() if needs_ref else logps.new_zeros(())
    ranking = ranking_losses(ranked_scores(b, logps, p, scores), micro_batch.pairs, p)
    return losses.LossTerms(
        ranking=ranking.sum() / counts.ranking,
        lm=losses.lm_loss(logps[best], mask[best]).sum() / counts.lm,
        negative=negative.sum() / counts.negative,
        kl=kl / counts.kl,
        distil=logps.new_zeros(()) if distilled is None else distilled.sum() / counts.distil,
    )
