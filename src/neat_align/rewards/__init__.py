"""Rewards: what scores completions. Higher is better; `None` abstains; a failure is an error and never a zero.

A reward function has TRL's signature, `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or
async. It always sees the plain prompt, without any instruction. For conversations `prompts` are message lists and
`completions` are `[{"role": "assistant", "content": ...}]`; for text both are strings.
"""

from __future__ import annotations

from neat_align.rewards.contrast import ContrastReward
from neat_align.rewards.http import HttpReward, RetryPolicy, check_tokens
from neat_align.rewards.protocol import NamedReward, RewardFunction, RewardSpec, ScoredRows, completion_text
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rewards.scoring import score

__all__ = [
    "ContrastReward",
    "HttpReward",
    "NamedReward",
    "RetryPolicy",
    "RewardFunction",
    "RewardSpec",
    "ScoredRows",
    "check_tokens",
    "completion_text",
    "resolve_rewards",
    "score",
]
