"""Groups as rows that other trainers read: pairs, ranked lists, labels, best answers.

The columns are TRL's. What is beside them (`score_…`, `origin_…`, `seed_…`, `prompt_id`) says where
a row comes from, and TRL's trainers leave it out. No column is called `margin`: TRL's RewardTrainer
and OpenRLHF would subtract it in their loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, TypeAlias, get_args

from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.ranking import (
    BAD_ORIGINS,
    PairSelection,
    RankBy,
    best_index,
    extremes,
    ordered_pairs,
    rank_keys,
)

RowForm: TypeAlias = Literal["preference", "ranked", "kto", "sft", "reward"]
ROW_FORMS: tuple[RowForm, ...] = get_args(RowForm)
Row: TypeAlias = dict[str, Any]
# Why a group gives no row.
WhyNone: TypeAlias = Literal["no rewards", "near tie", "cut", "negative"]


@dataclass(frozen=True)
class RowRules:
    """Which completions make rows.

    Gaps of `rank_keys` up to `margin` are near ties. A completion of a negative instruction (or a
    `rejected` one of the data's) is never what is to be learned (`chosen`, desirable, an answer to
    imitate), and one that was cut is not either: trainers put an end of turn after it. The two
    `allow_…` lift that.
    """

    rank_by: RankBy = "reward"
    margin: float = 0.0
    pairs: PairSelection = "best_worst"
    allow_negative_chosen: bool = False
    allow_cut_chosen: bool = False

    def may_be_chosen(self, completion: Completion) -> bool:
        """Whether a completion may be what is to be learned."""
        return (self.allow_negative_chosen or completion.origin not in BAD_ORIGINS) and (
            self.allow_cut_chosen or completion.finish_reason == "stop"
        )


def ranked_rows(groups: Iterable[CompletionGroup], *, rank_by: RankBy = "reward") -> list[Row]:
    """One row a group: `prompt`, `completions`, `rewards`, `origins`, best first.

    The shape that PRO and RRHF train on. Completions without a rank come last.
    """
    rules = RowRules(rank_by=rank_by)
    return [row for group in groups for row in _ranked(group, rules)]


def preference_rows(
    groups: Iterable[CompletionGroup],
    *,
    margin: float = 0.0,
    rank_by: RankBy = "reward",
    pairs: PairSelection = "best_worst",
    allow_negative_chosen: bool = False,
    allow_cut_chosen: bool = False,
) -> list[Row]:
    """Pairs in TRL's preference format: `prompt`, `chosen`, `rejected`.

    Best against worst, one row a group, or with `pairs="all"` every pair. Gaps up to `margin` make
    no row. What was written under a negative instruction, or was cut, is never `chosen` unless the
    two options allow it. `score_…` are the rewards, None where nothing was rewarded.
    """
    rules = RowRules(rank_by, margin, pairs, allow_negative_chosen, allow_cut_chosen)
    return [row for group in groups for row in _preference(group, rules)]


def rows_of(group: CompletionGroup, form: RowForm, rules: RowRules) -> list[Row]:
    """The rows that a group gives in this form; none where it has nothing for it."""
    return _ROWS[form](group, rules)


def why_none(group: CompletionGroup, form: RowForm, rules: RowRules) -> WhyNone:
    """Why a group gives no row: the first of the rules that, lifted, would give one."""
    if sum(key is not None for key in rank_keys(group, rules.rank_by)) < (
        1 if form == "sft" else 2
    ):
        return "no rewards"
    cut = replace(rules, allow_cut_chosen=True)
    if rows_of(group, form, cut):
        return "cut"
    if rows_of(group, form, replace(cut, allow_negative_chosen=True)):
        return "negative"
    return "near tie"


# ---- a group's rows in each form -----------------------------------------------------------------


def _ranked(group: CompletionGroup, rules: RowRules) -> list[Row]:
    keys = [-math.inf if key is None else key for key in rank_keys(group, rules.rank_by)]
    order = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
    ranked = [group.completions[i] for i in order]
    row = {
        "prompt": group.prompt,
        "completions": [c.text for c in ranked],
        "rewards": [c.reward for c in ranked],
        "origins": [c.origin for c in ranked],
    }
    return [row]


def _preference(group: CompletionGroup, rules: RowRules) -> list[Row]:
    is_conversation = not isinstance(group.prompt, str)
    return [
        {
            "prompt": group.prompt,
            "chosen": _answer(chosen, is_conversation),
            "rejected": _answer(rejected, is_conversation),
            **_sources(group, chosen, rejected),
        }
        for chosen, rejected in _pairs(group, rules)
    ]


def _reward(group: CompletionGroup, rules: RowRules) -> list[Row]:
    """The prompt is in both texts (TRL's implicit prompt): a reward model reads all of it."""
    return [
        {
            "chosen": _whole(group, chosen),
            "rejected": _whole(group, rejected),
            **_sources(group, chosen, rejected),
        }
        for chosen, rejected in _pairs(group, rules)
    ]


def _kto(group: CompletionGroup, rules: RowRules) -> list[Row]:
    """Above the group's mean is desirable, below it is not: the sign of GRPO's advantage.

    The mean, not the median: with rewards of 0 and 1 the median is one of them, and makes no label
    of it. A gap to the mean of up to half the margin is a near tie.
    """
    keys = rank_keys(group, rules.rank_by)
    present = [key for key in keys if key is not None]
    if len(present) < 2:
        return []
    mean, rows = fmean(present), []
    for c, key in zip(group.completions, keys, strict=True):
        if key is None or abs(key - mean) <= rules.margin / 2:
            continue
        is_desirable = key > mean
        if not is_desirable or rules.may_be_chosen(c):
            rows.append(_single(group, c) | {"label": is_desirable} | _source(group, c))
    return rows


def _sft(group: CompletionGroup, rules: RowRules) -> list[Row]:
    best = best_index(
        group,
        rank_keys(group, rules.rank_by),
        allow_bad_origins=rules.allow_negative_chosen,
        allow_cut=rules.allow_cut_chosen,
    )
    if best is None:
        return []
    c = group.completions[best]
    return [_single(group, c) | _source(group, c)]


_ROWS: dict[RowForm, Callable[[CompletionGroup, RowRules], list[Row]]] = {
    "preference": _preference,
    "ranked": _ranked,
    "kto": _kto,
    "sft": _sft,
    "reward": _reward,
}


def _pairs(group: CompletionGroup, rules: RowRules) -> list[tuple[Completion, Completion]]:
    """(chosen, rejected) with different texts and a gap above the margin.

    Best against worst: of equal keys the earlier one.
    """
    keys, completions = rank_keys(group, rules.rank_by), group.completions
    may = [rules.may_be_chosen(c) for c in completions]
    if rules.pairs == "all":
        found = [(i, j) for i, j in ordered_pairs(keys, rules.margin) if may[i]]
    else:
        good = [key if ok else None for key, ok in zip(keys, may, strict=True)]
        best, worst = extremes(good, -math.inf), extremes(keys, -math.inf)
        found = [] if best is None or worst is None else [(best[0], worst[1])]
    return [
        (completions[i], completions[j])
        for i, j in found
        if _gap(keys[i], keys[j]) > rules.margin
        and completions[i].text.strip() != completions[j].text.strip()
    ]


def _gap(higher: float | None, lower: float | None) -> float:
    return -math.inf if higher is None or lower is None else higher - lower


def _whole(group: CompletionGroup, completion: Completion) -> Any:
    if isinstance(group.prompt, str):
        return group.prompt + completion.text
    return [*group.prompt, _message(completion)]


def _single(group: CompletionGroup, completion: Completion) -> Row:
    is_conversation = not isinstance(group.prompt, str)
    return {"prompt": group.prompt, "completion": _answer(completion, is_conversation)}


def _answer(completion: Completion, is_conversation: bool) -> Any:
    return [_message(completion)] if is_conversation else completion.text


def _message(completion: Completion) -> dict[str, str]:
    return {"role": "assistant", "content": completion.text}


def _sources(group: CompletionGroup, chosen: Completion, rejected: Completion) -> Row:
    high, low = chosen.reward, rejected.reward
    return {
        "score_chosen": high,
        "score_rejected": low,
        "score_margin": None if high is None or low is None else high - low,
        "origin_chosen": chosen.origin,
        "origin_rejected": rejected.origin,
        "seed_chosen": chosen.seed,
        "seed_rejected": rejected.seed,
        "prompt_id": group.prompt_id,
    }


def _source(group: CompletionGroup, completion: Completion) -> Row:
    return {
        "score": completion.reward,
        "origin": completion.origin,
        "seed": completion.seed,
        "prompt_id": group.prompt_id,
    }
