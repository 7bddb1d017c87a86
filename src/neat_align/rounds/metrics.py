"""What a round's groups say about themselves: rewards, lengths, contrast, and what was left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev

from neat_align.rounds.completions import ORIGINS, Completion, CompletionGroup
from neat_align.rounds.ranking import BAD_ORIGINS
from neat_align.rounds.text_metrics import distinct_n


def inversion_rate(groups: Iterable[CompletionGroup]) -> float:
    """Share of (positive, negative) pairs of one prompt in which the negative has the higher
    reward; ties count half.
    """
    wrong, pairs = 0.0, 0
    for g in groups:
        good = [c.reward for c in g.completions if c.origin == "positive" and c.reward is not None]
        bad = [c.reward for c in g.completions if c.origin == "negative" and c.reward is not None]
        wrong += sum((b > a) + 0.5 * (b == a) for a in good for b in bad)
        pairs += len(good) * len(bad)
    return wrong / pairs if pairs else math.nan


def reward_gap(groups: Iterable[CompletionGroup]) -> float:
    """Mean over prompts of (mean reward of the positives − mean reward of the negatives)."""
    gaps = []
    for g in groups:
        good = [c.reward for c in g.completions if c.origin == "positive" and c.reward is not None]
        bad = [c.reward for c in g.completions if c.origin == "negative" and c.reward is not None]
        if good and bad:
            gaps.append(fmean(good) - fmean(bad))
    return fmean(gaps) if gaps else math.nan


def round_metrics(
    everything: Sequence[CompletionGroup],
    kept: Sequence[CompletionGroup],
    removed: Counter[str],
    reward_names: Sequence[str],
) -> dict[str, float]:
    """The round's metrics; names follow TRL where TRL has them. Numbers that do not exist are left
    out.

    `everything` are all groups that were sampled, `kept` the ones with a pair. Rewards and lengths
    are over everything.
    """
    completions = [c for g in everything for c in g.completions]
    sampled = [c for c in completions if c.origin not in ("chosen", "rejected")]
    rewards = [c.reward for c in completions if c.reward is not None]
    m: dict[str, float] = {
        "round/groups": len(kept),
        "round/prompts": len(everything),
        "round/pair_fraction": len(kept) / max(len(everything), 1),
        "reward": _mean(rewards),
        "reward_std": pstdev(rewards) if len(rewards) > 1 else math.nan,
        "rewards/abstained": sum(c.reward is None for c in completions) / max(len(completions), 1)
        if reward_names
        else math.nan,
        "completions/mean_length": _mean(len(c.token_ids) for c in sampled),
        "completions/clipped_ratio": _mean(c.finish_reason == "length" for c in sampled),
        "contrast/reward_gap": reward_gap(everything),
        "contrast/inversion_rate": inversion_rate(everything),
        "contrast/distinct2": distinct_n(c.text for c in sampled if c.origin not in BAD_ORIGINS),
    }
    for i, name in enumerate(reward_names):
        values = [c.reward_components[i] for c in completions]
        m[f"rewards/{name}/mean"] = _mean(v for v in values if v is not None)
    for reason in ("empty", "duplicate", "leak"):
        m[f"removed/{reason}"] = removed[reason]
    for origin in ORIGINS:
        mine = [c for c in completions if c.origin == origin]
        m[f"reward/{origin}"] = _mean(c.reward for c in mine if c.reward is not None)
        m[f"completions/mean_length/{origin}"] = _mean(len(c.token_ids) for c in mine)
        m[f"logps/{origin}"] = _mean(v for c in mine for v in c.policy_logprobs)
        # How much likelier the sampled tokens are under their own instruction than on the plain
        # prompt, nats per token.
        m[f"sampling/instruction_gap/{origin}"] = _mean(
            _instruction_gap(c) for c in mine if c.policy_logprobs and c.sampling_logprob
        )
        m[f"kl/{origin}"] = _mean(
            _k3(p, r) for c in mine for p, r in zip(c.policy_logprobs, c.ref_logprobs, strict=False)
        )
    return {k: float(v) for k, v in m.items() if not math.isnan(v)}


def _instruction_gap(c: Completion) -> float:
    assert c.sampling_logprob is not None
    return (c.sampling_logprob - sum(c.policy_logprobs)) / len(c.policy_logprobs)


def _k3(policy: float, ref: float) -> float:
    gap = min(ref - policy, 20.0)
    return math.exp(gap) - gap - 1


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return fmean(collected) if collected else math.nan
