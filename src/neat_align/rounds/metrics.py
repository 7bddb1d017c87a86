"""What a round's groups say about themselves: rewards, lengths, contrast, and what was left out.

Names follow TRL where TRL has them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev

from neat_align.rounds.completions import ORIGINS, Completion, CompletionGroup, Origin
from neat_align.rounds.ranking import BAD_ORIGINS
from neat_align.rounds.text_metrics import distinct_n

HUMAN_ORIGINS = frozenset({"chosen", "rejected"})
# The KL estimate of a token grows as e^gap: past this gap, in nats, it is held.
MAX_GAP = 20.0


def round_metrics(
    sampled: Sequence[CompletionGroup],
    kept: Sequence[CompletionGroup],
    removed: Counter[str],
    reward_names: Sequence[str],
) -> dict[str, float]:
    """The round's metrics; numbers that do not exist are left out.

    `sampled` are all groups of the round and `kept` the ones with a pair; `removed` counts filtered
    completions by reason. Rewards and lengths are over `sampled`.
    """
    completions = [c for group in sampled for c in group.completions]
    generated = [c for c in completions if c.origin not in HUMAN_ORIGINS]
    rewards = [c.reward for c in completions if c.reward is not None]
    good_texts = [c.text for c in generated if c.origin not in BAD_ORIGINS]
    metrics: dict[str, float] = {
        "round/groups": len(kept),
        "round/prompts": len(sampled),
        "round/pair_fraction": len(kept) / max(len(sampled), 1),
        "reward": _mean(rewards),
        "reward_std": pstdev(rewards) if len(rewards) > 1 else math.nan,
        "completions/mean_length": _mean(len(c.token_ids) for c in generated),
        "completions/clipped_ratio": _mean(c.finish_reason == "length" for c in generated),
        "contrast/reward_gap": reward_gap(sampled),
        "contrast/inversion_rate": inversion_rate(sampled),
        "contrast/distinct2": distinct_n(good_texts),
    }
    if reward_names:
        abstained = sum(c.reward is None for c in completions)
        metrics["rewards/abstained"] = abstained / max(len(completions), 1)
    for i, name in enumerate(reward_names):
        values = [c.reward_components[i] for c in completions]
        metrics[f"rewards/{name}/mean"] = _mean(v for v in values if v is not None)
    for reason in ("empty", "duplicate", "leak"):
        metrics[f"removed/{reason}"] = removed[reason]
    for origin in ORIGINS:
        metrics |= _origin_metrics(origin, [c for c in completions if c.origin == origin])
    return {name: float(value) for name, value in metrics.items() if not math.isnan(value)}


def inversion_rate(groups: Iterable[CompletionGroup]) -> float:
    """Share of (positive, negative) pairs of one prompt in which the negative is rewarded more.

    Ties count half; NaN without pairs.
    """
    inverted, pairs = 0.0, 0
    for group in groups:
        good, bad = _rewards_of(group, "positive"), _rewards_of(group, "negative")
        inverted += sum((b > a) + 0.5 * (b == a) for a in good for b in bad)
        pairs += len(good) * len(bad)
    return inverted / pairs if pairs else math.nan


def reward_gap(groups: Iterable[CompletionGroup]) -> float:
    """Mean over prompts of (mean reward of the positives − mean reward of the negatives).

    Over the prompts that have both; NaN when none has.
    """
    gaps = []
    for group in groups:
        good, bad = _rewards_of(group, "positive"), _rewards_of(group, "negative")
        if good and bad:
            gaps.append(fmean(good) - fmean(bad))
    return fmean(gaps) if gaps else math.nan


def _rewards_of(group: CompletionGroup, origin: Origin) -> list[float]:
    own = [c.reward for c in group.completions if c.origin == origin]
    return [reward for reward in own if reward is not None]


def _origin_metrics(origin: Origin, completions: Sequence[Completion]) -> dict[str, float]:
    """Log-probabilities and KL per token of the plain prompt, in nats.

    `sampling/instruction_gap` is how much likelier the sampled tokens are under their own
    instruction than on the plain prompt, in nats per token.
    """
    gaps = [_instruction_gap(c) for c in completions if c.policy_logprobs and c.sampling_logprob]
    kl: list[float] = []
    for c in completions:
        kl += map(_k3, c.policy_logprobs, c.ref_logprobs)
    return {
        f"reward/{origin}": _mean(c.reward for c in completions if c.reward is not None),
        f"completions/mean_length/{origin}": _mean(len(c.token_ids) for c in completions),
        f"logps/{origin}": _mean(v for c in completions for v in c.policy_logprobs),
        f"sampling/instruction_gap/{origin}": _mean(gaps),
        f"kl/{origin}": _mean(kl),
    }


def _instruction_gap(c: Completion) -> float:
    assert c.sampling_logprob is not None
    return (c.sampling_logprob - sum(c.policy_logprobs)) / len(c.policy_logprobs)


def _k3(policy: float, ref: float) -> float:
    """Schulman's estimate of KL(policy ‖ start) from one token: r − 1 − ln r, r = p_start / p."""
    gap = min(ref - policy, MAX_GAP)
    return math.exp(gap) - gap - 1


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return fmean(collected) if collected else math.nan
