"""The losses once more: one group or one completion at a time, lists and `math` only, written from
the equations.

No masks, no padding, no numerics: a completion is the list of its token log-probabilities, an
abstained reward is None.
"""

from __future__ import annotations

import math


def score(logps, alpha):
    return sum(logps) / len(logps) ** alpha if logps else 0.0


def pairs(rewards, margin):
    found = []
    for i in range(len(rewards)):
        for j in range(len(rewards)):
            if (
                rewards[i] is not None
                and rewards[j] is not None
                and rewards[i] - rewards[j] > margin
            ):
                found.append((i, j))
    return found


def reduced(values, reduction):
    if not values:
        return 0.0
    return sum(values) / len(values) if reduction == "mean" else sum(values)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def hinge(scores, order, m, reduction):
    return reduced([max(0.0, m + scores[j] - scores[i]) for i, j in order], reduction)


def logistic(scores, order, beta, gamma, reduction):
    return reduced(
        [-math.log(sigmoid(beta * (scores[i] - scores[j]) - gamma)) for i, j in order], reduction
    )


def plackett_luce(scores, order, beta, reduction):
    losses = []
    for winner in sorted({i for i, _ in order}):
        mine = math.exp(beta * scores[winner])
        others = sum(math.exp(beta * scores[j]) for i, j in order if i == winner)
        losses.append(-math.log(mine / (mine + others)))
    return reduced(losses, reduction)


def dpo(scores, ref, order, beta, reduction):
    losses = []
    for w, l in order:  # noqa: E741
        losses.append(-math.log(sigmoid(beta * (scores[w] - ref[w]) - beta * (scores[l] - ref[l]))))
    return reduced(losses, reduction)


def kto_point(scores, ref, order):
    """KTO's reference point: the mean log-ratio of what is in a pair, at least 0."""
    ranked = sorted({i for pair in order for i in pair})
    return max(0.0, reduced([scores[i] - ref[i] for i in ranked], "mean"))


def balance(order, k):
    """How many more completions the k-th ranks above than below."""
    return sum(i == k for i, _ in order) - sum(j == k for _, j in order)


def kto(scores, ref, order, beta, reduction, point=None):
    """KTO (2402.01306), equation 8, with the weights of each side adding up to half of n."""
    point = kto_point(scores, ref, order) if point is None else point
    good = [k for k in range(len(scores)) if balance(order, k) > 0]
    bad = [k for k in range(len(scores)) if balance(order, k) < 0]
    n = len(good) + len(bad)
    losses = []
    for k in good:
        losses.append(n / 2 / len(good) * (1 - sigmoid(beta * (scores[k] - ref[k] - point))))
    for k in bad:
        losses.append(n / 2 / len(bad) * (1 - sigmoid(beta * (point - scores[k] + ref[k]))))
    return reduced(losses, reduction)


def rrhf(scores, rewards):
    """RRHF (2304.05302), equation 2: L_rank = Σ_{r_i < r_j} max(0, p_i − p_j)."""
    total = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if rewards[i] is not None and rewards[j] is not None and rewards[i] < rewards[j]:
                total += max(0.0, scores[i] - scores[j])
    return total


def nll(logps):
    return reduced([-lp for lp in logps], "mean")


def unlikelihood(logps, epsilon):
    return reduced([-math.log(1 - (1 - epsilon) * math.exp(lp)) for lp in logps], "mean")


def npo(s, ref, beta):
    return 2 / beta * math.log(1 + (math.exp(s) / math.exp(ref)) ** beta)


def k3(logps, ref_logps):
    ratios = [math.exp(r) / math.exp(p) for p, r in zip(logps, ref_logps, strict=True)]
    return reduced([r - math.log(r) - 1 for r in ratios], "mean")


def below_median(rewards, negative):
    seen = sorted(r for r in rewards if r is not None)
    if not seen:
        return [False] * len(rewards)
    middle = len(seen) // 2
    median = seen[middle] if len(seen) % 2 else (seen[middle - 1] + seen[middle]) / 2
    return [n and r is not None and r < median for r, n in zip(rewards, negative, strict=True)]


def accuracy(scores, order):
    return sum(
        1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0 for i, j in order
    ), len(order)


def weighed_score(logps, contrasts, scale, clip, alpha):
    """A weighted mean of the token log-probabilities, times the length to the power of 1 − α."""
    if not logps:
        return 0.0
    weights = [math.exp(scale * max(-clip, min(clip, e))) for e in contrasts]
    total = sum(w * lp for w, lp in zip(weights, logps, strict=True))
    return total / sum(weights) * len(logps) ** (1 - alpha)


def hinge_of_gaps(gaps, m, reduction):
    """`gaps` has ℓ⁺ of the winner minus ℓ⁻ of the loser, by (winner, loser)."""
    return reduced([max(0.0, m - gap) for gap in gaps.values()], reduction)


def logistic_of_gaps(gaps, beta, gamma, reduction):
    return reduced([-math.log(sigmoid(beta * gap - gamma)) for gap in gaps.values()], reduction)


def listwise_of_gaps(gaps, beta, reduction):
    losses = []
    for winner in sorted({i for i, _ in gaps}):
        below = [math.exp(-beta * gap) for (i, _), gap in gaps.items() if i == winner]
        losses.append(math.log(1 + sum(below)))
    return reduced(losses, reduction)
