"""Scoring a round's completions: rewards, log-probabilities under the plain prompt, and contrasts
under the instructions.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from statistics import fmean
from typing import Literal, TypeAlias

from neat_align.errors import CollapseError, name_list
from neat_align.prompts.instruction_banks import CONTRASTED, Contrasted
from neat_align.prompts.rows import PromptRow
from neat_align.rewards.aggregation import normalized_sums
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.params import LogprobFunction, RoundTools
from neat_align.rounds.rollout_store import RolloutStore
from neat_align.rounds.scoring_notes import ScoringNotes, notes_on, write_notes

# Groups with rewards, and what scoring them noted.
Scored: TypeAlias = tuple[list[CompletionGroup], ScoringNotes]


def score_groups(
    groups: Sequence[CompletionGroup],
    rows: Sequence[PromptRow],
    tools: RoundTools,
    store: RolloutStore,
    measured: Set[str],
    report: Callable[[int], None],
    *,
    weighing_pairs: int = 0,
) -> list[CompletionGroup]:
    """The groups with rewards and log-probabilities: stored already, or made and stored.

    `rows` are the groups' rows; prompt ids are unique; `measured` has those of the prompts whose
    current log-probabilities are wanted; `weighing_pairs` is the `pairs` of `with_contrasts`. Made
    in batches of at most `tools.batch_size` completions; `tools.between_batches` is called before
    each, and `report` is told how many groups were just finished.
    """
    wants_all = tools.ref_for_all and tools.ref_logprobs is not None
    scored = {
        prompt: group
        for prompt, group in store.read_scored(groups).items()
        # Stored for an objective that needed none, which has changed since.
        if (not wants_all or _have(group, "ref_logprobs"))
        and (not weighing_pairs or _have(group, "contrasts"))
    }

    def score(batch: Sequence[CompletionGroup], rows: Sequence[PromptRow]) -> Scored:
        rewarded, notes = with_rewards(batch, rows, tools)
        made = with_logprobs(rewarded, tools, measured)
        return with_contrasts(made, tools.start_logprobs, weighing_pairs), notes

    return score_the_rest(groups, rows, scored, score, tools, store, report)


def score_the_rest(
    groups: Sequence[CompletionGroup],
    rows: Sequence[PromptRow],
    scored: Mapping[str, CompletionGroup],
    score: Callable[[Sequence[CompletionGroup], Sequence[PromptRow]], Scored],
    tools: RoundTools,
    store: RolloutStore,
    report: Callable[[int], None],
) -> list[CompletionGroup]:
    """The groups as `score` makes them, batch by batch, stored with its notes.

    Those that `scored` has, by prompt, are taken from there. Batches, `tools.between_batches` and
    `report` are as in `score_groups`.
    """
    done = dict(scored)
    report(len(done))
    reward_names = [reward.name for reward in tools.rewards]
    for start, batch in group_batches(groups, tools.batch_size):
        missing = [i for i, g in enumerate(batch, start) if g.prompt_id not in done]
        if not missing:
            continue
        tools.between_batches()
        made, notes = score([groups[i] for i in missing], [rows[i] for i in missing])
        write_notes(store.folder, missing[0], notes)
        store.write_scored(missing[0], made, reward_names)
        done.update((g.prompt_id, g) for g in made)
        report(len(missing))
    return [done[g.prompt_id] for g in groups]


def _have(group: CompletionGroup, name: Literal["ref_logprobs", "contrasts"]) -> bool:
    """Whether each completion has a number of this name a token."""
    return all(len(getattr(c, name)) == len(c.token_ids) for c in group.completions)


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
    tools: RoundTools,
) -> Scored:
    """The groups with rewards, and what scoring noted; `rows` are the groups' rows.

    Without reward functions, the groups as they are. Completions that cannot be scored raise, or
    with `on_bad_row` "skip" have no reward and are noted. Raises RewardError.
    """
    if not tools.rewards:
        return list(groups), ScoringNotes()
    flat = [(row, c) for group, row in zip(groups, rows, strict=True) for c in group.completions]
    scores = tools.score(
        [row for row, _ in flat],
        [c.text for _, c in flat],
        [c.token_ids for _, c in flat],
        tools.rewards,
        tools.on_bad_row,
    )
    weights = [reward.weight for reward in tools.rewards]
    rewarded, start = [], 0
    for group in groups:
        own = slice(start, start + len(group.completions))
        start = own.stop
        rewards, components = scores.rewards[own], scores.components[own]
        if tools.aggregation == "normalize_then_sum":
            # A row that a function could not score has no reward, and is no part of its group.
            both = zip(rewards, components, strict=True)
            rewards = _within_group([() if r is None else c for r, c in both], weights)
        scored = zip(group.completions, rewards, components, strict=True)
        completions = (replace(c, reward=r, reward_components=parts) for c, r, parts in scored)
        rewarded.append(replace(group, completions=tuple(completions)))
    return rewarded, notes_on(groups, scores)


def _within_group(
    components: Sequence[tuple[float | None, ...]], weights: Sequence[float]
) -> tuple[float | None, ...]:
    """The normalised sums of a group; None for a completion without components."""
    sums = iter(normalized_sums([row for row in components if row], weights))
    return tuple(next(sums) if row else None for row in components)


def with_logprobs(
    groups: Sequence[CompletionGroup], tools: RoundTools, measured: Set[str]
) -> list[CompletionGroup]:
    """The groups with per-token log-probabilities under the plain prompt, in nats.

    Of the current policy where a group's prompt id is in `measured`, of the start policy there or,
    with `tools.ref_for_all`, everywhere. Raises CollapseError, with the prompts, where one is not a
    finite number.
    """
    is_measured = [g.prompt_id in measured for g in groups]
    wants_ref = [tools.ref_for_all or m for m in is_measured]
    name = "policy's log-probability"
    if tools.policy_logprobs is tools.ref_logprobs:  # before the first step the two are one
        ref = _group_logprobs(groups, wants_ref, tools.ref_logprobs, name)
        policy = [
            rows if m else _not_computed(g)
            for g, rows, m in zip(groups, ref, is_measured, strict=True)
        ]
    else:
        policy = _group_logprobs(groups, is_measured, tools.policy_logprobs, name)
        ref = _group_logprobs(groups, wants_ref, tools.ref_logprobs, f"start {name}")
    scored = []
    for g, policy_rows, ref_rows in zip(groups, policy, ref, strict=True):
        completions = (
            replace(c, policy_logprobs=p, ref_logprobs=r)
            for c, p, r in zip(g.completions, policy_rows, ref_rows, strict=True)
        )
        scored.append(replace(g, completions=tuple(completions)))
    return scored


def with_contrasts(
    groups: Sequence[CompletionGroup], start: LogprobFunction | None, pairs: int
) -> list[CompletionGroup]:
    """The groups with each token's contrast under the instructions, in nats.

        e_t = mean_j log p_0(y_t | x, +_j, y_<t) − log p_0(y_t | x, −_j, y_<t)

    p_0 is `start`, and j goes over the first `pairs` of the group's `contrast_ids`. With 0 pairs
    the groups are as they were. Raises CollapseError, with the prompts, where a log-probability is
    not a finite number.
    """
    if not pairs:
        return list(groups)
    if start is None:
        raise ValueError("contrasts of tokens need start_logprobs: pass a function that scores")
    asked = [(g, c, pair) for g in groups for pair in g.contrast_ids[:pairs] for c in g.completions]
    both = instructed_logprobs(
        start,
        {
            "positive": [positive for _, _, (positive, _) in asked],
            "negative": [negative for _, _, (_, negative) in asked],
        },
        [c.token_ids for _, c, _ in asked],
        [g.prompt_id for g, _, _ in asked],
    )
    by_pair: dict[int, list[list[float]]] = {}
    for (_, c, _), good, bad in zip(asked, both["positive"], both["negative"], strict=True):
        own = [p - n for p, n in zip(good, bad, strict=True)]
        by_pair.setdefault(id(c), []).append(own)

    def contrasted(c: Completion) -> Completion:
        # As it is stored: a round that goes on has the same numbers to the bit.
        means = array("f", map(fmean, zip(*by_pair[id(c)], strict=True)))
        return replace(c, contrasts=tuple(means))

    return [replace(g, completions=tuple(map(contrasted, g.completions))) for g in groups]


def instructed_logprobs(
    function: LogprobFunction,
    prompts: Mapping[Contrasted, Sequence[Sequence[int]]],
    completions: Sequence[Sequence[int]],
    owners: Sequence[str],
) -> dict[Contrasted, list[tuple[float, ...]]]:
    """Per-token log-probabilities of completions under the positive and the negative instruction.

    `prompts` are theirs under each, and `owners` the ids of their prompts. Raises CollapseError,
    with these, where one is not a finite number.
    """
    logprobs: dict[Contrasted, list[tuple[float, ...]]] = {}
    for polarity in CONTRASTED:
        scored = function(prompts[polarity], completions)
        name = f"log-probability under the {polarity} instruction"
        refuse_non_finite(name, owners, [sum(row) for row in scored])
        logprobs[polarity] = scored
    return logprobs


def _group_logprobs(
    groups: Sequence[CompletionGroup],
    wanted: Sequence[bool],
    function: LogprobFunction | None,
    name: str,
) -> list[list[tuple[float, ...]]]:
    """Log-probabilities of each completion of the wanted groups; () for those of the others."""
    chosen = [g for g, w in zip(groups, wanted, strict=True) if w and function is not None]
    prompts = [g.prompt_ids for g in chosen for _ in g.completions]
    completions = [c.token_ids for g in chosen for c in g.completions]
    logprobs: list[tuple[float, ...]] = []
    if function is not None and completions:
        logprobs = function(prompts, completions)
        owners = [g.prompt_id for g in chosen for _ in g.completions]
        refuse_non_finite(name, owners, [sum(row) for row in logprobs])
    rows = iter(logprobs)
    is_chosen = {id(g) for g in chosen}
    return [
        [next(rows) for _ in g.completions] if id(g) in is_chosen else _not_computed(g)
        for g in groups
    ]


def _not_computed(group: CompletionGroup) -> list[tuple[float, ...]]:
    return [()] * len(group.completions)


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
