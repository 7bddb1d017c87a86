"""Rows that are read on with each prompt kept once for all of its completions, on a CPU.

A cache of whole rows holds a prompt's keys and values as often as it has completions, reads all of
them for every token, and copies all of them to append one. Here a prompt's are kept as they were
read, one row for all of its completions; a completion has its own tokens' beside them, in a buffer
with room for more. Attention is then two products with the prompts' keys and values, which all
completions of a prompt share, two with the completions' own, and one softmax over both (Hydragen,
arXiv:2402.05099, which joins two softmaxes instead).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from neat_align.sampling.decode_attention import SHARED_ATTENTION, decode_attention
from neat_align.sampling.token_rows import as_wide, next_logits, read_prompts

# Columns that the completions' buffers grow by: they are copied once in so many tokens.
ROOM = 32


@dataclass(frozen=True)
class Seats:
    """Which completions read which prompt, as tables to gather by.

    Every prompt has `each` seats, as many as the one with the most completions needs; what an empty
    one computes (from row 0) nobody reads.
    """

    each: int
    row_of_seat: Int[Tensor, " seats"]
    seat_of_row: Int[Tensor, " rows"]
    in_order: bool

    def seated(self, of_rows: Tensor) -> Tensor:
        """A table of rows, by seats."""
        return of_rows if self.in_order else of_rows[self.row_of_seat]

    def by_row(self, of_seats: Tensor) -> Tensor:
        """A table of seats, by rows."""
        return of_seats if self.in_order else of_seats[self.seat_of_row]

    @classmethod
    def of(cls, prompt_of_row: Sequence[int], device: torch.device) -> Seats:
        """The seats of rows whose prompts have these numbers: all of 0, 1, … are there."""
        each = max(Counter(prompt_of_row).values())
        taken: Counter[int] = Counter()
        row_of_seat = [0] * (each * (max(prompt_of_row) + 1))
        seat_of_row = []
        for row, prompt in enumerate(prompt_of_row):
            seat = prompt * each + taken[prompt]
            taken[prompt] += 1
            row_of_seat[seat] = row
            seat_of_row.append(seat)
        in_order = row_of_seat == [*range(len(prompt_of_row))]
        return cls(
            each,
            torch.tensor(row_of_seat, device=device),
            torch.tensor(seat_of_row, device=device),
            in_order,
        )


class SharedLayer(DynamicLayer):
    """One layer's keys and values: those of the prompts, and those of the completions' own tokens.

    The latter are `keys` and `values`, of which the first `used` columns hold tokens. To the model
    this is a cache of the completions' tokens alone.
    """

    def __init__(
        self,
        prompt_keys: Float[Tensor, "prompts kv_heads width dim"],
        prompt_values: Float[Tensor, "prompts kv_heads width value_dim"],
        rows: int,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prompt_keys, self.prompt_values = prompt_keys, prompt_values
        self.dtype, self.device, self.is_initialized = prompt_keys.dtype, prompt_keys.device, True
        self.keys, self.values = (
            of.new_zeros(rows, of.shape[1], ROOM, of.shape[3])
            for of in (prompt_keys, prompt_values)
        )
        self.used = 0

    def update(
        self,
        key_states: Float[Tensor, "rows kv_heads 1 dim"],
        value_states: Float[Tensor, "rows kv_heads 1 value_dim"],
        *_: Any,  # what some models tell their caches
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """Put one token a row into the next column; gives the whole buffers."""
        keys, values = self.own
        keys[:, :, self.used] = key_states.squeeze(2)
        values[:, :, self.used] = value_states.squeeze(2)
        self.used += 1
        return keys, values

    @property
    def room(self) -> int:
        """Columns of the buffers."""
        assert self.keys is not None
        return self.keys.shape[2]

    def grow(self) -> None:
        """Room for `ROOM` more tokens."""
        self.keys, self.values = (F.pad(of, (0, 0, 0, ROOM)) for of in self.own)

    def keep_rows(self, rows: Int[Tensor, " stay"], first: int) -> None:
        """Go on with these completions, without the columns before `first`."""
        self.keys, self.values = (of[:, :, first:].index_select(0, rows) for of in self.own)
        self.used -= first

    def keep_prompts(self, prompts: Int[Tensor, " stay"], width: int) -> None:
        """Go on with these prompts, the longest of which has `width` tokens."""
        self.prompt_keys, self.prompt_values = (
            of[:, :, -width:].index_select(0, prompts)
            for of in (self.prompt_keys, self.prompt_values)
        )

    def add(self, keys: Tensor, values: Tensor, rows: int, width: int) -> None:
        """More prompts, all of them now so wide, and `rows` completions of them without tokens."""
        self.prompt_keys, self.prompt_values = (
            torch.cat([as_wide(of, width, dim=2) for of in both])
            for both in ((self.prompt_keys, keys), (self.prompt_values, values))
        )
        self.keys, self.values = (
            torch.cat([of, of.new_zeros(rows, *of.shape[1:])]) for of in self.own
        )

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        """The completions' buffers."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens a completion."""
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of a mask, and where they begin."""
        return self.used + query_length, 0


@dataclass(frozen=True)
class Reading:
    """What attention needs to know of the rows that are read on.

    `hidden` says what a seat does not see: columns of the prompts, then of the completions.
    """

    layers: Sequence[SharedLayer]
    seats: Seats
    hidden: Bool[Tensor, "prompts 1 each 1 columns"]


# What this thread is reading.
_reading: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def reading(now: Reading) -> Iterator[None]:
    """While open, this thread's models read these rows on."""
    token = _reading.set(now)
    try:
        yield
    finally:
        _reading.reset(token)


