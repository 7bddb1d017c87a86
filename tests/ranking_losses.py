"""Every ranking loss behind one signature, with the hyper-parameters of the tests of losses."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import settings

from neat_align.learning import losses

NAN, INF, LN2 = math.nan, math.inf, math.log(2)
# Of differences of scores; `kto` looks at each completion by itself.
PAIRWISE = ("hinge", "logistic", "listwise", "dpo")
BETA, GAMMA, MARGIN = 1.7, 0.4, 0.3
quick = settings(max_examples=40, deadline=None)


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ranking(
    name: str,
    scores: torch.Tensor,
    pairs: torch.Tensor,
    reduction: Any = "mean",
    ref: torch.Tensor | None = None,
    losers: torch.Tensor | None = None,
    ref_losers: torch.Tensor | None = None,
) -> torch.Tensor:
    """`losers` and `ref_losers` are the scores of a pair's loser, where it has scores of its own.
    The reference scores −1 by default.
    """
    more: dict[str, Any] = {"reduction": reduction, "loser_scores": losers}
    if name == "hinge":
        return losses.hinge_loss(scores, pairs, margin=MARGIN, **more)
    if name == "logistic":
        return losses.logistic_loss(scores, pairs, beta=BETA, gamma=GAMMA, **more)
    if name == "listwise":
        return losses.listwise_loss(scores, pairs, beta=BETA, **more)
    ref = torch.full_like(scores, -1.0) if ref is None else ref
    if name == "kto":
        assert losers is None
        return losses.kto_loss(scores, ref, pairs, beta=BETA, reduction=reduction)
    assert (losers is None) == (ref_losers is None)
    both = None if losers is None or ref_losers is None else (losers, ref_losers)
    return losses.dpo_loss(scores, ref, pairs, beta=BETA, reduction=reduction, loser_scores=both)
