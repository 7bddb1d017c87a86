"""Rows of tokens that a model reads, and then reads on one token a row at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from neat_align.modeling.head_inputs import completion_logits
from neat_align.modeling.known_padding import masks_from
from neat_align.modeling.outputs import forward
from neat_align.modeling.packing import pad_rows
from neat_align.modeling.shared_prefix import unwrapped
from neat_align.sampling.decode_attention import ATTENTION, SHARED_ATTENTION


@runtime_checkable
class TokenRows(Protocol):
    """Rows of tokens; `logits` predict what follows each."""

    logits: Float[Tensor, "rows vocab"]

    def advance(self, tokens: Int[Tensor, " rows"]) -> None:
        """One more token for every row."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; `logits` are theirs after the next `advance`."""
        ...

    def add(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """More rows, after those that are there; `logits` are of all."""
        ...


@dataclass(frozen=True)
class ReadPrompts:
    """Distinct prompts that a model has read: their keys and values, and what follows each.

    `which` of them is each prompt that was asked for; `mask` goes by length.
    """

    cache: DynamicCache
    mask: Int[Tensor, "prompts width"]
    logits: Float[Tensor, "prompts vocab"]
    which: list[int]

    @property
    def keys_and_values(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of one layer after the other. Raises ValueError where one uses those of another."""
        for layer in cast("list[DynamicLayer]", self.cache.layers):
            if layer.keys is None or layer.values is None:
                raise ValueError("a layer uses the keys of another one")
            yield layer.keys, layer.values


def read_prompts(
    model: torch.nn.Module,
    prompts: Sequence[tuple[int, ...]],
    pad_token_id: int,
    *,
    padded: bool = True,
) -> ReadPrompts:
    """Read prompts in one pass, equal ones once; not `padded`: without a mask or positions."""
    distinct = list(dict.fromkeys(prompts))
    at = {prompt: i for i, prompt in enumerate(distinct)}
    input_ids, mask = left_padded(distinct, pad_token_id, next(model.parameters()).device)
    cache = DynamicCache(config=unwrapped(model).config)
    logits = next_logits(
        model,
        cache,
        input_ids,
        mask if padded else None,
        (mask.cumsum(-1) - 1).clamp(min=0) if padded else None,
        padded=len({len(prompt) for prompt in distinct}) > 1,
    )
    return ReadPrompts(cache, mask, logits, [at[prompt] for prompt in prompts])


def next_logits(
    model: torch.nn.Module,
    cache: Cache,
    input_ids: Int[Tensor, "rows new"],
    mask: Int[Tensor, "rows columns"] | None,
    positions: Int[Tensor, "rows new"] | None,
    *,
    padded: bool,
) -> Float[Tensor, "rows vocab"]:
    """What follows each row, whose earlier tokens are in the cache; these are put there, too.

    `padded` says whether the mask hides anything, so that it is not asked.
    """
    with masks_from(padded=padded, also=(ATTENTION, SHARED_ATTENTION)):
        output = forward(
            model,
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return cast("Tensor", output.logits[:, -1])


class CachedRows:
    """Rows whose keys and values are kept, padded on the left: all end in the last column.

    So rows of any lengths can join and leave, and the cache is as wide as the longest of those that
    are there. Equal rows that come together are read once. Not `padded`: rows of one length, for
    models that are given neither mask nor positions; none can be added. Only for models of which
    `keeps_keys` is true, inside of `inference`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prompts: Sequence[tuple[int, ...]],
        pad_token_id: int,
        *,
        padded: bool = True,
    ) -> None:
        self._model, self._padded = model, padded
        self._pad_token_id = pad_token_id
        read = read_prompts(model, prompts, pad_token_id, padded=padded)
        which = torch.tensor(read.which, device=read.mask.device)
        self._lengths = [len(prompt) for prompt in prompts]
        self._cache, self._mask, self._positions = read.cache, read.mask, read.mask.sum(-1)
        self.logits: Float[Tensor, "rows vocab"] = read.logits[which]
        self._select(which)

    @property
    def _width(self) -> int:
        """Columns of the cache."""
        return int(self._mask.shape[1])

    def advance(self, tokens: Int[Tensor, " rows"]) -> None:
        """One more token for every row."""
        positions = self._positions
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        self._lengths = [length + 1 for length in self._lengths]
        self.logits = next_logits(
            self._model,
            self._cache,
            tokens[:, None],
            self._mask if self._padded else None,
            positions[:, None] if self._padded else None,
            padded=min(self._lengths) < self._width,
        )
        self._positions = positions + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; `logits` are theirs after the next `advance`."""
        self._lengths = [self._lengths[i] for i in rows]
        self._select(torch.tensor(rows, device=self._mask.device))

    def add(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """More rows, after those that are there; `logits` are of all."""
        if not self._padded:
            raise ValueError("rows without a mask have one length, and none can be added")
        added = CachedRows(self._model, prompts, self._pad_token_id)
        # Columns in which nobody is left go.
        width = max(*self._lengths, added._width)
        for mine, theirs in zip(self._cache.layers, added._cache.layers, strict=True):
            _join(cast("DynamicLayer", mine), cast("DynamicLayer", theirs), width)
        self._mask = torch.cat([as_wide(m, width, dim=1) for m in (self._mask, added._mask)])
        self._positions = torch.cat([self._positions, added._positions])
        self._lengths += added._lengths
        self.logits = torch.cat([self.logits, added.logits])

    def _select(self, rows: Int[Tensor, " stay"]) -> None:
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
        self._positions = self._mask.sum(-1)


class RecomputedRows:
    """Rows that the model reads from their beginning for every token.

    For models that keep more than keys and values; each row `alone` for those that mind the rows
    beside it. Inside of `inference`.
    """

    def __init__(
        self, model: torch.nn.Module, prompts: Sequence[tuple[int, ...]], *, alone: bool
    ) -> None:
        self._model, self._alone = model, alone
        self._rows = [tuple(prompt) for prompt in prompts]
        self.logits: Float[Tensor, "rows vocab"] = self._read()

    def advance(self, tokens: Int[Tensor, " rows"]) -> None:
        """One more token for every row."""
        self._rows = [(*row, token) for row, token in zip(self._rows, tokens.tolist(), strict=True)]
        self.logits = self._read()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; `logits` are theirs after the next `advance`."""
        self._rows = [self._rows[i] for i in rows]

    def add(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """More rows, after those that are there; `logits` are of all."""
        added = RecomputedRows(self._model, prompts, alone=self._alone)
        self._rows += added._rows
        self.logits = torch.cat([self.logits, added.logits])

    def _read(self) -> Float[Tensor, "rows vocab"]:
        device = next(self._model.parameters()).device
        distinct = list(dict.fromkeys(self._rows))
        rows = pad_rows(distinct, [()] * len(distinct), 0, one_at_a_time=self._alone).to(device)
        at = {row: i for i, row in enumerate(distinct)}
        return completion_logits(self._model, rows)[[at[row] for row in self._rows], 0]


def _join(layer: DynamicLayer, added: DynamicLayer, width: int) -> None:
    """Put the rows of `added` after a layer's own, all of them with the last `width` columns."""
    if not layer.is_initialized:
        return  # the layer uses another one's keys
    assert layer.keys is not None
    assert layer.values is not None
    assert added.keys is not None
    assert added.values is not None
    kept = width
    if isinstance(layer, DynamicSlidingWindowLayer):
        kept = min(width, layer.sliding_window - 1)
    layer.keys = torch.cat([as_wide(k, kept, dim=2) for k in (layer.keys, added.keys)])
    layer.values = torch.cat([as_wide(v, kept, dim=2) for v in (layer.values, added.values)])
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = width
    added.keys = added.values = None  # a layer's memory at a time


def as_wide(table: Tensor, width: int, *, dim: int) -> Tensor:
    """The last `width` columns along `dim`, with zeros in front where there are fewer."""
    missing = width - table.shape[dim]
    if missing < 0:
        return table.narrow(dim, -missing, width)
    return torch.nn.functional.pad(table, (0, 0) * (table.ndim - 1 - dim) + (missing, 0))


def left_padded(
    prompts: Sequence[tuple[int, ...]], pad_token_id: int, device: torch.device
) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    """Token ids and their mask.

    The mask goes by length: the pad token may also be a real token of a prompt.
    """
    width = max(map(len, prompts))
    padding = [width - len(p) for p in prompts]
    ids = [[pad_token_id] * n + list(p) for n, p in zip(padding, prompts, strict=True)]
    mask = [[0] * n + [1] * (width - n) for n in padding]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