def reading_now() -> Reading | None:
    """What this thread is reading on."""
    return _reading.get()


def shared_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "rows heads queries dim"],
    key: Float[Tensor, "rows kv_heads keys dim"],
    value: Float[Tensor, "rows kv_heads keys value_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,  # what transformers passes to every attention function
) -> tuple[Float[Tensor, "rows queries heads value_dim"], None]:
    """Attention of one new token a row to its prompt and its own tokens; of all else as usual.

    The signature is that of transformers' attention functions. Raises ValueError for a model that
    does more with its keys or its mask than what the cache gave it.
    """
    now = reading_now()
    if now is None:
        return decode_attention(module, query, key, value, attention_mask, scaling, **others)
    layer = now.layers[cast("int", module.layer_idx)]
    if key is not layer.keys or value is not layer.values:
        raise ValueError("the model does not attend to what its cache gave it")
    if attention_mask is not None or others.get("position_bias") is not None:
        raise ValueError("the model has a mask of its own, which knows nothing of the prompts")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _attend(query, layer, now.seats, now.hidden, scale)
    return out[:, None], None


def _attend(
    query: Float[Tensor, "rows heads 1 dim"],
    layer: SharedLayer,
    seats: Seats,
    hidden: Bool[Tensor, "prompts 1 each 1 columns"],
    scale: float,
) -> Float[Tensor, "rows heads value_dim"]:
    """Scores of both parts in the order of seats, one softmax over them, and both parts' values."""
    rows, heads, _, dim = query.shape
    keys, values = layer.own
    prompts, kv_heads, width, value_dim = layer.prompt_values.shape
    each, group = seats.each, heads // kv_heads
    folded = query.reshape(rows, kv_heads, group, dim)
    # By prompt and head: the queries of all of a prompt's seats meet its keys in one product.
    seated = seats.seated(folded).view(prompts, each, kv_heads, group, dim).transpose(1, 2)
    to_prompts = seated.reshape(prompts, kv_heads, each * group, dim) @ layer.prompt_keys.mT
    to_own = seats.seated(folded @ keys.mT)
    scores = torch.cat(
        [
            to_prompts.view(prompts, kv_heads, each, group, width),
            to_own.view(prompts, each, kv_heads, group, layer.room).transpose(1, 2),
        ],
        dim=-1,
    )
    scores = (scores.float() * scale).masked_fill_(hidden, -torch.inf)
    weights = scores.softmax(-1).to(values.dtype)
    on_prompts = weights[..., :width].reshape(prompts, kv_heads, each * group, width)
    from_prompts = (on_prompts @ layer.prompt_values).view(
        prompts, kv_heads, each, group, value_dim
    )
    from_prompts = from_prompts.transpose(1, 2).reshape(prompts * each, heads, value_dim)
    on_own = (
        weights[..., width:].transpose(1, 2).reshape(prompts * each, kv_heads, group, layer.room)
    )
    from_own = seats.by_row(on_own) @ values
    return seats.by_row(from_prompts) + from_own.view(rows, heads, value_dim)


def whole_rows(
    now: Reading, module: torch.nn.Module
) -> tuple[
    Float[Tensor, "rows kv_heads columns dim"],
    Float[Tensor, "rows kv_heads columns value_dim"],
    Bool[Tensor, "rows 1 1 columns"],
]:
    """Keys, values and what is seen of them, as a cache of whole rows would have them."""
    layer = now.layers[cast("int", module.layer_idx)]
    prompt_of_row = now.seats.seat_of_row // now.seats.each
    keys, values = (
        torch.cat([of_prompts[prompt_of_row], own], dim=2)
        for of_prompts, own in zip((layer.prompt_keys, layer.prompt_values), layer.own, strict=True)
    )
    seen = ~now.seats.by_row(now.hidden.squeeze(3).flatten(0, 2))
    return keys, values, seen[:, None, None]


