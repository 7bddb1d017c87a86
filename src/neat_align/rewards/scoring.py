"""Run reward functions over rows and add them up, strictly: no failure ever becomes a score."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from neat_align.errors import RewardError
from neat_align.prompts.rows import Prompt, PromptRow, is_conversational
from neat_align.prompts.skipped_rows import OnBadRow
from neat_align.rewards.calling import ARGUMENTS, Answer, Rows, call_all
from neat_align.rewards.output import excerpt
from neat_align.rewards.protocol import (
    ChecksAnswers,
    ChecksPrompts,
    CompletionInput,
    LeftOut,
    NamedReward,
    Score,
    ScoredRows,
    Unscorable,
)

logger = logging.getLogger(__name__)


def score(
    rewards: tuple[NamedReward, ...],
    *,
    prompts: Sequence[Prompt],
    completions: Sequence[CompletionInput],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    labels: Sequence[str] | None = None,
    on_bad_row: OnBadRow = "error",
    answers: Mapping[str, Sequence[str | None]] | None = None,
) -> ScoredRows:
    """Score every row with every function. `labels` are the rows' names in messages
    ("data.jsonl:3"), else "row 0", …; `answers` the data's own (`chosen`, `rejected`), for
    functions whose signature names them.

    A row's reward is the weighted sum over the functions that did not abstain on it (TRL's nansum),
    not rescaled: a function that abstains on only some completions of one prompt contributes 0 to
    those and its score to the others, so such functions should be centred on 0, or abstain on whole
    prompts. It is None when every function of non-zero weight abstained; functions of weight 0 are
    only recorded.

    A row that a function cannot score (`Unscorable`: it is over a reward model's context) is a
    RewardError, or with `on_bad_row` "skip" has no reward, whatever the others say of it (a
    function of weight 0 has no say), and is in `left_out`.

    Async functions run concurrently, after the sync ones; this also works where an event loop is
    running already. A function that raises is not called again, unless memory ran out: then it is
    called on halves of the rows.
    """
    names = labels or [f"row {i}" for i in range(len(completions))]
    rows = Rows(prompts, completions, completion_ids, columns, names, answers or {})
    _check_rows(rows)
    if not completions:
        return ScoredRows((), ())
    called = call_all(rewards, rows)
    given = [[s for answer in parts for s in answer.scores] for parts in called]
    left_out = [
        LeftOut(i, reward.name, value.reason)
        for reward, scores in zip(rewards, given, strict=True)
        for i, value in enumerate(scores)
        if isinstance(value, Unscorable)
    ]
    _tell_left_out(left_out, rows, on_bad_row)
    numbers = [[_number(value) for value in scores] for scores in given]
    components = tuple(zip(*numbers, strict=True)) if numbers else ((),) * len(completions)
    sums = _sums(rewards, components, left_out, rows.labels)
    flat = [answer for parts in called for answer in parts]
    logged = (_metrics(flat), _extra(flat, len(rows)), added(a.log.totals for a in flat))
    return ScoredRows(sums, components, tuple(left_out), *logged)


def _sums(
    rewards: Sequence[NamedReward],
    components: Sequence[Sequence[float | None]],
    left_out: Sequence[LeftOut],
    labels: Sequence[str],
) -> tuple[float | None, ...]:
    """Each row's weighted sum; None for one that a function with a weight could not score."""
    counted = {reward.name for reward in rewards if reward.weight != 0}
    without = {left.row for left in left_out if left.reward in counted}
    weights = [reward.weight for reward in rewards]
    return tuple(
        None if i in without else _weighted_sum(weights, row, label)
        for i, (row, label) in enumerate(zip(components, labels, strict=True))
    )


def _number(value: Score) -> float | None:
    return None if isinstance(value, Unscorable) else value


def _tell_left_out(left_out: Sequence[LeftOut], rows: Rows, on_bad_row: OnBadRow) -> None:
    """Raise RewardError where there are any, or warn where such rows are to be skipped."""
    if not left_out:
        return
    first = left_out[0]
    more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
    what = (
        f"reward function {first.reward!r} cannot score {rows.labels[first.row]}, whose "
        f"completion begins {excerpt(rows.completions[first.row])}: it {first.reason}{more}"
    )
    if on_bad_row == "error":
        raise RewardError(f"{what}. on_bad_row: skip leaves such rows without a reward")
    logger.warning("%s. These rows have no reward", what)


def _metrics(answers: Sequence[Answer]) -> dict[str, tuple[float, ...]]:
    metrics: dict[str, tuple[float, ...]] = {}
    for answer in answers:
        for name, values in answer.log.metrics.items():
            metrics[name] = (*metrics.get(name, ()), *values)
    return metrics


def added(totals: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """What was logged to be added up, added up."""
    sums: dict[str, float] = {}
    for logged in totals:
        for name, value in logged.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _extra(answers: Sequence[Answer], rows: int) -> dict[str, tuple[Any, ...]]:
    """The logged columns; None in the rows for which nobody logged one."""
    extra: dict[str, list[Any]] = {}
    for answer in answers:
        for column, values in answer.log.extra.items():
            whole = extra.setdefault(column, [None] * rows)
            whole[answer.first : answer.first + len(values)] = values
    return {column: tuple(values) for column, values in extra.items()}


def unscorable_rows(rewards: Sequence[NamedReward], rows: Sequence[PromptRow]) -> list[LeftOut]:
    """The rows no answer to which can be scored, as far as the rewards can tell beforehand."""
    found: list[LeftOut] = []
    for reward in rewards:
        reasons: dict[int, str] = {}
        if isinstance(reward.function, ChecksPrompts):
            reasons |= reward.function.unscorable_prompts([row.prompt for row in rows])
        if isinstance(reward.function, ChecksAnswers):
            reasons |= reward.function.unscorable_answers([row.chosen for row in rows])
        found += [LeftOut(i, reward.name, reason) for i, reason in sorted(reasons.items())]
    return found


def _check_rows(rows: Rows) -> None:
    n = len(rows)
    taken = [name for name in rows.columns if name in ARGUMENTS]
    if taken:
        raise RewardError(
            f"the data has columns named {', '.join(taken)}, which reward functions are given by "
            "neat-align: rename them"
        )
    lists: dict[str, Sequence[Any]] = {
        "prompts": rows.prompts,
        "completion_ids": rows.completion_ids,
        "labels": rows.labels,
        **rows.answers,
        **rows.columns,
    }
    for name, column in lists.items():
        if len(column) != n:
            raise RewardError(
                f"there are {n} completions to score but {len(column)} {name}: one a completion "
                "is needed"
            )


def _weighted_sum(
    weights: Sequence[float], row: Sequence[float | None], label: str
) -> float | None:
    terms = [w * s for w, s in zip(weights, row, strict=True) if s is not None and w != 0]
    if not terms:
        return None
    total = sum(terms)
    if not math.isfinite(total):
        raise RewardError(
            f"the weighted sum of {label} overflows (components {list(row)}, weights "
            f"{list(weights)}): lower the weights"
        )
    return total


class ScoreFunction(Protocol):
    """`score_answers`, or what does the same in shares."""

    def __call__(
        self,
        rows: Sequence[PromptRow],
        texts: Sequence[str],
        ids: Sequence[Sequence[int]],
        rewards: tuple[NamedReward, ...],
        on_bad_row: OnBadRow = "error",
    ) -> ScoredRows:
        """Rewards of answers to the plain prompts of `rows`, one a row."""
        ...


def score_answers(
    rows: Sequence[PromptRow],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    rewards: tuple[NamedReward, ...],
    on_bad_row: OnBadRow = "error",
) -> ScoredRows:
    """Rewards of answers to the plain prompts of `rows`, one a row, in one batch (`score`)."""
    conversational = is_conversational(rows)
    completions: list[CompletionInput] = (
        [[{"role": "assistant", "content": t}] for t in texts] if conversational else list(texts)
    )
    names = sorted({name for row in rows for name in row.columns} - set(ARGUMENTS))
    return score(
        rewards,
        prompts=[row.prompt for row in rows],
        completions=completions,
        completion_ids=ids,
        columns={name: [row.columns.get(name) for row in rows] for name in names},
        labels=[row.where for row in rows],
        on_bad_row=on_bad_row,
        answers={
            "chosen": [row.chosen for row in rows],
            "rejected": [row.rejected for row in rows],
        },
    )
