"""What a run changed: two evaluations of the same held-out prompts, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

from neat_align.evaluation.held_out import Evaluation
from neat_align.evaluation.statistics import mean_of, paired_bootstrap, win_rate

Scores: TypeAlias = Sequence[float | None]


def before_after(before: Evaluation, after: Evaluation, *, seed: int = 0) -> dict[str, Any]:
    """The before/after facts of a run, as `result.json` holds them.

    Both must be of the same prompts in the same order.
    """
    if before.prompt_ids != after.prompt_ids:
        raise ValueError(
            "the two evaluations are of different prompts: evaluate both policies on the same "
            "held-out rows"
        )
    reward = paired_bootstrap(before.rewards, after.rewards, seed=seed)
    judge_name = next(iter(before.judges), None)
    judge = judge_before = judge_after = None
    if judge_name is not None:
        scores_before, scores_after = before.judges[judge_name], after.judges[judge_name]
        judge = paired_bootstrap(scores_before, scores_after, seed=seed)
        judge_before, judge_after = mean_of(scores_before), mean_of(scores_after)
    return {
        "reward_before": mean_of(before.rewards),
        "reward_after": mean_of(after.rewards),
        "reward_delta": reward.delta if reward else None,
        "reward_delta_ci95": [reward.low, reward.high] if reward else None,
        "win_rate": win_rate(before.rewards, after.rewards),
        "second_judge": judge_name,
        "second_judge_before": judge_before,
        "second_judge_after": judge_after,
        "second_judge_delta": judge.delta if judge else None,
        "second_judge_delta_ci95": [judge.low, judge.high] if judge else None,
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity,
        "distinct2_before": before.distinct2,
        "distinct2_after": after.distinct2,
        "kl_per_token": after.kl,
        "mean_length_before": fmean(before.lengths),
        "mean_length_after": fmean(after.lengths),
        "clipped_before": fmean(before.clipped),
        "clipped_after": fmean(after.clipped),
        "contrast_before": before.contrast,
        "contrast_after": after.contrast,
        "held_out_prompts": len(before.prompt_ids),
        "by_reward": _each(before.by_reward, after.by_reward, seed),
        "by_judge": _each(before.judges, after.judges, seed),
    }


def _each(
    before: Mapping[str, Scores], after: Mapping[str, Scores], seed: int
) -> dict[str, dict[str, Any]]:
    """By name: the means, the paired difference and its interval (None without a pair)."""
    found = {}
    for name in (name for name in before if name in after):
        paired = paired_bootstrap(before[name], after[name], seed=seed)
        found[name] = {
            "before": mean_of(before[name]),
            "after": mean_of(after[name]),
            "delta": paired.delta if paired else None,
            "delta_ci95": [paired.low, paired.high] if paired else None,
        }
    return found
