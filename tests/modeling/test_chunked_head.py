"""The chunked head against the plain formula: values, gradients, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neat_align.modeling import chunked_head
from neat_align.modeling.chunked_head import LogitTail, chosen_logprobs

N, DIM, VOCAB = 7, 5, 11
TAILS = [LogitTail(), LogitTail(scale=0.5), LogitTail(cap=2.0), LogitTail(scale=3.0, cap=1.5)]


def inputs(
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((N, DIM), (VOCAB, DIM), (VOCAB,))
    )
    ids = torch.randint(VOCAB, (N,), generator=generator)
    states, weight, bias = (x.to(dtype).requires_grad_() for x in (states, weight, bias))
    return states, weight, bias, ids


def plain(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    tail: LogitTail,
) -> torch.Tensor:
    logits = torch.stack([weight @ row for row in states])
    logits = (logits if bias is None else logits + bias) * tail.scale
    if tail.cap is not None:
        logits = tail.cap * (logits / tail.cap).tanh()
    return torch.stack([row.log_softmax(-1)[i] for row, i in zip(logits, ids, strict=True)])


def test_by_hand() -> None:
    """Logits (0, ln 3): probabilities 1/4 and 3/4."""
    states, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [1.0986122886681098]])
    found = chosen_logprobs(states, weight, None, torch.tensor([0, 1]), LogitTail(), 2)
    assert found.tolist() == pytest.approx([-1.3862943611, -0.2876820724])


# Bytes that are kept of gradients at the product: none, so that it is made again; those of two
# chunks of 1 or 3 states, which are multiplied together; or all.
KEPT = pytest.mark.parametrize(
    "kept", [0, 6 * VOCAB * 8 + 1, 2**20], ids=["made-again", "together", "kept"]
)


@KEPT
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_the_formula(
    tail: LogitTail, rows: int, with_bias: bool, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_head, "KEPT_BYTES", kept)
    states, weight, bias, ids = inputs()
    given = bias if with_bias else None
    wanted = [states, weight, *([bias] if with_bias else [])]
    ours, theirs = (
        chosen_logprobs(states, weight, given, ids, tail, rows),
        plain(states, weight, given, ids, tail),
    )
    torch.testing.assert_close(ours, theirs)
    flow = torch.linspace(-1, 2, N, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours @ flow, wanted),
        torch.autograd.grad(theirs @ flow, wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@KEPT
@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck(tail: LogitTail, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_head, "KEPT_BYTES", kept)
    states, weight, bias, ids = inputs()
    assert torch.autograd.gradcheck(
        lambda s, w, b: chosen_logprobs(s, w, b, ids, tail, 3), (states, weight, bias)
    )


@KEPT
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("frozen", [False, True])
def test_rows_of_a_chunk_are_gone_through_in_blocks(
    tail: LogitTail, kept: int, monkeypatch: pytest.MonkeyPatch, *, frozen: bool
) -> None:
    """Of 2 of a chunk's 5 rows: to the bit what a whole chunk gives."""
    monkeypatch.setattr(chunked_head, "KEPT_BYTES", kept)

    def found(block: int) -> list[torch.Tensor]:
        monkeypatch.setattr(chunked_head, "CPU_BLOCK_LOGITS", block)
        states, weight, bias, ids = inputs(torch.float32)
        weight.requires_grad_(not frozen)
        bias.requires_grad_(not frozen)
        with torch.no_grad():
            scored = chosen_logprobs(states, weight, bias, ids, tail, 5)
        out = chosen_logprobs(states, weight, bias, ids, tail, 5)
        learns = [x for x in (states, weight, bias) if x.requires_grad]
        return [scored, out, *torch.autograd.grad(out @ torch.arange(1.0, N + 1), learns)]

    for one, other in zip(found(2 * VOCAB + 1), found(10**6), strict=True):
        assert torch.equal(one, other)


def test_a_block_is_one_row_at_least() -> None:
    assert len(chunked_head.blocks_of(torch.zeros(3, 2 * chunked_head.CPU_BLOCK_LOGITS))) == 3


@KEPT
def test_backward_can_run_twice(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_head, "KEPT_BYTES", kept)
    states, weight, _, ids = inputs()
    out = chosen_logprobs(states, weight, None, ids, LogitTail(), 3).sum()
    first, second = (torch.autograd.grad(out, states, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("rows", [3, 100])
def test_a_frozen_head_gives_the_same_gradient_and_does_not_run_again(
    tail: LogitTail, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, weight, bias, ids = inputs()
    flow = torch.linspace(-1, 2, N, dtype=torch.float64)
    trained = torch.autograd.grad(
        chosen_logprobs(states, weight, bias, ids, tail, rows) @ flow, states
    )[0]
    frozen = chosen_logprobs(states, weight.detach(), bias.detach(), ids, tail, rows)
    monkeypatch.setattr(chunked_head, "_final_logits", None)  # not to be called any more
    (frozen @ flow).backward()
    torch.testing.assert_close(states.grad, trained)
    assert weight.grad is None


def test_gradcheck_of_a_frozen_head() -> None:
    states, weight, bias, ids = inputs()
    head = weight.detach(), bias.detach()
    assert torch.autograd.gradcheck(
        lambda s: chosen_logprobs(s, *head, ids, LogitTail(scale=3.0, cap=1.5), 3), (states,)
    )


@pytest.mark.parametrize(
    ("limit", "products"), [(N * VOCAB * 4, 1), (N * VOCAB * 4 - 1, 2)], ids=["fits", "over"]
)
def test_what_fits_is_not_made_again(
    limit: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N · VOCAB fp32 numbers: one product with the head's weight, or two."""
    monkeypatch.setattr(chunked_head, "KEPT_BYTES", limit)
    made = []

    def counted(*given: Any) -> torch.Tensor:
        made.append(len(given[0]))
        return final_logits(*given)

    final_logits = chunked_head._final_logits
    monkeypatch.setattr(chunked_head, "_final_logits", counted)
    states, weight, _, ids = inputs(torch.float32)
    chosen_logprobs(states, weight, None, ids, LogitTail(), 3).sum().backward()
    assert sum(made) == products * N


@KEPT
def test_under_autocast_the_product_is_bf16_and_the_rest_fp32(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_head, "KEPT_BYTES", kept)
    states, weight, _, ids = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = chosen_logprobs(states, weight, None, ids, LogitTail(), 3)
    assert ours.dtype == torch.float32
    expected = (
        (states.bfloat16() @ weight.bfloat16().T)
        .float()
        .log_softmax(-1)
        .gather(-1, ids[:, None])
        .squeeze(-1)
    )
    # bf16 after the product would be off by 1e-2.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        frozen = chosen_logprobs(states, weight.detach(), None, ids, LogitTail(), 3)
    torch.testing.assert_close(
        torch.autograd.grad(frozen.sum(), states),
        torch.autograd.grad(ours.sum(), states, retain_graph=True),
        rtol=0.02,
        atol=0.01,
    )
    for a, b in zip(
        torch.autograd.grad(ours.sum(), [states, weight]),
        torch.autograd.grad(expected.sum(), [states, weight]),
        strict=True,
    ):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_nothing_gives_nothing() -> None:
    states, weight, _, ids = inputs()
    assert chosen_logprobs(states[:0], weight, None, ids[:0], LogitTail(), 3).shape == (0,)
