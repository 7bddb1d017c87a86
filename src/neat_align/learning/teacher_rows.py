"""The rows that a teacher reads: plain answers after their prompt, plain and under instructions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from neat_align.errors import DataError
from neat_align.modeling.head_inputs import PADDED_TOKENS
from neat_align.modeling.packing import (
    Layout,
    PackedRows,
    Rows,
    TokenIds,
    fill_in_order,
    in_pinned_memory,
    rows_in_layout,
    to_device,
    tokens_in,
)
from neat_align.rounds.completions import CompletionGroup


@dataclass(frozen=True)
class TeachParams:
    """Which answers and tokens are distilled, and which prompts the teacher sees."""

    answers: Literal["all", "lower_half"]
    first: float
    pairs: int
    negatives: bool


@dataclass(frozen=True)
class TeacherRows:
    """Distilled answers after each of the teacher's prompts.

    `plain`, `positive` and `negative` hold the same answers in the same order. `places` are the
    distilled tokens in the head's inputs of each of them, `student` in those of the micro-batch.
    `answer` says which of these answers a token belongs to, `lengths` counts an answer's distilled
    tokens, and `prompt` says whose answer it is, of `num_prompts`.
    """

    plain: Rows
    positive: tuple[Rows, ...]
    negative: tuple[Rows, ...]
    places: Int[Tensor, " tokens"]
    student: Int[Tensor, " tokens"]
    answer: Int[Tensor, " tokens"]
    lengths: Int[Tensor, " answers"]
    prompt: Int[Tensor, " answers"]

    @property
    def num_prompts(self) -> int:
        """An upper bound of `prompt`, without reading a device."""
        return len(self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TeacherRows:
        """The same rows on another device."""
        return to_device(self, device, non_blocking)

    def pin_memory(self) -> TeacherRows:
        """The same rows in pinned memory."""
        return in_pinned_memory(self)


def teacher_rows(
    groups: Sequence[CompletionGroup],
    rows: Rows,
    p: TeachParams,
    *,
    layout: Layout,
    pad_token_id: int,
) -> tuple[TeacherRows, ...]:
    """What the teacher reads for these groups, whose micro-batch has `rows`; () for none.

    In packed rows all at once, in padded ones under `PADDED_TOKENS`. Raises DataError for groups
    whose prompts were not kept under enough instructions.
    """
    first_row = 0
    by_group: list[list[_Distilled]] = []
    for g, group in enumerate(groups):
        if len(group.contrast_ids) < p.pairs:
            raise DataError(
                f"the group of prompt {group.prompt_id} has its prompt under "
                f"{len(group.contrast_ids)} instruction pairs (contrast_prompt_ids), and contrast "
                f"distillation reads {p.pairs}: make the round again with these settings"
            )
        answers = [(k, group.completions[k].token_ids) for k in distilled(group, p.answers)]
        if answers:
            by_group.append([_Distilled(g, first_row + k, ids, p.first) for k, ids in answers])
        first_row += len(group.completions)
    # A group stays whole: its prompt has one alpha, of all of its answers.
    batches = [list(range(len(by_group)))] if by_group else []
    if layout != "packed":
        sizes = [
            tokens_in(len(groups[own[0].group].prompt_ids), [len(a.ids) for a in own], layout)
            for own in by_group
        ]
        batches = fill_in_order(sizes, PADDED_TOKENS)
    return tuple(
        _teacher_rows(groups, rows, [by_group[i] for i in batch], p, layout, pad_token_id)
        for batch in batches
    )


def distilled(group: CompletionGroup, answers: Literal["all", "lower_half"]) -> list[int]:
    """The places in a group of the answers that are distilled: its plain ones, or the half of them
    with the lower rewards. An answer without a reward is in no half.
    """
    plain = [k for k, c in enumerate(group.completions) if c.origin == "plain"]
    if answers == "all":
        return plain
    rewards = {k: group.completions[k].reward for k in plain}
    ranked = sorted((r, k) for k, r in rewards.items() if r is not None)
    return sorted(k for _, k in ranked[: len(ranked) // 2])


@dataclass(frozen=True)
class _Distilled:
    """An answer that is distilled: whose it is, and its row in the micro-batch."""

    group: int
    row: int
    answer: TokenIds
    first: float

    @property
    def ids(self) -> TokenIds:
        """Its distilled tokens; what comes after them is not read."""
        return self.answer[: math.ceil(self.first * len(self.answer))]


def _teacher_rows(
    groups: Sequence[CompletionGroup],
    rows: Rows,
    by_group: Sequence[Sequence[_Distilled]],
    p: TeachParams,
    layout: Layout,
    pad_token_id: int,
) -> TeacherRows:
    asked = [groups[own[0].group] for own in by_group]
    answers = [[a.ids for a in own] for own in by_group]

    def after(prompts: Sequence[TokenIds]) -> Rows:
        return rows_in_layout(prompts, answers, layout, pad_token_id)

    def under(side: Literal[0, 1]) -> tuple[Rows, ...]:
        return tuple(after([g.contrast_ids[j][side] for g in asked]) for j in range(p.pairs))

    plain = after([g.prompt_ids for g in asked])
    flat = [(place, a) for place, own in enumerate(by_group) for a in own]
    lengths = [len(a.ids) for _, a in flat]
    tokens = [(r, t) for r, n in enumerate(lengths) for t in range(n)]
    return TeacherRows(
        plain=plain,
        positive=under(0),
        negative=under(1) if p.negatives else (),
        places=_places(plain, tokens),
        student=_places(rows, [(flat[r][1].row, t) for r, t in tokens]),
        answer=torch.tensor([r for r, _ in tokens], dtype=torch.long),
        lengths=torch.tensor(lengths, dtype=torch.long),
        prompt=torch.tensor([place for place, _ in flat], dtype=torch.long),
    )


def _places(rows: Rows, tokens: Sequence[tuple[int, int]]) -> Int[Tensor, " tokens"]:
    """Where in the head's inputs the token `t` of completion `r` is, for each (r, t)."""
    width = rows.completion_ids.shape[1]
    in_table = torch.tensor([r * width + t for r, t in tokens], dtype=torch.long)
    if not isinstance(rows, PackedRows):
        return in_table
    # Inputs of packed rows have no padding: the n-th filled place of the table.
    return torch.searchsorted(rows.token_at, in_table)
