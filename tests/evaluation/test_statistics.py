"""Means, intervals, effect size: by hand, against the normal approximation, by how often an
interval holds the truth, and in how much memory.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind

from neat_align.evaluation.statistics import (
    cohens_d,
    crossed_bootstrap,
    mean_interval,
    mean_of,
    paired_bootstrap,
    win_rate,
)

NAN = math.nan

# ---- the interval --------------------------------------------------------------------------------


def test_the_mean_difference_is_over_prompts_that_have_both_numbers() -> None:
    found = paired_bootstrap([1.0, None, 3.0, 0.0], [2.0, 5.0, None, 3.0])
    assert found is not None
    assert found.delta == 2.0  # of 1 and 3
    assert (found.low, found.high) == (1.0, 3.0)


def test_the_interval_is_the_same_for_the_same_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (
        torch.randn(40, generator=generator, dtype=torch.float64).tolist() for _ in range(2)
    )
    found = [paired_bootstrap(before, after, seed=seed, resamples=500) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0] != found[2]
    other_way = paired_bootstrap(after, before, seed=0, resamples=500)
    assert found[0] is not None
    assert other_way is not None
    assert (other_way.delta, other_way.low, other_way.high) == pytest.approx(
        (-found[0].delta, -found[0].high, -found[0].low)
    )


def test_the_interval_is_about_as_wide_as_the_normal_one() -> None:
    differences = (
        torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 + 1
    )
    found = paired_bootstrap([0.0] * 400, differences.tolist())
    assert found is not None
    half = 1.96 * float(differences.std(correction=0)) / 20
    assert found.delta == pytest.approx(float(differences.mean()))
    assert found.low == pytest.approx(found.delta - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.delta + half, abs=0.1 * half)


def test_the_interval_holds_the_true_difference_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(5)
    covered = 0
    for trial in range(200):
        # Paired: what prompts share cancels out.
        shared = torch.randn(50, generator=generator, dtype=torch.float64) * 10
        after = shared + 0.5 + torch.randn(50, generator=generator, dtype=torch.float64)
        found = paired_bootstrap(shared.tolist(), after.tolist(), seed=trial, resamples=400)
        assert found is not None
        covered += found.low <= 0.5 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("before", [[], [None, 1.0]])
def test_no_pair_of_numbers_no_interval(before: list[float | None]) -> None:
    after: list[float | None] = [1.0, None][: len(before)]
    assert paired_bootstrap(before, after) is None
    assert win_rate(before, after) is None


def test_one_prompt_or_equal_differences_have_a_point_for_an_interval() -> None:
    for before, after in (([1.0], [3.0]), ([1.0, 2.0, 3.0], [3.0, 4.0, 5.0])):
        found = paired_bootstrap(before, after, resamples=50)
        assert found is not None
        assert (found.delta, found.low, found.high) == (2.0, 2.0, 2.0)


def test_batches_and_a_seed_below_zero_change_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(6).standard_normal(30).tolist()
    together = mean_interval(values, seed=-3, resamples=200)
    monkeypatch.setattr("neat_align.evaluation.statistics._BATCH_NUMBERS", 7 * 30)
    assert mean_interval(values, seed=-3, resamples=200) == pytest.approx(together)


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError):
        win_rate([1.0], [1.0, 2.0])


def test_wins_ties_and_losses() -> None:
    assert win_rate([1.0, 1.0, 1.0, None, 5.0], [2.0, 1.0, 0.0, 9.0, 6.0]) == {
        "win": 0.5,
        "tie": 0.25,
        "lose": 0.25,
    }


def test_means_are_over_what_is_there() -> None:
    assert mean_of([1.0, None, 2.0]) == 1.5
    assert mean_of([None]) is None
    assert mean_of([]) is None


def test_cohens_d_needs_numbers_and_a_spread() -> None:
    assert cohens_d([1.0], [0.0, 1.0]) is None
    assert cohens_d([1.0, 1.0], [0.0, 0.0]) is None
    # Variances 2 and 8 with 1 and 2 degrees of freedom: pooled 6.
    assert cohens_d([1.0, 3.0], [-4.0, 0.0, 4.0 / 4 - 1.0 + 4.0]) == pytest.approx(
        2.0 / math.sqrt((2.0 + 2 * 16.0) / 3)
    )


def test_cohens_d_is_what_the_t_statistic_says() -> None:
    rng = np.random.default_rng(4)
    positive, negative = rng.normal(1, 2, 40), rng.normal(0, 3, 25)
    t = ttest_ind(positive, negative).statistic
    assert cohens_d(positive.tolist(), negative.tolist()) == pytest.approx(
        t * math.sqrt(1 / 40 + 1 / 25)
    )


# ---- seeds and prompts ---------------------------------------------------------------------------


def simulated(
    rng: np.random.Generator, seeds: int, prompts: int, truth: float, between_seeds: float
) -> Any:
    """Differences of a method over base: what a seed and what a prompt does to it, and noise."""
    noise = 0.3 * rng.standard_normal((seeds, prompts))
    return (
        truth
        + between_seeds * rng.standard_normal((seeds, 1))
        + rng.standard_normal((1, prompts))
        + noise
    )


def test_the_bootstrap_is_the_same_every_time_and_sees_both_seeds_and_prompts() -> None:
    rng = np.random.default_rng(1)
    table = simulated(rng, 4, 30, 0.5, 0.0)
    assert crossed_bootstrap(table) == crossed_bootstrap(table.copy())
    value, low, high = crossed_bootstrap(table)
    assert value == pytest.approx(float(table.mean()))
    assert low is not None
    assert high is not None
    assert low < value < high
    # Prompts alone, by the normal approximation: about this wide.
    half = 1.96 * float(table.mean(axis=0).std()) / math.sqrt(30)
    assert high - low == pytest.approx(2 * half, rel=0.25)
    # Seeds that differ are doubt, too: the same prompts, with seeds apart.
    apart = table + np.array([[-2.0], [-1.0], [1.0], [2.0]])
    wide = crossed_bootstrap(apart)
    assert wide[0] == pytest.approx(value)
    assert wide[1] is not None
    assert wide[2] is not None
    assert wide[2] - wide[1] > 2 * (high - low)


@pytest.mark.parametrize(("seeds", "between_seeds"), [(3, 0.0), (8, 0.4)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(
    seeds: int, between_seeds: float
) -> None:
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(200):
        _, low, high = crossed_bootstrap(
            simulated(rng, seeds, 25, 0.5, between_seeds), resamples=300
        )
        assert low is not None
        assert high is not None
        covered += low <= 0.5 <= high
        widths.append(high - low)
    assert 0.86 <= covered / 200 <= 0.99
    exact = 2 * 1.96 * math.sqrt(1 / 25 + between_seeds**2 / seeds + 0.3**2 / (25 * seeds))
    # It does not cover by being wide.
    assert float(np.mean(widths)) == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("missing", [False, True])
def test_the_intercept_is_the_difference_at_equal_length(missing: bool) -> None:
    """Reward goes up by 0.05 a token, and by 0.3 at equal length; answers are 8 tokens longer."""
    rng = np.random.default_rng(2)
    lengths = 8 + 4 * rng.standard_normal((3, 200))
    table = 0.3 + 0.05 * lengths + 0.1 * rng.standard_normal((3, 200))
    if missing:
        gone = rng.random(table.shape) < 0.3
        table = np.where(gone, NAN, table)
        # How long an answer without a reward is says nothing.
        lengths = np.where(gone, 1e6, lengths)
    value, low, high = crossed_bootstrap(table, lengths)
    assert value == pytest.approx(0.3, abs=0.03)
    assert low is not None
    assert high is not None
    assert low < 0.3 < high < 0.4
    naive = crossed_bootstrap(table)
    assert naive[1] is not None
    assert naive[1] > 0.5


def test_the_intercept_by_hand() -> None:
    """(x, y) = (0, 1), (2, 5): y = 1 + 2x. Equal lengths have no slope: the mean."""
    table = np.array([[1.0, 5.0]])
    assert crossed_bootstrap(table, np.array([[0.0, 2.0]]))[0] == pytest.approx(1.0)
    assert crossed_bootstrap(table, np.array([[3.0, 3.0]])) == (3.0, 1.0, 5.0)


@pytest.mark.filterwarnings("error")
def test_entries_that_are_missing_are_left_out() -> None:
    # Also where a draw holds nothing at all.
    assert crossed_bootstrap(np.array([[2.0, NAN], [NAN, 2.0]])) == (2.0, 2.0, 2.0)
    value, low, high = crossed_bootstrap(np.array([[1.0, NAN, 3.0], [1.0, 2.0, NAN]]))
    assert value == 1.75
    assert low == 1.0
    assert high == 3.0
    nothing = np.full((2, 3), NAN)
    assert (
        crossed_bootstrap(nothing)
        == crossed_bootstrap(nothing, np.ones((2, 3)))
        == (None, None, None)
    )


# ---- memory and imports --------------------------------------------------------------------------

ROWS = 100_000


@pytest.mark.parametrize(
    "interval",
    [
        lambda values: mean_interval(values.tolist(), resamples=400),
        lambda values: crossed_bootstrap(values.reshape(1, -1), resamples=200),
        lambda values: crossed_bootstrap(
            values.reshape(2, -1), values.reshape(2, -1) + 1, resamples=200
        ),
    ],
    ids=["mean", "seeds and prompts", "at equal length"],
)
def test_memory_does_not_grow_with_resamples(interval: Callable[[Any], Any]) -> None:
    """All resamples at once would be 160 MB of indices and 160 MB of numbers, or more."""
    values = np.random.default_rng(0).standard_normal(ROWS)
    interval(values[:100])  # what the first call imports does not count
    tracemalloc.start()
    try:
        interval(values)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40e6


def test_neither_torch_nor_scipy_is_loaded_before_an_interval_is_asked_for() -> None:
    code = (
        "import sys; from neat_align.evaluation import statistics; "
        "print([m for m in ('torch', 'scipy') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
