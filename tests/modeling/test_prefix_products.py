"""Attention by products against a loop over single queries, and against torch's kernel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neat_align.modeling import prefix_products, shared_prefix
from neat_align.modeling.packing import PackedRows, pack_rows
from neat_align.modeling.prefix_products import product_attention

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 3, 5
SCALE = 0.7
# Prompts of unequal lengths with unequal numbers of completions; one of them feeds nothing, and one
# has more queries than it has prompt.
LENGTHS = [(6, [4, 1, 7]), (2, [5]), (9, [])]


def rows_of(lengths: list[tuple[int, list[int]]]) -> PackedRows:
    prompts = [[1] * n for n, _ in lengths]
    return pack_rows(prompts, [[[1] * n for n in answers] for _, answers in lengths])


def inputs(rows: PackedRows, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    flat, generator = rows.input_ids.shape[1], torch.Generator().manual_seed(0)
    shapes = ((flat, HEADS, DIM), (flat, KV_HEADS, DIM), (flat, KV_HEADS, VALUE_DIM))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[tuple[int, list[int]]]
) -> Tensor:
    """Each query alone, over the places that its own row would have had before it."""
    seen: list[list[int]] = []
    for prompt, answers in lengths:
        first = len(seen)
        own = list(range(first, first + prompt))
        seen += [own[: i + 1] for i in range(prompt)]
        for n in answers:
            start = len(seen)
            seen += [own + list(range(start, start + i + 1)) for i in range(max(0, n - 1))]
    out = []
    for place, visible in enumerate(seen):
        heads = []
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            scores = torch.stack([query[place, head] @ key[j, kv] for j in visible]) * SCALE
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(w * value[j, kv] for w, j in zip(weights, visible, strict=True)))
        out.append(torch.stack([torch.as_tensor(h) for h in heads]))
    return torch.stack(out)


@pytest.mark.parametrize("scores", [1, 40, 200, 2**20])
def test_values_and_gradients_are_those_of_single_queries(
    scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of one query, of some of a row, of some rows, of all."""
    monkeypatch.setattr(prefix_products, "BLOCK_SCORES", scores)
    monkeypatch.setattr(prefix_products, "LEAST_QUERIES", 1)
    rows = rows_of(LENGTHS)
    given = inputs(rows)
    ours, theirs = product_attention(*given, rows.layout, SCALE), one_by_one(*given, LENGTHS)
    torch.testing.assert_close(ours, theirs)
    flow = torch.linspace(-1, 2, ours.numel(), dtype=torch.float64).view_as(ours)
    found = torch.autograd.grad((ours * flow).sum(), given)
    expected = torch.autograd.grad((theirs * flow).sum(), given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck() -> None:
    rows = rows_of([(3, [3, 2]), (2, [4])])
    assert torch.autograd.gradcheck(
        lambda q, k, v: product_attention(q, k, v, rows.layout, SCALE), inputs(rows)
    )


def test_by_hand() -> None:
    """A prompt token and a completion that feeds one: keys 0 and ln 3, so weights 1/4, 3/4."""
    rows = rows_of([(1, [2])])
    query, key = torch.ones(2, 1, 1), torch.tensor([0.0, math.log(3)]).view(2, 1, 1)
    value = torch.tensor([4.0, 8.0]).view(2, 1, 1)
    out = product_attention(query, key, value, rows.layout, 1.0)
    assert out.flatten().tolist() == pytest.approx([4.0, 7.0])


@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    scores=st.sampled_from([1, 30, 100, 2**20]),
    least=st.sampled_from([1, 3]),
)
@settings(max_examples=40, deadline=None)
def test_blocks_cover_each_query_once_and_stay_small(
    lengths: list[tuple[int, list[int]]], scores: int, least: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prefix_products, "BLOCK_SCORES", scores)
        patched.setattr(prefix_products, "LEAST_QUERIES", least)
        for piece in prefix_products._pieces(rows_of(lengths).layout):
            count, tokens = piece.own.shape
            keys = piece.before.shape[1] + tokens
            seen = torch.zeros(count, tokens, dtype=torch.long)
            for rows, queries in piece.blocks(HEADS):
                block = seen[rows, queries]
                block += 1
                assert block.numel() <= least or block.numel() * keys * HEADS <= scores
            assert (seen == 1).all()


def test_keys_that_have_much_in_common_lose_nothing_in_half_precision() -> None:
    """Scores near 80 are rounded to quarters in bf16; their differences are below 1."""
    rows = rows_of([(30, [20, 20])])
    query, key, value = (x.detach() for x in inputs(rows, torch.float32))
    query, key = query * 0.1 + 5, key * 0.1 + 8
    query, key, value = (x.bfloat16() for x in (query, key, value))
    expected = product_attention(query.double(), key.double(), value.double(), rows.layout, SCALE)
    error = (product_attention(query, key, value, rows.layout, SCALE).double() - expected).abs()
    assert error.max() < 0.02


def test_under_autocast_it_computes_in_autocasts_type_and_keeps_it() -> None:
    rows = rows_of(LENGTHS)
    given = inputs(rows, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = product_attention(*given, rows.layout, SCALE)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in given)
    exact = product_attention(*given, rows.layout, SCALE)
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("small", "other", "by_products"),
    # A window wider than the row and a cap far above the scores change no number. The row has 30
    # places.
    [
        (30, {}, True),
        (31, {}, False),
        (30, {"sliding_window": 1000}, False),
        (30, {"softcap": 1e9}, False),
    ],
    ids=["plain", "small", "window", "cap"],
)
def test_plain_attention_on_a_cpu_goes_by_products(
    small: int, other: dict[str, Any], by_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefix, "SMALL_ROW", small)
    rows = rows_of(LENGTHS)
    assert rows.input_ids.shape[1] == 30
    query, key, _ = (x.detach() for x in inputs(rows))
    taken = []

    def noted(*given: Any) -> Tensor:
        taken.append(True)
        return product_attention(*given)

    monkeypatch.setattr(shared_prefix, "product_attention", noted)
    heads_first = [x.transpose(0, 1)[None] for x in (query, key, key)]
    out, _ = shared_prefix.shared_prefix_attention(
        torch.nn.Identity(),
        *heads_first,
        None,
        shared_prefix=rows.layout,
        scaling=SCALE,
        **other,
    )
    assert bool(taken) is by_products
    expected = one_by_one(query, key, key, LENGTHS)
    torch.testing.assert_close(
        out[0], expected, atol=1e-5, rtol=1e-5
    )  # the softmax of a cap is fp32


def test_nothing_is_read_back_from_the_device() -> None:
    """On a GPU each such read would wait for all that it was asked for."""
    rows = rows_of(LENGTHS)
    given = inputs(rows)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        product_attention(*given, rows.layout, SCALE).sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert "aten::bmm" in names
    assert not names & {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"}
