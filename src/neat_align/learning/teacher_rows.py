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
from neat_align.modeling.packing import (
    Layout,
    PackedRows,
    Rows,
    TokenIds,
    fill_in_order,
    in_pinned_memory,
    pack_rows,
    pad_rows,
    to_device,
)
from neat_align.rounds.completions import CompletionGroup

# Padded rows hold their logits, several tables of them: tokens that go through the teacher at once.
PADDED_TOKENS = 1024


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
    chosen: list[tuple[int, int, int]] = []  # group, completion, row of the micro-batch
    for g, group in enumerate(groups):
        if len(group.contrast_ids) < p.pairs:
            raise DataError(
                f"the group of prompt {group.prompt_id} has its prompt under "
                f"{len(group.contrast_ids)} instruction pairs (contrast_prompt_ids), and contrast "
                f"distillation reads {p.pairs}: make the round again with these settings"
            )
        chosen += [(g, k, first_row + k) for k in distilled(group, p.answers)]
        first_row += len(group.completions)
    batches = [chosen] if chosen else []
    if layout != "packed":
        # A group stays whole: its prompt has one alpha, of all of its answers.
        by_group = [
            [c for c in chosen if c[0] == g] for g in dict.fromkeys(g for g, _, _ in chosen)
        ]
        sizes = [
            sum(len(groups[g].prompt_ids) + len(_ids(groups, g, k)) for g, k, _ in of_group)
            for of_group in by_group
        ]
        filled = fill_in_order(sizes, PADDED_TOKENS)
        batches = [[c for i in batch for c in by_group[i]] for batch in filled]
    return tuple(_teacher_rows(groups, rows, b, p, layout, pad_token_id) for b in batches)


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


def _ids(groups: Sequence[CompletionGroup], g: int, k: int) -> TokenIds:
    return groups[g].completions[k].token_ids


def _teacher_rows(
    groups: Sequence[CompletionGroup],
    rows: Rows,
    chosen: Sequence[tuple[int, int, int]],
    p: TeachParams,
    layout: Layout,
    pad_token_id: int,
) -> TeacherRows:
    asked = list(dict.fromkeys(g for g, _, _ in chosen))
    # What comes after the distilled part of an answer is not read.
    lengths = [math.ceil(p.first * len(_ids(groups, g, k))) for g, k, _ in chosen]
    answers: dict[int, list[TokenIds]] = {g: [] for g in asked}
    for (g, k, _), length in zip(chosen, lengths, strict=True):
        answers[g].append(_ids(groups, g, k)[:length])

    def after(prompts: Sequence[TokenIds]) -> Rows:
        if layout == "packed":
            return pack_rows(prompts, [answers[g] for g in asked])
        repeated = [
            ids for ids, g in zip(prompts, asked, strict=True) for _ in range(len(answers[g]))
        ]
        flat = [a for g in asked for a in answers[g]]
        return pad_rows(repeated, flat, pad_token_id, one_at_a_time=layout == "unpadded")

    plain = after([groups[g].prompt_ids for g in asked])
    pairs = range(p.pairs)
    positive = [after([groups[g].contrast_ids[j][0] for g in asked]) for j in pairs]
    negative = [after([groups[g].contrast_ids[j][1] for g in asked]) for j in pairs]
    own = [(r, t) for r, n in enumerate(lengths) for t in range(n)]
    return TeacherRows(
        plain=plain,
        positive=tuple(positive),
        negative=tuple(negative) if p.negatives else (),
        places=_places(plain, own),
        student=_places(rows, [(chosen[r][2], t) for r, t in own]),
        answer=torch.tensor([r for r, _ in own], dtype=torch.long),
        lengths=torch.tensor(lengths, dtype=torch.long),
        prompt=torch.tensor([asked.index(g) for g, _, _ in chosen], dtype=torch.long),
    )


def _places(rows: Rows, tokens: Sequence[tuple[int, int]]) -> Int[Tensor, " tokens"]:
    """Where in the head's inputs the token `t` of completion `r` is, for each (r, t)."""
    width = rows.completion_ids.shape[1]
    in_table = torch.tensor([r * width + t for r, t in tokens], dtype=torch.long)
    if not isinstance(rows, PackedRows):
        return in_table
    # Inputs of packed rows have no padding: the n-th filled place of the table.
    return torch.searchsorted(rows.token_at, in_table)
