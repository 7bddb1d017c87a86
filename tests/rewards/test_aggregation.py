"""Several rewards as one number: by hand, beside TRL's own function, and in a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neat_align.errors import ConfigError
from neat_align.rewards.aggregation import normalized_sums
from neat_align.rewards.protocol import NamedReward, Unscorable
from neat_align.rounds.completions import read_groups
from neat_align.rounds.ranking import ordered_pairs
from small_rounds import PARAMS, Seeded, rows, run, tools
from small_trainer import config

EPSILON = 1e-4
SCORES = st.none() | st.floats(-100, 100)


def test_normalised_sums_by_hand() -> None:
    # Lengths 10, 20, 60 (mean 30, deviation √((400 + 100 + 900) / 2) = √700) and probabilities
    # 0.9, 0.1, None (mean 0.5, deviation √(2 · 0.16) = √0.32).
    first, second = 700**0.5 + EPSILON, 0.32**0.5 + EPSILON
    found = normalized_sums([(10.0, 0.9), (20.0, 0.1), (60.0, None)], (1.0, 2.0))
    assert found == pytest.approx(
        [-20 / first + 2 * 0.4 / second, -10 / first - 2 * 0.4 / second, 30 / first]
    )
    # The plain sum 11.8, 20.2, 60 is decided by the lengths alone; here the first gains on them.
    assert found[2] > found[0] > found[1]  # type: ignore[operator]


def test_what_says_nothing_adds_nothing() -> None:
    same = normalized_sums([(3.0, 1.0), (3.0, 2.0)], (1.0, 1.0))
    deviation = 0.5**0.5 + EPSILON
    assert same == pytest.approx([-0.5 / deviation, 0.5 / deviation])
    assert normalized_sums([(None, 7.0), (2.0, None)], (1.0, 1.0)) == [0.0, 0.0]
    assert normalized_sums([(None, 7.0), (None, 9.0)], (1.0, 0.0)) == [None, None]
    assert normalized_sums([], (1.0,)) == []


@given(
    st.integers(1, 3).flatmap(
        lambda k: st.tuples(
            st.lists(st.tuples(*[SCORES] * k), min_size=2, max_size=6),
            st.tuples(*[st.floats(-2, 2)] * k),
        )
    )
)
def test_it_is_what_trl_sums(given: tuple[list[tuple[float | None, ...]], Sequence[float]]) -> None:
    """TRL 1.16, GRPOTrainer._generate_and_score_completions, for one group."""
    components, weights = given
    nan = float("nan")
    per_func = torch.tensor(
        [[nan if v is None else v for v in row] for row in components], dtype=torch.float64
    )
    mean = torch.nanmean(per_func, dim=0)
    count = (~per_func.isnan()).sum(dim=0)
    variance = torch.nanmean((per_func - mean) ** 2, dim=0) * count / (count - 1)
    scaled = (per_func - mean) / (variance.sqrt() + EPSILON)
    expected = (scaled * torch.tensor(weights, dtype=torch.float64)).nansum(dim=1)
    for i, value in enumerate(normalized_sums(components, weights)):
        counted = [v for v, w in zip(components[i], weights, strict=True) if w != 0]
        if all(v is None for v in counted):
            assert value is None
        else:
            assert value == pytest.approx(float(expected[i]), abs=1e-6, rel=1e-6)


def test_a_round_is_ranked_by_normalised_rewards_and_keeps_the_components(tmp_path: Path) -> None:
    def first_bytes(completions: Sequence[Any], **_: Any) -> list[Any]:
        # A scale a thousand times wider, which abstains now and then.
        scored = [1000.0 * ord(c[0]) if c else None for c in completions]
        return [
            Unscorable("begins with q") if c[:1] == "q" else s
            for c, s in zip(completions, scored, strict=True)
        ]

    def lengths(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(len(c)) for c in completions]

    rewards = (NamedReward("bytes", first_bytes, 1.0), NamedReward("lengths", lengths, 3.0))
    params = replace(PARAMS, num_plain=3, aggregation="normalize_then_sum")
    t = tools(Seeded(), rewards=rewards, aggregation="normalize_then_sum", on_bad_row="skip")
    run(tmp_path, t, p=params, data=rows(20))
    found = read_groups(tmp_path / "groups.parquet")
    assert len(found) == 20
    seen = []
    for group in found:
        kept = [c for c in group.completions if c.text[:1] != "q"]
        by_hand = normalized_sums([c.reward_components for c in kept], (1.0, 3.0))
        assert [c.reward for c in kept] == pytest.approx(by_hand)
        assert all(c.reward is None for c in group.completions if c not in kept)
        assert all(c.reward_components[1] == len(c.text) for c in kept)
        seen += [r for r in by_hand if r is not None]
        raw = [c.reward_components[0] for c in kept]
        if None not in raw and ordered_pairs(raw, 0.0) != ordered_pairs(by_hand, 0.0):
            seen.append(1e9)  # somewhere the order is another than that of the wide scale
    assert 1e9 in seen
    assert abs(sum(r for r in seen if r != 1e9)) < 1e-6


def test_the_option_is_trls_and_says_what_it_cannot_go_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of sum, normalize_then_sum"):
        config(tmp_path, multi_objective_aggregation="sum_then_normalize")
    with pytest.raises(ConfigError, match="rank_by is origin, which looks at no reward"):
        config(tmp_path, multi_objective_aggregation="normalize_then_sum", rank_by="origin")
    plain = PARAMS.deciding()
    assert "aggregation" not in plain  # unfinished rounds of earlier versions go on
    assert replace(PARAMS, aggregation="normalize_then_sum").deciding() == {
        **plain,
        "aggregation": "normalize_then_sum",
    }