AttentionInterface.register(SHARED_ATTENTION, shared_attention)
AttentionMaskInterface.register(SHARED_ATTENTION, sdpa_mask)


class SharedRows:
    """`TokenRows` of any lengths, each prompt of which is kept once.

    Prompts are padded on the left, and so are the tokens of completions that came later. Equal
    prompts that come together are read once. For a model whose attention is `SHARED_ATTENTION`.
    """

    def __init__(
        self, model: torch.nn.Module, prompts: Sequence[tuple[int, ...]], pad_token_id: int
    ) -> None:
        self._model, self._pad_token_id = model, pad_token_id
        read = read_prompts(model, prompts, pad_token_id)
        self.logits: Float[Tensor, "rows vocab"] = read.logits[read.which]
        self._prompt_of_row, self._mask = read.which, read.mask
        self._layers = [SharedLayer(k, v, len(prompts)) for k, v in read.keys_and_values]
        self._lengths = [len(prompt) for prompt in prompts]
        # The column of each completion's first token.
        self._starts = [0] * len(prompts)
        self._seat()

    @property
    def _used(self) -> int:
        """Columns of the completions that hold tokens."""
        return self._layers[0].used

    def advance(self, tokens: Int[Tensor, " rows"]) -> None:
        """One more token for every row."""
        if self._used == self._layers[0].room:
            for layer in self._layers:
                layer.grow()
            self._seat()
        self._now.hidden[..., self._mask.shape[1] + self._used] = False
        positions = torch.tensor(self._lengths, device=tokens.device)
        self._lengths = [length + 1 for length in self._lengths]
        with reading(self._now):
            cache = Cache(layers=[*self._layers])
            self.logits = next_logits(
                self._model, cache, tokens[:, None], None, positions[:, None], padded=False
            )

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; `logits` are theirs after the next `advance`."""
        kept = [self._prompt_of_row[i] for i in rows]
        stay = sorted(set(kept))
        number = {prompt: i for i, prompt in enumerate(stay)}
        self._prompt_of_row = [number[prompt] for prompt in kept]
        self._lengths = [self._lengths[i] for i in rows]
        starts = [self._starts[i] for i in rows]
        # Columns in which nobody is left go.
        first = min(starts)
        self._starts = [start - first for start in starts]
        device = self._mask.device
        of_rows = torch.tensor(rows, device=device)
        for layer in self._layers:
            layer.keep_rows(of_rows, first)
        if len(stay) < len(self._mask):
            of_prompts = torch.tensor(stay, device=device)
            mask = self._mask[of_prompts]
            width = int(mask.sum(-1).max())
            self._mask = mask[:, -width:]
            for layer in self._layers:
                layer.keep_prompts(of_prompts, width)
        self._seat()

    def add(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """More rows, after those that are there; `logits` are of all."""
        read = read_prompts(self._model, prompts, self._pad_token_id)
        width = max(self._mask.shape[1], read.mask.shape[1])
        for layer, (keys, values) in zip(self._layers, read.keys_and_values, strict=True):
            layer.add(keys, values, len(prompts), width)
        self._prompt_of_row = [
            *self._prompt_of_row,
            *(len(self._mask) + which for which in read.which),
        ]
        self._mask = torch.cat([as_wide(mask, width, dim=1) for mask in (self._mask, read.mask)])
        self._lengths += [len(prompt) for prompt in prompts]
        self._starts += [self._used] * len(prompts)
        self.logits = torch.cat([self.logits, read.logits[read.which]])
        self._seat()

    def _seat(self) -> None:
        """Say anew who reads what: after rows or columns have come or gone."""
        device, room = self._mask.device, self._layers[0].room
        seats = Seats.of(self._prompt_of_row, device)
        column = torch.arange(room, device=device)
        starts = torch.tensor(self._starts, device=device)[:, None]
        own = (column < starts) | (column >= self._used)
        own = seats.seated(own).view(len(self._mask), seats.each, room)
        prompts = (self._mask == 0)[:, None].expand(-1, seats.each, -1)
        hidden = torch.cat([prompts, own], dim=-1)[:, None, :, None]
        self._now = Reading(self._layers, seats, hidden)
