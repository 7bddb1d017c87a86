"""Groups of completions as one batch of tensors: rows for the model, and tables that rank them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neat_align.modeling.packing import Layout, Rows, pack_rows, pad_rows, to_device
from neat_align.rounds.completions import ORIGINS, CompletionGroup
from neat_align.rounds.ranking import RankBy, best_index, rank_keys


@dataclass(frozen=True)
class GroupBatch:
    """Some groups as one batch of rows, and the [groups, k] tables that rank them.

    Row r is completion `slot[r]` of group `group[r]`. `present` says which slots hold a completion;
    `keys` is what ranks it (NaN where absent or abstained); `origins` indexes `groups.ORIGINS` (−1
    where absent); `best_row` is the row of the language-modelling target (−1 where there is none).
    `ref_logps` are the start policy's log-probabilities in nats; `has_ref` says whether they were
    computed. `names` are the groups' prompt ids, for messages.
    """

    rows: Rows
    group: Int[Tensor, " rows"]
    slot: Int[Tensor, " rows"]
    present: Bool[Tensor, "groups k"]
    keys: Float[Tensor, "groups k"]
    origins: Int[Tensor, "groups k"]
    best_row: Int[Tensor, " groups"]
    ref_logps: Float[Tensor, "rows tokens"]
    has_ref: bool
    names: tuple[str, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GroupBatch:
        """The same batch on another device."""
        return to_device(self, device, non_blocking)

    def table(self, values: Float[Tensor, " rows"]) -> Float[Tensor, "groups k"]:
        """Per-row values laid out by group and slot; 0 where a slot is absent. Gradients pass."""
        return values.new_zeros(self.present.shape).index_put((self.group, self.slot), values)


def collate_groups(
    groups: Sequence[CompletionGroup],
    *,
    pad_token_id: int,
    rank_by: RankBy,
    lm_on_bad_origins: bool,
    lm_on_cut: bool = False,
    layout: Layout = "padded",
) -> GroupBatch:
    """One batch from several groups of any sizes."""
    flat = [(g, k, c) for g, group in enumerate(groups) for k, c in enumerate(group.completions)]
    rows: Rows
    if layout == "packed":
        rows = pack_rows(
            [g.prompt_ids for g in groups], [[c.token_ids for c in g.completions] for g in groups]
        )
    else:
        rows = pad_rows(
            [groups[g].prompt_ids for g, _, _ in flat],
            [c.token_ids for _, _, c in flat],
            pad_token_id,
        )
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
        best = best_index(
            group, group_keys, allow_bad_origins=lm_on_bad_origins, allow_cut=lm_on_cut
        )
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
        names=tuple(g.prompt_id for g in groups),
    )
