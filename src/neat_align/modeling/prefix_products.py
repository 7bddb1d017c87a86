"""Attention of a packed row as matrix products and a softmax, for CPUs.

torch's fused kernel for CPUs takes as long in bf16 as in fp32, which is about twice as long as the
products that it is made of (benchmarks/attention_forms.py). Here they are written down, over blocks
of queries whose scores stay in the cache: a prompt's queries over its own keys, a completion's over
its prompt's and its own. Nothing but query, key and value is kept for the backward pass, in the
row's own order, so that a prompt's keys are in memory once, which saves memory in fp32, too; the
softmax is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from neat_align.modeling.chunked_head import wide_dtype
from neat_align.modeling.packing import PADDING_POSITION, PrefixLayout

# Scores that are held at a time: 2 MiB of fp32, or those of so many queries of one row.
BLOCK_SCORES = 2**19
LEAST_QUERIES = 64


def product_attention(
    query: Float[Tensor, "flat heads dim"],
    key: Float[Tensor, "flat kv_heads dim"],
    value: Float[Tensor, "flat kv_heads value_dim"],
    layout: PrefixLayout,
    scale: float,
) -> Float[Tensor, "flat heads value_dim"]:
    """softmax(scale · q kᵀ) v over what each place of a packed row may see.

    Computed in autocast's type where autocast is on, the softmax in fp32 (fp64 for fp64). Several
    query heads may share one head of keys and values.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(kind, enabled=False):
        return cast("Tensor", _ProductAttention.apply(query, key, value, layout, scale))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Piece:
    """Rows of queries over [the keys of a prompt before them; their own], the own ones causally.

    `own` are the places of the rows' tokens in the packed row, `before` those of the prompt before
    each row. `hidden` is true where `before` only fills up (None: nowhere).
    """

    own: Int[Tensor, "rows tokens"]
    before: Int[Tensor, "rows prompt"]
    hidden: Bool[Tensor, "rows prompt"] | None

    def queries(self, x: Float[Tensor, "flat heads dim"], kv_heads: int) -> Tensor:
        """[rows, kv_heads, sharing, tokens, dim]: the query heads of one key head together."""
        rows, tokens = self.own.shape
        found = x.index_select(0, self.own.flatten()).view(rows, tokens, kv_heads, -1, x.shape[-1])
        return found.permute(0, 2, 3, 1, 4).contiguous()

    def keys(self, x: Float[Tensor, "flat kv_heads dim"]) -> Tensor:
        """[rows, kv_heads, prompt + tokens, dim]."""
        index = torch.cat([self.before, self.own], dim=1)
        found = x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])
        return found.transpose(1, 2).contiguous()

    def blocks(self, heads: int) -> Iterator[tuple[slice, slice]]:
        """(rows, their queries): so few that they have at most `BLOCK_SCORES` scores, or are
        `LEAST_QUERIES`: products of fewer take longer than their scores take room.
        """
        rows, tokens = self.own.shape
        most = max(LEAST_QUERIES, BLOCK_SCORES // (heads * (self.before.shape[1] + tokens)))
        at_once = max(1, most // tokens)  # whole rows
        step = min(tokens, most)
        for row in range(0, rows, at_once):
            for first in range(0, tokens, step):
                yield slice(row, row + at_once), slice(first, min(tokens, first + step))


def _pieces(layout: PrefixLayout) -> list[_Piece]:
    """The prompts, and the completions after theirs."""
    prompts, completions = layout.prompt_index, layout.completion_index
    pieces = [_Piece(prompts, prompts[:, :0], None)]
    if completions.shape[1] > 0:
        hidden = None
        # Told by sizes: to look at a mask would be to wait for it.
        if len(prompts) > 1 and prompts.numel() + completions.numel() > layout.inverse.numel():
            hidden = layout.key_position[:, : prompts.shape[1]] == PADDING_POSITION
        pieces.append(_Piece(completions, prompts.index_select(0, layout.group), hidden))
    return pieces


@dataclass(frozen=True)
class _Tables:
    """A piece's queries, keys and values, gathered."""

    piece: _Piece
    query: Float[Tensor, "rows kv_heads sharing tokens dim"]
    key: Float[Tensor, "rows kv_heads keys dim"]
    value: Float[Tensor, "rows kv_heads keys value_dim"]
    scale: float

    @classmethod
    def of(cls, piece: _Piece, query: Tensor, key: Tensor, value: Tensor, scale: float) -> _Tables:
        """From the row's own order."""
        queries = piece.queries(query, key.shape[1])
        return cls(piece, queries, _centred(piece.keys(key)), piece.keys(value), scale)

    def blocks(self) -> Iterator[tuple[slice, slice, slice]]:
        """(rows, their queries, the keys that these may see)."""
        prompt = self.piece.before.shape[1]
        for rows, tokens in self.piece.blocks(self.query.shape[1] * self.query.shape[2]):
            yield rows, tokens, slice(0, prompt + tokens.stop)

    def weights(
        self, rows: slice, tokens: slice, keys: slice
    ) -> tuple[Float[Tensor, "batch queries keys"], Tensor, Tensor]:
        """Softmax weights of a block in wide numbers, its queries and its keys."""
        asked, seen = merged(self.query[rows, :, :, tokens]), self.key[rows, :, keys].flatten(0, 1)
        unused = asked.new_empty(1, 1, 1)
        scores = torch.baddbmm(unused, asked, seen.transpose(1, 2), beta=0, alpha=self.scale)
        scores = scores.to(wide_dtype(scores.dtype))
        first, count = self.piece.before.shape[1] + tokens.start, tokens.stop - tokens.start
        table = scores.view(-1, *self.query.shape[1:3], count, scores.shape[-1])
        later = torch.full((count, count), -torch.inf, dtype=scores.dtype, device=scores.device)
        table[..., first:] += later.triu_(1)
        if self.piece.hidden is not None:
            hidden = self.piece.hidden[rows, None, None, None]
            table[..., : hidden.shape[-1]].masked_fill_(hidden, -torch.inf)
        return scores.softmax(-1), asked, seen


def _centred(key: Float[Tensor, "rows kv_heads keys dim"]) -> Tensor:
    """Keys less their mean, which moves all scores of a query alike, and so no weight.

    A half-precision score is rounded by a share of its size, most of which the mean is in many
    models. (Its gradients are those of the keys, too: a query's gradients at its scores add up to
    0. SageAttention, 2410.02367, does this before it quantises.)
    """
    if key.dtype.itemsize >= torch.float32.itemsize:
        return key
    wide = key.to(wide_dtype(key.dtype))
    return wide.sub_(wide.mean(2, keepdim=True)).to(key.dtype)


def merged(x: Float[Tensor, "rows kv_heads sharing tokens dim"]) -> Tensor:
    """[rows · kv_heads, sharing · tokens, dim]: queries of one key head are a batch's entry."""
    return x.flatten(2, 3).flatten(0, 1)


class _ProductAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "flat heads dim"],
        key: Float[Tensor, "flat kv_heads dim"],
        value: Float[Tensor, "flat kv_heads value_dim"],
        layout: PrefixLayout,
        scale: float,
    ) -> Float[Tensor, "flat heads value_dim"]:
        found = []
        for piece in _pieces(layout):
            tables = _Tables.of(piece, query, key, value, scale)
            out = tables.query.new_empty(*tables.query.shape[:-1], value.shape[-1])
            for rows, tokens, keys in tables.blocks():
                weights, _, _ = tables.weights(rows, tokens, keys)
                part = out[rows, :, :, tokens]
                seen = tables.value[rows, :, keys].flatten(0, 1)
                part.copy_((weights.to(seen.dtype) @ seen).view(part.shape))
            found.append(_by_token(out))
        ctx.save_for_backward(query, key, value)
        ctx.layout, ctx.scale = layout, scale
        return torch.cat(found).index_select(0, layout.inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        layout: PrefixLayout = ctx.layout
        (grad,) = outputs
        prompts, completions = layout.prompt_index, layout.completion_index
        # 0 at the places that only fill up, which are nobody's.
        table = grad.new_zeros(prompts.numel() + completions.numel(), *grad.shape[1:])
        table.index_copy_(0, layout.inverse, grad)
        grads = (table[: prompts.numel()], table[prompts.numel() :])
        pieces = _pieces(layout)
        queries: list[Tensor] = []
        own_keys: list[Tensor] = []
        own_values: list[Tensor] = []
        for piece, own_grad in zip(pieces, grads, strict=False):
            tables = _Tables.of(piece, query, key, value, ctx.scale)
            heads = tables.query.shape[1:3]
            of_out = own_grad.view(*piece.own.shape, *heads, -1).permute(0, 2, 3, 1, 4)
            of_query, of_key, of_value = _gradients(tables, of_out.contiguous())
            queries.append(_by_token(of_query))
            shared = piece.before.shape[1]
            for of_keys, own in ((of_key, own_keys), (of_value, own_values)):
                own.append(of_keys[:, :, shared:].transpose(1, 2).flatten(0, 1))
                if shared:  # all of a group's completions read its prompt
                    before = of_keys[:, :, :shared].transpose(1, 2)
                    own[0].view(*prompts.shape, *own[0].shape[1:]).index_add_(
                        0, layout.group, before
                    )
        return (
            *(
                torch.cat(of_all).index_select(0, layout.inverse).to(query.dtype)
                for of_all in (queries, own_keys, own_values)
            ),
            None,
            None,
        )


def _gradients(
    tables: _Tables, of_out: Float[Tensor, "rows kv_heads sharing tokens value_dim"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a piece's queries, keys and values, those of the last two in wide numbers."""
    wide = wide_dtype(tables.key.dtype)
    of_query = torch.empty_like(tables.query)
    of_key = torch.zeros_like(tables.key, dtype=wide)
    of_value = torch.zeros_like(tables.value, dtype=wide)
    for rows, tokens, keys in tables.blocks():
        weights, asked, seen = tables.weights(rows, tokens, keys)
        values = tables.value[rows, :, keys].flatten(0, 1)
        dtype, of_block = values.dtype, merged(of_out[rows, :, :, tokens])
        of_value[rows, :, keys].flatten(0, 1).add_(weights.to(dtype).transpose(1, 2) @ of_block)
        of_weights = (of_block @ values.transpose(1, 2)).to(wide)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, wide)
        of_scores = of_scores.mul_(tables.scale).to(dtype)
        part = of_query[rows, :, :, tokens]
        part.copy_((of_scores @ seen).view(part.shape))
        of_key[rows, :, keys].flatten(0, 1).add_(of_scores.transpose(1, 2) @ asked)
    return of_query, of_key, of_value


def _by_token(
    x: Float[Tensor, "rows kv_heads sharing tokens dim"],
) -> Float[Tensor, "places heads dim"]:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
