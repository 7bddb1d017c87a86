"""Scoring a round's completions: rewards, and log-probabilities under the plain prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from neat_align.errors import CollapseError, name_list
from neat_align.prompts.rows import PromptRow
from neat_align.rewards.protocol import NamedReward
from neat_align.rewards.scoring import score_answers
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.params import RoundTools


def with_rewards(
    groups: Sequence[CompletionGroup], rows: Sequence[PromptRow], rewards: tuple[NamedReward, ...]
) -> list[CompletionGroup]:
    """The groups with rewards; `rows` are the groups' rows. Without reward functions, the groups as
    they are.
    """
    if not rewards:
        return list(groups)
    flat = [(row, c) for group, row in zip(groups, rows, strict=True) for c in group.completions]
    found = score_answers(
        [row for row, _ in flat], [c.text for _, c in flat], [c.token_ids for _, c in flat], rewards
    )
    values = iter(zip(found.rewards, found.components, strict=True))
    done = []
    for group in groups:
        pairs = [(c, *next(values)) for c in group.completions]
        done.append(
            replace(
                group,
                completions=tuple(
                    replace(c, reward=r, reward_components=parts) for c, r, parts in pairs
                ),
            )
        )
    return done


def with_logprobs(groups: Sequence[CompletionGroup], tools: RoundTools) -> list[CompletionGroup]:
    """The groups with per-token log-probabilities of both policies under the plain prompt, in nats.

    Raises CollapseError, with the prompts, where one is not a finite number.
    """
    prompts = [g.prompt_ids for g in groups for _ in g.completions]
    completions = [c.token_ids for g in groups for c in g.completions]
    nothing: list[tuple[float, ...]] = [()] * len(completions)
    if not completions:
        return list(groups)
    policy = (
        nothing if tools.policy_logprobs is None else tools.policy_logprobs(prompts, completions)
    )
    ref = policy  # before the first step the two policies are one
    if tools.ref_logprobs is not tools.policy_logprobs:
        ref = nothing if tools.ref_logprobs is None else tools.ref_logprobs(prompts, completions)
    owners = [g.prompt_id for g in groups for _ in g.completions]
    refuse_non_finite("policy's log-probability", owners, [sum(row) for row in policy])
    refuse_non_finite("start policy's log-probability", owners, [sum(row) for row in ref])
    both = iter(zip(policy, ref, strict=True))
    out = []
    for g in groups:
        pairs = [next(both) for _ in g.completions]
        done = [
            replace(c, policy_logprobs=p, ref_logprobs=r)
            for c, (p, r) in zip(g.completions, pairs, strict=True)
        ]
        out.append(replace(g, completions=tuple(done)))
    return out


def refuse_non_finite(name: str, prompts: Sequence[str], values: Sequence[float]) -> None:
    """Raise CollapseError when a number is not finite; `name` says what the numbers are."""
    found = not_finite(name, prompts, values)
    if found is not None:
        raise CollapseError(
            f"{found}. The weights hold numbers that are not finite, or computing in half "
            "precision overflowed: nothing of it was "
            "kept; go on from the last checkpoint with a smaller learning rate, or with bf16: false"
        )


def not_finite(name: str, prompts: Sequence[str], values: Sequence[float]) -> str | None:
    """The prompts whose numbers are not finite, in words; None when all are. One number and one
    prompt id each.
    """
    bad = [
        prompt for prompt, value in zip(prompts, values, strict=True) if not math.isfinite(value)
    ]
    return (
        f"the {name} of {len(bad)} completions is not finite; prompts {name_list(bad)}"
        if bad
        else None
    )
