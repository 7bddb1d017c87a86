"""The contrast of two instructions at every token: hand numbers and properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neat_align.modeling.contrast import contrast_logprobs, mean_log_ratio

START = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
POSITIVE = torch.tensor([[0.6, 0.3, 0.1]]).double().log()
NEGATIVE = torch.tensor([[0.3, 0.3, 0.4]]).double().log()
RATIO = POSITIVE - NEGATIVE  # the logarithm of 2, 1, 1/4


def shares(*weights: float) -> Tensor:
    table = torch.tensor([weights]).double()
    return table / table.sum()


def test_the_ratio_moves_the_start_policy() -> None:
    torch.testing.assert_close(
        contrast_logprobs(START, RATIO, 1.0).exp(), shares(0.5 * 2, 0.3 * 1, 0.2 / 4)
    )
    torch.testing.assert_close(
        contrast_logprobs(START, RATIO, 0.5).exp(), shares(0.5 * math.sqrt(2), 0.3, 0.2 / 2)
    )


def test_only_plausible_tokens_are_moved_among_themselves() -> None:
    moved = contrast_logprobs(START, RATIO, 1.0, min_p=0.5).exp()
    # 0.2 is under half of 0.5: it stays, and the other two share 0.8 in the ratio 1.0 to 0.3.
    expected = torch.tensor([[0.8 / 1.3, 0.8 * 0.3 / 1.3, 0.2]]).double()
    torch.testing.assert_close(moved, expected)


def test_a_threshold_leaves_what_hardly_differs() -> None:
    # The mean of (ln 2, 0, −ln 4) under p0 is 0.5 ln 2 − 0.2 ln 4 = 0.1 ln 2.
    mean = 0.1 * math.log(2)
    high, middle, low = math.log(2) - mean, -mean, -math.log(4) - mean
    assert abs(middle) < 0.3 < high
    moved = contrast_logprobs(START, RATIO, 1.0, threshold=0.3).exp()
    expected = shares(0.5 * math.exp(high - 0.3), 0.3, 0.2 * math.exp(low + 0.3))
    torch.testing.assert_close(moved, expected)


def test_tokens_are_raised_and_none_is_pushed_down() -> None:
    mean = 0.1 * math.log(2)
    moved = contrast_logprobs(START, RATIO, 1.0, raise_only=True).exp()
    torch.testing.assert_close(moved, shares(0.5 * 2 / math.exp(mean), 0.3, 0.2))
    both = contrast_logprobs(START, RATIO, 1.0, threshold=0.3, raise_only=True).exp()
    torch.testing.assert_close(both, shares(0.5 * 2 / math.exp(mean + 0.3), 0.3, 0.2))


def test_pairs_are_averaged_and_each_is_clipped() -> None:
    other = torch.tensor([[0.2, 0.3, 0.5]]).double().log()
    both = mean_log_ratio([(POSITIVE, NEGATIVE), (other, NEGATIVE)])
    torch.testing.assert_close(both, (POSITIVE + other) / 2 - NEGATIVE)
    clipped = mean_log_ratio([(POSITIVE, NEGATIVE)], clip=1.0)
    torch.testing.assert_close(clipped, torch.tensor([[math.log(2), 0.0, -1.0]]).double())
    with pytest.raises(ValueError, match="a contrast needs a pair"):
        mean_log_ratio([])


logits = st.lists(st.floats(-8, 8), min_size=5, max_size=5)
alphas = st.floats(-2, 2)
shares_of_largest = st.sampled_from([0.0, 0.05, 0.5])
thresholds = st.sampled_from([0.0, 0.5])


def row(values: list[float]) -> Tensor:
    return torch.tensor([values]).double()


@given(logits, logits, logits, alphas, shares_of_largest, thresholds, st.floats(-5, 5))
def test_what_holds_for_all(
    start: list[float],
    positive: list[float],
    negative: list[float],
    alpha: float,
    least: float,
    threshold: float,
    constant: float,
) -> None:
    p0, good, bad = (row(x).log_softmax(-1) for x in (start, positive, negative))
    q = contrast_logprobs(p0, good - bad, alpha, least, threshold)
    torch.testing.assert_close(q.exp().sum(-1), torch.ones(1).double())
    if alpha == 0:
        torch.testing.assert_close(q, p0)
    same = contrast_logprobs(p0, good - bad + constant, alpha, least, threshold)
    torch.testing.assert_close(same, q)
    swapped = contrast_logprobs(p0, bad - good, -alpha, least, threshold)
    torch.testing.assert_close(swapped, q)
    if least:
        outside = p0 < p0.max() + math.log(least) - 1e-9
        assert torch.equal(q[outside], p0[outside])


def test_raising_works_in_both_directions() -> None:
    swapped = contrast_logprobs(START, -RATIO, 1.0, raise_only=True)
    torch.testing.assert_close(contrast_logprobs(START, RATIO, -1.0, raise_only=True), swapped)
    assert float(swapped[0, 2]) > float(START[0, 2])
