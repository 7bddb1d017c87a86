"""The losses of NEAT, as pure functions of tensors: no model, no configuration, no device, no
synchronisation.

Read top to bottom: what a completion scores, the ranking losses on ordered pairs (`pairs`),
the language-modelling loss, the penalties, and their sum. The equations, their sources and the
tests that hold them are tabled in `docs/method.md`.

Conventions
    log π(token) is a natural logarithm, so losses are in nats; a *score* is in nats per token when
    `length_power` is 1. Reduced-precision inputs are not promoted: hand in float32
    log-probabilities also when the model computes in bf16. A slot that takes no part (a masked
    token, an absent completion) may hold anything, NaN included: it changes neither a value nor a
    gradient. Its own gradient is exactly 0. For that, every function replaces such values *before*
    its non-linear part, since 0 · NaN is NaN in the backward pass. Every loss but `total_loss` is
    per group or per row. A group without an ordered pair, and a row without a token, gives exactly
    0 with gradient 0; the caller divides by the count that it means.

The published form of NEAT's own ranking loss (2410.12194) is not known to us. What stands here is
an explicit choice of forms from the neighbouring papers that each docstring names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float
from torch import Tensor

from neat_align.learning.pairs import reference_point, score_gaps, sides

Reduction: TypeAlias = Literal["mean", "sum"]
UNLIKELIHOOD_EPSILON = 1e-5
"""The unlikelihood penalty takes p as (1 − ε)p, so that it stays finite, and its gradient with it,
at p = 1.
"""
K3_LIMIT = 20.0
"""The k3 estimate goes on as a straight line where a token's log-ratio to the reference is above
this, in nats.
"""


# ---- scores and pairs ----------------------------------------------------------------------------


def completion_scores(
    logps: Float[Tensor, "rows tokens"],
    mask: Bool[Tensor, "rows tokens"],
    length_power: float,
    weights: Float[Tensor, "rows tokens"] | None = None,
) -> Float[Tensor, "rows"]:
    """The policy's score of each completion.

        ℓ_i = (1 / |y_i|^α) Σ_t log π_θ(y_it | x, y_i<t),    α = `length_power`

    Nats per token for α = 1 (RRHF 2304.05302, SimPO 2405.14734), nats for α = 0 (DPO 2305.18290,
    SLiC 2305.10425). `logps` holds log π_θ of the token at each position; `mask` is true on
    completion tokens, by length, the end-of-turn token included when the completion ended by
    itself. An empty completion scores 0.

    With `weights` above 0 (`token_weights`) it is

        ℓ_i = |y_i|^(1−α) · Σ_t w_t log π_θ(y_it | x, y_i<t) / Σ_t w_t

    a weighted mean for α = 1, and what the same weights with mean 1 in each completion give for
    any α: they say which tokens count, not how much the completion does.
    """
    length = mask.sum(dim=-1).clamp(min=1).to(logps.dtype)
    if weights is None:
        return _masked(logps, mask).sum(dim=-1) / length**length_power
    own = _masked(weights, mask)
    total = torch.where(mask.any(dim=-1), own.sum(dim=-1), 1.0)
    return (own * _masked(logps, mask)).sum(dim=-1) / total * length ** (1 - length_power)


def token_weights(
    contrasts: Float[Tensor, "rows tokens"], *, scale: float, clip: float
) -> Float[Tensor, "rows tokens"]:
    """How much each token of a winner counts; with −`scale`, each token of a loser.

        w_t = e^{μ · clamp(e_t, −c, c)},    μ = `scale`, c = `clip` in nats
        e_t = log p_0(y_t | x, +, y_<t) − log p_0(y_t | x, −, y_<t)

    TIS-DPO (2410.04350), prompt-based weights with k = 1: what makes a winner good counts more in
    it, what makes a loser bad more in that. No gradient passes through e_t. Departures: the
    contrast is one model's under two instructions that the answers were sampled with, averaged over
    several pairs where there are; the bounds are symmetric; `completion_scores` divides by the
    weights' sum, where TIS-DPO has sums of weighted log-ratios, so that a completion does not weigh
    more for having tokens with much contrast; and any pairwise loss can have them.
    """
    return (scale * contrasts.clamp(min=-clip, max=clip)).exp()


# ---- ranking losses ------------------------------------------------------------------------------
#
# A completion may be the better one of one pair and the worse one of another. Where its tokens are
# weighed (`token_weights`) it scores ℓ⁺ as the one and ℓ⁻ as the other, and every ℓ_j of a pairwise
# loss is of `loser_scores`; None is ℓ⁻ = ℓ⁺.


def hinge_loss(
    scores: Float[Tensor, "groups k"],
    pairs: Bool[Tensor, "groups k k"],
    *,
    margin: float,
    reduction: Reduction,
    loser_scores: Float[Tensor, "groups k"] | None = None,
) -> Float[Tensor, "groups"]:
    """Margin ranking loss.

        L = mean_{i ≻ j} max(0, m + ℓ_j − ℓ_i),    m = `margin` in the unit of the scores

    With m = 0 and the `sum` reduction this is RRHF's ranking loss (2304.05302); with m > 0
    SLiC-HF's (2305.10425). Departures: the default reduction is a mean over the group's pairs, so
    that its scale does not grow with K²; SLiC has one pair a prompt. A pair that is ordered by more
    than m contributes nothing, which is why `active_pairs` exists.
    """
    per_pair = F.relu(margin - score_gaps(scores, pairs, loser_scores))
    return _reduce(per_pair.flatten(1), pairs.flatten(1), reduction)


def logistic_loss(
    scores: Float[Tensor, "groups k"],
    pairs: Bool[Tensor, "groups k k"],
    *,
    beta: float,
    gamma: float,
    reduction: Reduction,
    loser_scores: Float[Tensor, "groups k"] | None = None,
) -> Float[Tensor, "groups"]:
    """Reference-free logistic ranking loss.

        L = mean_{i ≻ j} −log σ(β(ℓ_i − ℓ_j) − γ)

    SimPO's form (2405.14734), where γ is the target margin *after* scaling by β, as in that paper.
    Departure: all ordered pairs of a group instead of one chosen and one rejected answer. β is per
    unit of score, γ has no unit.
    """
    per_pair = -F.logsigmoid(beta * score_gaps(scores, pairs, loser_scores) - gamma)
    return _reduce(per_pair.flatten(1), pairs.flatten(1), reduction)


def listwise_loss(
    scores: Float[Tensor, "groups k"],
    pairs: Bool[Tensor, "groups k k"],
    *,
    beta: float,
    reduction: Reduction,
    loser_scores: Float[Tensor, "groups k"] | None = None,
) -> Float[Tensor, "groups"]:
    """Plackett–Luce likelihood of the group's order, ties broken out of it.

        L = mean_{i : ∃ j, i ≻ j} −log( e^{βℓ_i} / (e^{βℓ_i} + Σ_{j : i ≻ j} e^{βℓ_j}) )
          = mean_i log(1 + Σ_{j : i ≻ j} e^{−β(ℓ_i − ℓ_j)})

    PRO's form (2306.17492). Departures: one β instead of reward gaps as temperatures, which explode
    on large gaps, and log-sum-exp instead of `exp` with an epsilon; each winner i competes with
    everything *below* it, not with everything after it in a sorted list, so that tied completions
    never compete and the index decides nothing; and the mean is over winners. With two completions
    it is `logistic_loss` with γ = 0.
    """
    below = torch.where(pairs, -beta * score_gaps(scores, pairs, loser_scores), -math.inf)
    per_winner = F.pad(below, (0, 1), value=0.0).logsumexp(dim=-1)
    return _reduce(per_winner, pairs.any(dim=-1), reduction)


def dpo_loss(
    scores: Float[Tensor, "groups k"],
    ref_scores: Float[Tensor, "groups k"],
    pairs: Bool[Tensor, "groups k k"],
    *,
    beta: float,
    reduction: Reduction,
    loser_scores: tuple[Float[Tensor, "groups k"], Float[Tensor, "groups k"]] | None = None,
) -> Float[Tensor, "groups"]:
    """Logistic ranking loss on log-ratios to a frozen reference.

        L = mean_{i ≻ j} −log σ(β[(ℓ_i − ℓ_i^ref) − (ℓ_j − ℓ_j^ref)])

    DPO (2305.18290). Departures: all ordered pairs of a group; and DPO's log-ratios are sums over
    tokens (`length_power` 0): with per-token scores the same β is a much weaker pull, as a
    length-normalised DPO has it. `loser_scores` are the policy's and the reference's ℓ_j where they
    differ from the first two arguments.
    """
    return logistic_loss(
        scores - ref_scores,
        pairs,
        beta=beta,
        gamma=0.0,
        reduction=reduction,
        loser_scores=None if loser_scores is None else loser_scores[0] - loser_scores[1],
    )


def kto_loss(
    scores: Float[Tensor, "groups k"],
    ref_scores: Float[Tensor, "groups k"],
    pairs: Bool[Tensor, "groups k k"],
    *,
    beta: float,
    reduction: Reduction,
) -> Float[Tensor, "groups"]:
    """Kahneman–Tversky optimisation: good and bad completions, each against a reference point.

        L = ½ mean_{i desirable} [1 − σ(β(r_i − z₀))] + ½ mean_{j undesirable} [1 − σ(β(z₀ − r_j))]
        r_i = ℓ_i − ℓ_i^ref,    z₀ = max(0, mean_{ranked i} r_i), without a gradient

    KTO (2402.01306, its equation 8 and TRL's `loss_type="kto"`); between 0 and 1, ½ at the
    reference; β is per unit of score. Unlike a logistic loss it lets go of a completion that is far
    on the wrong side, too. Which completions are desirable is `pairs.sides`: those that rank above
    more than they rank below; one in the middle is neither. `mean` is over the group's labelled
    completions, `sum` is their number times that.

    Departures: the labels come from the group's own ranking. The weights λ are balanced in each
    group (λ_D n_D = λ_U n_U; the paper asks for a ratio of 1 to 4/3 over the whole data, TRL takes
    1 and 1). z₀ is a mean over the group's own ranked completions: they are samples of a recent
    policy, so it estimates KL(π_θ ‖ π_ref) as it stands, in the unit of the scores; KTO and TRL
    take answers to *other* prompts of the micro-batch (mismatched pairs), which would make the loss
    depend on how a step is cut. And KTO's r is a sum over tokens (`length_power` 0).
    """
    ratios = scores - ref_scores
    good, bad = sides(pairs)
    # Chosen before σ: an absent completion may hold anything.
    gain = beta * torch.where(good | bad, ratios - reference_point(ratios, pairs)[:, None], 0.0)
    lost = torch.sigmoid(torch.where(bad, gain, -gain))
    n_good, n_bad = (
        side.sum(dim=-1, keepdim=True).clamp(min=1).to(scores.dtype) for side in (good, bad)
    )
    weights = (n_good + n_bad) / 2 / torch.where(good, n_good, n_bad)
    return _reduce(weights * lost, good | bad, reduction)


# ---- language modelling --------------------------------------------------------------------------


def lm_loss(
    logps: Float[Tensor, "rows tokens"], mask: Bool[Tensor, "rows tokens"]
) -> Float[Tensor, "rows"]:
    """Token-mean negative log-likelihood of each row, in nats per token; one row is one group's
    best completion.

        L = −(1 / |y*|) Σ_t log π_θ(y*_t | x, y*_<t)

    The fine-tuning term of RRHF (2304.05302), PRO and SLiC. Departure: always a mean over the
    completion's own tokens, whatever `length_power` is, where PRO takes a sum and RRHF's equation
    too.
    """
    return -_token_mean(logps, mask)


def unlikelihood_penalty(
    logps: Float[Tensor, "rows tokens"], mask: Bool[Tensor, "rows tokens"]
) -> Float[Tensor, "rows"]:
    """Token-mean unlikelihood of each row, in nats per token; between 0 and −log ε.

        U = (1 / |y|) Σ_t −log(1 − (1 − ε) p_t),    p_t = π_θ(y_t | x, y_<t),    ε =
        `UNLIKELIHOOD_EPSILON`

    Unlikelihood training (1908.04319), on whole completions. Departure: p is scaled by 1 − ε where
    the usual code clamps 1 − p from below; both keep value and gradient finite, but a clamp has
    gradient 0 at p = 1 and would leave alone exactly the tokens that the policy is surest of.
    """
    # Rounding can leave a log-probability a little above 0, beyond what ε forgives. No `clamp`: in
    # torch 2.14 it has no gradient at its bound, which is where the policy is surest.
    known = _masked(logps, mask)
    p = torch.where(known > 0, 0.0, known).exp()
    return _token_mean(-torch.log1p(-(1 - UNLIKELIHOOD_EPSILON) * p), mask)


def npo_penalty(
    scores: Float[Tensor, "rows"], ref_scores: Float[Tensor, "rows"], *, beta: float
) -> Float[Tensor, "rows"]:
    """Negative preference optimisation of each row; at least 0.

        N = (2/β) log(1 + (π_θ/π_ref)^β) = (2/β) softplus(β(ℓ − ℓ^ref))

    NPO (2404.05868), (2/β) log 2 at the reference. The gradient in ℓ is 2σ(β(ℓ − ℓ^ref)): it fades
    once the completion is about 1/β less likely than the reference had it, in the unit of the
    scores. Departure: NPO's log-ratio is a sum over tokens (`length_power` 0); with per-token
    scores the same β fades that many times later.
    """
    return -(2 / beta) * F.logsigmoid(-beta * (scores - ref_scores))


def kl_k3(
    logps: Float[Tensor, "rows tokens"],
    ref_logps: Float[Tensor, "rows tokens"],
    mask: Bool[Tensor, "rows tokens"],
) -> Float[Tensor, "rows"]:
    """Token-mean k3 estimate of KL(π_θ ‖ π_ref) on each row's own tokens, in nats per token; at
    least 0.

        K = (1 / |y|) Σ_t (e^{d_t} − d_t − 1),    d_t = log π_ref(y_t | …) − log π_θ(y_t | …)

    Schulman's k3 (http://joschu.net/blog/kl-approx.html), the KL term of GRPO (2402.03300).
    Departures: the tokens were sampled under an instruction or by another round's policy, so this
    is a penalty on drift and not an unbiased estimate; and above d = `K3_LIMIT` it goes on along
    its tangent, so that a token that the policy gave up has a finite gradient.
    """
    d = _masked(ref_logps, mask) - _masked(logps, mask)
    near = torch.where(d > K3_LIMIT, K3_LIMIT, d)  # a `clamp` may have no gradient at its bound
    k3 = torch.expm1(near) - near
    # Chosen, not added: a tangent that adds 0 below the limit has a slope of 5e8 there, in which
    # fp32 loses the gradient.
    tangent = math.expm1(K3_LIMIT) * (d - K3_LIMIT + 1) - K3_LIMIT
    return _token_mean(torch.where(d <= K3_LIMIT, k3, tangent), mask)


# ---- the objective -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossTerms:
    """The terms of a batch before weighting, each already divided by its own global count;
    what the log shows.
    """

    ranking: Float[Tensor, ""]
    lm: Float[Tensor, ""]
    negative: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    distil: Float[Tensor, ""]


def total_loss(
    terms: LossTerms,
    *,
    lm_weight: float,
    negative_weight: float,
    kl_weight: float,
    distil_weight: float,
) -> Float[Tensor, ""]:
    """What is minimised.

        L = ranking + `lm_weight` · LM + `negative_weight` · penalty + `kl_weight` · KL
              + `distil_weight` · contrast distillation

    A term of weight 0 is left out instead of multiplied: it may be logged while it is not finite,
    and 0 · ∞ is NaN.
    """
    total = terms.ranking
    for weight, term in (
        (lm_weight, terms.lm),
        (negative_weight, terms.negative),
        (kl_weight, terms.kl),
        (distil_weight, terms.distil),
    ):
        if weight != 0:
            total = total + weight * term
    return total


def _reduce(
    values: Float[Tensor, "groups candidates"],
    active: Bool[Tensor, "groups candidates"],
    reduction: Reduction,
) -> Float[Tensor, "groups"]:
    """Mean or sum over each group's active candidates; 0 for a group without any."""
    total = _masked(values, active).sum(dim=-1)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / active.sum(dim=-1).clamp(min=1)
    raise ValueError(f"reduction is {reduction!r}; it must be mean or sum")


def _masked(
    values: Float[Tensor, "rows columns"], mask: Bool[Tensor, "rows columns"]
) -> Float[Tensor, "rows columns"]:
    """`values` where the mask is true, 0 elsewhere; a masked value reaches neither the result nor a
    gradient.
    """
    return torch.where(mask, values, 0.0)


def _token_mean(
    values: Float[Tensor, "rows tokens"], mask: Bool[Tensor, "rows tokens"]
) -> Float[Tensor, "rows"]:
    """Mean over each row's unmasked tokens; 0 for a row without any."""
    return _masked(values, mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
