"""Groups of completions as one batch of tensors: rows for the model, and tables that rank them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neat_align.config import NEATConfig
from neat_align.learning.teacher_rows import distilled
from neat_align.modeling.packing import (
    Layout,
    Rows,
    in_pinned_memory,
    rows_in_layout,
    to_device,
)
from neat_align.rounds.completions import ORIGINS, CompletionGroup
from neat_align.rounds.ranking import (
    RankBy,
    best_index,
    extremes,
    kept_completions,
    rank_keys,
)


@dataclass(frozen=True)
class GroupBatch:
    """Some groups as one batch of rows, and the [groups, k] tables that rank them.

    Row r is completion `slot[r]` of group `group[r]`. `present` says which slots hold a completion;
    `keys` is what ranks it (NaN where absent or abstained); `origins` indexes `ORIGINS` (−1
    where absent); `best_row` is the row of the language-modelling target (−1 where there is none).
    `ref_logps` are the start policy's log-probabilities in nats, `contrasts` the tokens' contrasts;
    `has_ref` and `has_contrasts` say whether they were computed. `names` are the groups' prompt
    ids, for messages.
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
    contrasts: Float[Tensor, "rows tokens"]
    has_contrasts: bool
    names: tuple[str, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GroupBatch:
        """The same batch on another device."""
        return to_device(self, device, non_blocking)

    def pin_memory(self) -> GroupBatch:
        """The same batch in pinned memory."""
        return in_pinned_memory(self)

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
    prompts = [g.prompt_ids for g in groups]
    answers = [[c.token_ids for c in g.completions] for g in groups]
    rows = rows_in_layout(prompts, answers, layout, pad_token_id)
    ref_logps = _token_values(groups, rows, "ref_logprobs")
    contrasts = _token_values(groups, rows, "contrasts")
    zeros = torch.zeros(rows.completion_ids.shape)
    return GroupBatch(
        rows=rows,
        group=torch.tensor([g for g, group in enumerate(groups) for _ in group.completions]),
        slot=torch.tensor([k for group in groups for k in range(len(group.completions))]),
        present=present,
        keys=keys,
        origins=origins,
        best_row=best_row,
        ref_logps=zeros if ref_logps is None else ref_logps,
        has_ref=ref_logps is not None,
        contrasts=zeros if contrasts is None else contrasts,
        has_contrasts=contrasts is not None,
        names=tuple(g.prompt_id for g in groups),
    )


def _token_values(
    groups: Sequence[CompletionGroup], rows: Rows, name: Literal["ref_logprobs", "contrasts"]
) -> Float[Tensor, "rows tokens"] | None:
    """A number a token, in nats; None unless every completion has them."""
    completions = [c for g in groups for c in g.completions]
    own: list[tuple[float, ...]] = [getattr(c, name) for c in completions]
    if any(len(values) != len(c.token_ids) for values, c in zip(own, completions, strict=True)):
        return None
    table = torch.zeros(rows.completion_ids.shape)
    for r, values in enumerate(own):
        table[r, : len(values)] = torch.tensor(values)
    return table


def without_unread_completions(group: CompletionGroup, config: NEATConfig) -> CompletionGroup:
    """The group without completions that no term of the configured loss reads.

    With the best against the worst and no KL term, for example, two of a group are enough.
    """
    ranks_all = config.pair_selection == "all" and config.ranking_loss != "none"
    if ranks_all or config.kl_weight > 0 or config.negative_penalty != "none":
        return group
    keys = rank_keys(group, cast("RankBy", config.rank_by))
    read: list[int | None] = []
    if config.lm_weight:
        best = best_index(
            group,
            keys,
            allow_bad_origins=config.lm_on_bad_origins,
            allow_cut=config.lm_on_cut_completions,
        )
        read.append(best)
    if config.distil_weight:
        read += distilled(group, cast("Literal['all', 'lower_half']", config.distil_answers))
    if config.pair_selection == "best_worst" and config.ranking_loss != "none":
        read += extremes(keys, config.reward_margin) or ()
    # Nothing is read of a group whose answers all abstained: one stands for it.
    return kept_completions(group, read if any(i is not None for i in read) else [0])
