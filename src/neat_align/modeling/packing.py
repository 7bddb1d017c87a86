"""Groups as tensors, in layouts that give the same numbers.

Packed: the groups of a micro-batch stand one after the other in a single row without padding, and a
group is [prompt; y_1; …; y_K] with positions that go on from the prompt's end for every completion.
The prompt goes through the model once instead of K times: K(P + R) tokens become P + KR, and P +
K(R − 1) in fact, since nothing is read at a completion's last token. `shared_prefix` holds the
attention that keeps completions apart.

Padded: one row a completion, [prompt; completion], padded on the right only. A causal model never
looks there, so it needs neither a mask nor positions and sees in every row what it would see in the
row alone: models that ignore a mask, or read it in a way of their own, get the same numbers, too.

Unpadded: the same rows, put through the model one at a time. For models whose rows see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

T = TypeVar("T")
TokenIds: TypeAlias = Sequence[int]
Layout: TypeAlias = Literal["packed", "padded", "unpadded"]
# The position of a key at padding: after every query, so that none may see it.
PADDING_POSITION = 2**30


def to_device(rows: T, device: torch.device | str, non_blocking: bool) -> T:
    """A dataclass of tensors, or of such dataclasses, on another device.

    Flags and names stay as they are. Nobody waits for a copy of pinned memory.
    """

    def moved(value: Any) -> Any:
        pinned = isinstance(value, Tensor) and value.is_pinned()
        return value.to(device, non_blocking=non_blocking or pinned)

    return _with_each(rows, moved)


def in_pinned_memory(rows: T) -> T:
    """The same dataclass in memory that a GPU copies from by itself; DataLoader asks for it."""
    return _with_each(rows, lambda value: value.pin_memory())


def _with_each(rows: T, work: Callable[[Any], Any]) -> T:
    def done(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(done(v) for v in value)
        return value if isinstance(value, bool | str | float) else work(value)

    values = {f.name: done(getattr(rows, f.name)) for f in fields(cast("Any", rows))}
    return cast("T", replace(cast("Any", rows), **values))


@dataclass(frozen=True)
class PaddedRows:
    """Prompts and completions side by side.

    Masks go by length, never by token: pad is often eos. `read_at` is the position in its row whose
    state predicts a completion token (the row's last position where there is none).
    `one_at_a_time`: every row goes through the model alone, without its padding.
    """

    input_ids: Int[Tensor, "rows width"]
    attention_mask: Int[Tensor, "rows width"]
    read_at: Int[Tensor, "rows tokens"]
    completion_ids: Int[Tensor, "rows tokens"]
    completion_mask: Bool[Tensor, "rows tokens"]
    one_at_a_time: bool = False

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PaddedRows:
        """The same rows on another device."""
        return to_device(self, device, non_blocking)

    def pin_memory(self) -> PaddedRows:
        """The same rows in pinned memory."""
        return in_pinned_memory(self)


@dataclass(frozen=True)
class PrefixLayout:
    """Where the pieces of a packed row are.

    `prompt_index` and `completion_index` are positions in the row, padded on the right with 0;
    `group` says whose prompt a completion follows. `inverse` leads back: row position n is entry
    `inverse[n]` of all (padded) prompt tokens followed by all (padded) completion tokens. A
    completion token may see the keys of its prompt and of itself whose position in the conversation
    is not after its own: `query_position` against `key_position`, which is PADDING_POSITION at
    padding. (Queries at padding stand at position 0, so that they see something: a softmax over
    nothing is not a number.)
    """

    prompt_index: Int[Tensor, "groups prompt"]
    completion_index: Int[Tensor, "rows fed"]
    group: Int[Tensor, " rows"]
    inverse: Int[Tensor, " flat"]
    query_position: Int[Tensor, "rows fed"]
    key_position: Int[Tensor, "rows keys"]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PrefixLayout:
        """The same layout on another device."""
        return to_device(self, device, non_blocking)

    def pin_memory(self) -> PrefixLayout:
        """The same layout in pinned memory."""
        return in_pinned_memory(self)


@dataclass(frozen=True)
class PackedRows:
    """Groups in one row that holds every prompt once.

    `read_at` are the row's positions whose states predict the completion tokens, completion by
    completion: the prompt's last token, then the completion's own but the last, which is not fed at
    all. `token_at` are the places of the same tokens in the flattened table of completions: a mask
    would have to be read to know how many there are.
    """

    input_ids: Int[Tensor, "1 flat"]
    position_ids: Int[Tensor, "1 flat"]
    read_at: Int[Tensor, " predicted"]
    token_at: Int[Tensor, " predicted"]
    completion_ids: Int[Tensor, "rows tokens"]
    completion_mask: Bool[Tensor, "rows tokens"]
    layout: PrefixLayout

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRows:
        """The same rows on another device."""
        return to_device(self, device, non_blocking)

    def pin_memory(self) -> PackedRows:
        """The same rows in pinned memory."""
        return in_pinned_memory(self)


Rows: TypeAlias = PaddedRows | PackedRows


def pad_rows(
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
    pad_token_id: int,
    *,
    one_at_a_time: bool = False,
) -> PaddedRows:
    """Rows [prompt; completion] from token ids, one a pair, in order.

    Prompts must not be empty: a completion's first token is read there.
    """
    if not all(prompts):
        raise ValueError(
            "an empty prompt cannot be scored: its completion's first token would be predicted "
            "from nothing"
        )
    input_ids, mask = right_padded(
        [[*p, *c] for p, c in zip(prompts, completions, strict=True)], pad_token_id
    )
    tokens, completion_mask = right_padded(completions, pad_token_id, at_least=1)
    prompt_lengths = torch.tensor([len(p) for p in prompts])
    read_at = prompt_lengths[:, None] - 1 + torch.arange(tokens.shape[1])
    return PaddedRows(
        input_ids=input_ids,
        attention_mask=mask.long(),
        read_at=read_at.clamp(max=input_ids.shape[1] - 1),
        completion_ids=tokens,
        completion_mask=completion_mask,
        one_at_a_time=one_at_a_time,
    )


def rows_in_layout(
    prompts: Sequence[TokenIds],
    completions: Sequence[Sequence[TokenIds]],
    layout: Layout,
    pad_token_id: int,
) -> Rows:
    """Prompts and the completions of each as rows of a layout, completion by completion."""
    if layout == "packed":
        return pack_rows(prompts, completions)
    answers = [(p, ids) for p, own in zip(prompts, completions, strict=True) for ids in own]
    return pad_rows(
        [prompt for prompt, _ in answers],
        [ids for _, ids in answers],
        pad_token_id,
        one_at_a_time=layout == "unpadded",
    )


def pack_rows(prompts: Sequence[TokenIds], completions: Sequence[Sequence[TokenIds]]) -> PackedRows:
    """One row from prompts and the completions of each.

    Prompts must not be empty: a completion's first token is read there.
    """
    if not all(prompts):
        raise ValueError(
            "an empty prompt cannot be packed: its completions' first tokens would be predicted "
            "from nothing"
        )
    ids: list[int] = []
    positions: list[int] = []
    prompt_spans: list[range] = []
    spans: list[range] = []  # what is fed of each completion
    group: list[int] = []
    read_at: list[int] = []
    for g, (prompt, answers) in enumerate(zip(prompts, completions, strict=True)):
        prompt_spans.append(range(len(ids), len(ids) + len(prompt)))
        ids += prompt
        positions += range(len(prompt))
        for answer in answers:
            spans.append(range(len(ids), len(ids) + max(0, len(answer) - 1)))
            group.append(g)
            if answer:
                read_at += [prompt_spans[g][-1], *spans[-1]]
            ids += answer[:-1]
            positions += range(len(prompt), len(prompt) + len(spans[-1]))
    flat_completions = [answer for answers in completions for answer in answers]
    completion_ids, completion_mask = right_padded(flat_completions)
    return PackedRows(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        read_at=torch.tensor(read_at, dtype=torch.long),
        token_at=completion_mask.flatten().nonzero().squeeze(-1),
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        layout=_prefix_layout(prompt_spans, spans, group),
    )


def right_padded(
    rows: Sequence[TokenIds], fill: int = 0, *, at_least: int = 0
) -> tuple[Int[Tensor, "rows width"], Bool[Tensor, "rows width"]]:
    """Token ids with `fill` behind those of the shorter rows, and where they are none of it.

    The width is the longest row's, and `at_least` that.
    """
    width = max(at_least, *map(len, rows))
    filled = [[*row, *[fill] * (width - len(row))] for row in rows]
    values = torch.tensor(filled, dtype=torch.long).view(len(rows), width)
    lengths = torch.tensor([len(row) for row in rows])
    return values, torch.arange(width) < lengths[:, None]


def _prefix_layout(
    prompts: Sequence[range], completions: Sequence[range], group: Sequence[int]
) -> PrefixLayout:
    prompt_index, prompt_mask = right_padded(prompts)
    completion_index, fed_mask = right_padded(completions)
    inverse = torch.empty(int(prompt_mask.sum() + fed_mask.sum()), dtype=torch.long)
    inverse[prompt_index[prompt_mask]] = prompt_mask.flatten().nonzero().squeeze(-1)
    inverse[completion_index[fed_mask]] = (
        prompt_mask.numel() + fed_mask.flatten().nonzero().squeeze(-1)
    )
    groups = torch.tensor(group, dtype=torch.long)
    prompt_positions = torch.where(
        prompt_mask, torch.arange(prompt_mask.shape[1]), PADDING_POSITION
    )
    prompt_lengths = torch.tensor([len(p) for p in prompts])
    own_positions = prompt_lengths[groups][:, None] + torch.arange(fed_mask.shape[1])
    own_keys = torch.where(fed_mask, own_positions, PADDING_POSITION)
    return PrefixLayout(
        prompt_index=prompt_index,
        completion_index=completion_index,
        group=groups,
        inverse=inverse,
        query_position=torch.where(fed_mask, own_positions, 0),
        key_position=torch.cat([prompt_positions[groups], own_keys], dim=1),
    )


def padding_fraction(rows: Rows) -> float:
    """Share of places that hold nothing.

    Of a padded batch, or of the queries in the attention of a packed row (the rest of the model
    sees no padding there).
    """
    if isinstance(rows, PackedRows):
        places = rows.layout.prompt_index.numel() + rows.layout.completion_index.numel()
        return 1 - rows.input_ids.numel() / places
    return 1 - float(rows.attention_mask.float().mean())


def tokens_in(prompt_length: int, completion_lengths: Sequence[int], layout: Layout) -> int:
    """Tokens that one group puts through the model.

    Padding within the group is included, padding between groups is not.
    """
    if layout == "packed":
        return prompt_length + sum(max(0, n - 1) for n in completion_lengths)
    return len(completion_lengths) * (prompt_length + max(completion_lengths))


def fill_in_order(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `sizes` in batches that hold at most `budget` each; neighbours stay together.

    An item over the budget is alone.
    """
    batches: list[list[int]] = []
    used = 0
    for i, size in enumerate(sizes):
        if not batches or used + size > budget:
            batches.append([])
            used = 0
        batches[-1].append(i)
        used += size
    return batches


def fill_budget(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `sizes` in batches that hold at most `budget` each; first fit, largest first.

    An item over the budget is alone.
    """
    batches: list[list[int]] = []
    left: list[int] = []  # of each batch's budget
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = next((b for b, free in enumerate(left) if sizes[i] <= free), None)
        if fits is None:
            batches.append([i])
            left.append(budget - sizes[i])
        else:
            batches[fits].append(i)
            left[fits] -= sizes[i]
    return batches
