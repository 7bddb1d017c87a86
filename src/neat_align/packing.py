"""Groups as tensors.

The padded layout: one row a completion, the prompt padded on the left and the completion on the right, so that all
completions of a batch stand in the same last columns. It is simple, works with every architecture, and is the reference
that any faster layout has to agree with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neat_align.groups import ORIGINS, CompletionGroup, best_index, rank_keys


@dataclass(frozen=True)
class PaddedRows:
    """Prompts and completions side by side. Masks go by length, never by token: pad is often eos."""

    input_ids: Int[Tensor, "rows width"]
    attention_mask: Int[Tensor, "rows width"]
    position_ids: Int[Tensor, "rows width"]
    completion_ids: Int[Tensor, "rows tokens"]
    completion_mask: Bool[Tensor, "rows tokens"]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PaddedRows:
        """The same rows on another device."""
        return PaddedRows(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})


@dataclass(frozen=True)
class GroupBatch:
    """Some groups as one batch of rows, and the [groups, k] tables that rank them.

    Row r is completion `slot[r]` of group `group[r]`. `present` says which slots hold a completion; `keys` is what ranks
    it (NaN where absent or abstained); `origins` indexes `groups.ORIGINS` (−1 where absent); `best_row` is the row of the
    language-modelling target (−1 where there is none). `ref_logps` are the start policy's log-probabilities in nats;
    `has_ref` says whether they were computed.
    """

    rows: PaddedRows
    group: Int[Tensor, " rows"]
    slot: Int[Tensor, " rows"]
    present: Bool[Tensor, "groups k"]
    keys: Float[Tensor, "groups k"]
    origins: Int[Tensor, "groups k"]
    best_row: Int[Tensor, " groups"]
    ref_logps: Float[Tensor, "rows tokens"]
    has_ref: bool

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GroupBatch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self) if f.name != "has_ref"}
        return GroupBatch(**moved, has_ref=self.has_ref)

    def table(self, values: Float[Tensor, " rows"]) -> Float[Tensor, "groups k"]:
        """Per-row values laid out by group and slot; 0 where a slot is absent. Gradients pass."""
        return values.new_zeros(self.present.shape).index_put((self.group, self.slot), values)


def pad_rows(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_token_id: int) -> PaddedRows:
    """Rows [prompt; completion] from token ids, one a pair, in order."""
    left = max(len(p) for p in prompts)
    right = max(1, *(len(c) for c in completions))
    n = len(prompts)
    input_ids = torch.full((n, left + right), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros(n, left + right, dtype=torch.long)
    for i, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        input_ids[i, left - len(p) : left] = torch.tensor(p, dtype=torch.long)
        input_ids[i, left : left + len(c)] = torch.tensor(c, dtype=torch.long)
        attention_mask[i, left - len(p) : left + len(c)] = 1
    return PaddedRows(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
        completion_ids=input_ids[:, left:],
        completion_mask=attention_mask[:, left:].bool(),
    )


def collate_groups(
    groups: Sequence[CompletionGroup], *, pad_token_id: int, rank_by: Literal["reward", "origin"], lm_on_bad_origins: bool
) -> GroupBatch:
    """One batch from several groups of any sizes."""
    flat = [(g, k, c) for g, group in enumerate(groups) for k, c in enumerate(group.completions)]
    rows = pad_rows([groups[g].prompt_ids for g, _, _ in flat], [c.token_ids for _, _, c in flat], pad_token_id)
    shape = (len(groups), max(len(g.completions) for g in groups))
    present = torch.zeros(shape, dtype=torch.bool)
    keys = torch.full(shape, torch.nan)
    origins = torch.full(shape, -1, dtype=torch.long)
    best_row = torch.full((len(groups),), -1, dtype=torch.long)
    first_row = 0
    for g, group in enumerate(groups):
        group_keys = rank_keys(group, rank_by)
        for k, (completion, key) in enumerate(zip(group.completions, group_keys, strict=True)):
            origins[g, k] = ORIGINS.index(completion.origin)
            present[g, k] = True
            if key is not None:
                keys[g, k] = key
        best = best_index(group, group_keys, allow_bad_origins=lm_on_bad_origins)
        if best is not None:
            best_row[g] = first_row + best
        first_row += len(group.completions)
    has_ref = all(len(c.ref_logprobs) == len(c.token_ids) for _, _, c in flat)
    ref = torch.zeros(rows.completion_ids.shape)
    if has_ref:
        for r, (_, _, c) in enumerate(flat):
            ref[r, : len(c.ref_logprobs)] = torch.tensor(c.ref_logprobs)
    return GroupBatch(
        rows=rows,
        group=torch.tensor([g for g, _, _ in flat]),
        slot=torch.tensor([k for _, k, _ in flat]),
        present=present,
        keys=keys,
        origins=origins,
        best_row=best_row,
        ref_logps=ref,
        has_ref=has_ref,
    )
