"""Scoring a round's completions: rewards, and log-probabilities under the plain prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from neat_align.errors import CollapseError, name_list
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.skipped_rows import OnBadRow
from neat_align.rewards.protocol import NamedReward
from neat_align.rewards.scoring import score_answers
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.params import Progress, RoundTools, progress_counter
from neat_align.rounds.rollout_store import RolloutStore
from neat_align.rounds.scoring_notes import ScoringNotes, notes_on, write_notes


def score_groups(
    groups: Sequence[CompletionGroup],
    rows: Sequence[PromptRow],
    tools: RoundTools,
    store: RolloutStore,
    progress: Progress | None,
) -> list[CompletionGroup]:
    """The groups with rewards and log-probabilities: stored already, or made and stored.

    `rows` are the groups' rows; prompt ids are unique. Made in batches of at most
    `tools.batch_size` completions; `tools.between_batches` is called before each.
    """
    report = progress_counter(progress, "score", len(groups))
    reward_names = [reward.name for reward in tools.rewards]
    scored = store.read_scored(groups)
    report(len(scored))
    for start, batch in group_batches(groups, tools.batch_size):
        missing = [i for i, g in enumerate(batch, start) if g.prompt_id not in scored]
        if not missing:
            continue
        tools.between_batches()
        rewarded, notes = with_rewards(
            [groups[i] for i in missing],
            [rows[i] for i in missing],
            tools.rewards,
            tools.on_bad_row,
        )
        made = with_logprobs(rewarded, tools)
        write_notes(store.folder, missing[0], notes)
        store.write_scored(missing[0], made, reward_names)
        scored.update((g.prompt_id, g) for g in made)
        report(len(missing))
    return [scored[g.prompt_id] for g in groups]


def group_batches(
    groups: Sequence[CompletionGroup], batch_size: int
) -> Iterator[tuple[int, Sequence[CompletionGroup]]]:
    """(position of the first, members) of batches with at most `batch_size` completions.

    Groups stay in order and are never divided: one that is larger is alone.
    """
    start, completions = 0, 0
    for i, group in enumerate(groups):
        n = len(group.completions)
        if i > start and completions + n > batch_size:
            yield start, groups[start:i]
            start, completions = i, 0
        completions += n
    if start < len(groups):
        yield start, groups[start:]


def with_rewards(
    groups: Sequence[CompletionGroup],
    rows: Sequence[PromptRow],
    rewards: tuple[NamedReward, ...],
    on_bad_row: OnBadRow = "error",
) -> tuple[list[CompletionGroup], ScoringNotes]:
    """The groups with rewards, and what scoring noted; `rows` are the groups' rows.

    Without reward functions, the groups as they are. Completions that cannot be scored raise, or
    with `on_bad_row` "skip" have no reward and are noted. Raises RewardError.
    """
    if not rewards:
        return list(groups), ScoringNotes()
    flat = [(row, c) for group, row in zip(groups, rows, strict=True) for c in group.completions]
    scores = score_answers(
        [row for row, _ in flat],
        [c.text for _, c in flat],
        [c.token_ids for _, c in flat],
        rewards,
        on_bad_row,
    )
    values = iter(zip(scores.rewards, scores.components, strict=True))
    rewarded = []
    for group in groups:
        completions = []
        for c in group.completions:
            reward, components = next(values)
            completions.append(replace(c, reward=reward, reward_components=components))
        rewarded.append(replace(group, completions=tuple(completions)))
    return rewarded, notes_on(groups, scores)


def with_logprobs(groups: Sequence[CompletionGroup], tools: RoundTools) -> list[CompletionGroup]:
    """The groups with both policies' per-token log-probabilities under the plain prompt, in nats.

    Raises CollapseError, with the prompts, where one is not a finite number.
    """
    prompts = [g.prompt_ids for g in groups for _ in g.completions]
    completions = [c.token_ids for g in groups for c in g.completions]
    not_computed: list[tuple[float, ...]] = [()] * len(completions)
    if not completions:
        return list(groups)
    policy = not_computed
    if tools.policy_logprobs is not None:
        policy = tools.policy_logprobs(prompts, completions)
    ref = policy  # before the first step the two policies are one
    if tools.ref_logprobs is not tools.policy_logprobs:
        ref = not_computed
        if tools.ref_logprobs is not None:
            ref = tools.ref_logprobs(prompts, completions)
    owners = [g.prompt_id for g in groups for _ in g.completions]
    refuse_non_finite("policy's log-probability", owners, [sum(row) for row in policy])
    refuse_non_finite("start policy's log-probability", owners, [sum(row) for row in ref])
    both = iter(zip(policy, ref, strict=True))
    scored = []
    for g in groups:
        with_both = []
        for c in g.completions:
            policy_logprobs, ref_logprobs = next(both)
            with_both.append(replace(c, policy_logprobs=policy_logprobs, ref_logprobs=ref_logprobs))
        scored.append(replace(g, completions=tuple(with_both)))
    return scored


def refuse_non_finite(name: str, prompts: Sequence[str], values: Sequence[float]) -> None:
    """Raise CollapseError where a number is not finite.

    `values` has one number a completion and `prompts` the id of its prompt; `name` says what the
    numbers are.
    """
    message = not_finite(name, prompts, values)
    if message is not None:
        raise CollapseError(
            f"{message}. The weights hold numbers that are not finite, or computing in half "
            "precision overflowed: nothing of it was kept; go on from the last checkpoint with a "
            "smaller learning rate, or with bf16: false"
        )


def not_finite(name: str, prompts: Sequence[str], values: Sequence[float]) -> str | None:
    """The prompts whose numbers are not finite, in words; None when all are finite.

    The arguments are those of `refuse_non_finite`.
    """
    bad = [p for p, value in zip(prompts, values, strict=True) if not math.isfinite(value)]
    if not bad:
        return None
    return f"the {name} of {len(bad)} completions is not finite; prompts {name_list(bad)}"
