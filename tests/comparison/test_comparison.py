"""Tables of several methods from made-up evaluations, with numbers that can be derived by hand."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from neat_align.cli.tables import comparison_table
from neat_align.comparison.equal_kl import common_kl, values_at_kl
from neat_align.comparison.outcomes import Point, Run, collapse_reason
from neat_align.comparison.summary import summarise

NAN = math.nan


def point(number: int, kl: float | None, values: list[float | None], **changes: Any) -> Point:
    n = len(values)
    evaluation: dict[str, Any] = {
        "prompts": ["Q"] * n,
        "rewards": values,
        "judges": {},
        "lengths": [10.0] * n,
        "clipped": [0.5] * n,
        "distinct2": 0.5,
        "perplexity": 10.0,
        "kl": kl,
        "entropy": 1.0,
        "contrast": {"plain": 0.0},
        "kl_by_prompt": [kl] * n if kl else [],
        "repetition": [0.0] * n,
        "refusals": [0.0] * n,
        "pair_accuracy": [1.0, None, 0.0][:n],
    }
    return Point(number, {**evaluation, **changes}, {"loss/lm": 2.0})


START = point(0, None, [0.0, 0.0])


def run_of(
    *points: Point,
    method: str = "a",
    strength: str = "s",
    seed: int = 0,
    start: Point = START,
    **more: Any,
) -> Run:
    return Run(method, strength, seed, start, points, **more)


# ---- collapse ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"distinct2": 0.4}, None),  # 80 % is the limit itself
        ({"distinct2": 0.39}, "distinct-2 is 78% of the start's"),
        ({"distinct2": None}, "distinct-2 is 0% of the start's"),
        ({"perplexity": 13.0}, None),
        ({"perplexity": 13.2}, "perplexity of the reference answers is 132% of the start's"),
        ({"perplexity": None}, None),
        ({"lengths": [5.0, 5.0]}, None),
        ({"lengths": [4.0, 5.0]}, "answers are 45% as long as the start's"),
        ({"lengths": [20.0, 20.0]}, None),
        ({"lengths": [21.0, 20.0]}, "answers are 205% as long as the start's"),
        ({"repetition": [0.2, 0.2]}, None),
        ({"repetition": [0.2, 0.3]}, "25% more of an answer repeats itself"),
        # No collapse, only bad.
        (
            {
                "rewards": [-9.0, -9.0],
                "clipped": [1.0, 1.0],
                "refusals": [1.0, 1.0],
                "entropy": 0.0,
            },
            None,
        ),
    ],
    ids=str,
)
def test_a_policy_far_from_its_start_has_collapsed(
    changes: dict[str, Any], reason: str | None
) -> None:
    assert collapse_reason(point(1, 0.1, [1.0, 1.0], **changes), START) == reason
    assert run_of(point(1, 0.1, [1.0, 1.0], **changes)).collapsed == reason


def test_collapse_is_measured_against_the_start_and_at_the_end() -> None:
    repeats = point(0, None, [0.0, 0.0], repetition=[0.5, 0.5])
    assert collapse_reason(point(1, 0.1, [1.0, 1.0], repetition=[0.65, 0.65]), repeats) is None
    bare = point(0, None, [0.0, 0.0], distinct2=None, perplexity=None)
    assert collapse_reason(point(1, 0.1, [1.0, 1.0], perplexity=99.0), bare) is None
    bad, good = point(1, 0.1, [1.0, 1.0], distinct2=0.1), point(2, 0.1, [1.0, 1.0])
    assert run_of(bad, good).collapsed is None
    assert run_of(good, bad).collapsed == "distinct-2 is 20% of the start's"
    assert run_of().collapsed is None


def test_a_run_that_broke_down_has_collapsed_whatever_its_last_policy_says() -> None:
    assert run_of(point(1, 0.1, [1.0, 1.0]), broke="the loss is nan").collapsed == "the loss is nan"
    assert run_of(broke="0 of 5 prompts").collapsed == "0 of 5 prompts"


# ---- equal KL ------------------------------------------------------------------------------------

CURVE = run_of(point(1, 0.01, [1.0, 2.0]), point(2, 0.04, [2.0, 6.0]))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.0025, [0.5, 1.0]),  # √: 0.05 is half way from 0 to 0.1
        (0.01, [1.0, 2.0]),
        (0.0225, [1.5, 4.0]),  # √: 0.15 is half way from 0.1 to 0.2
        (0.0144, [1.2, 2.8]),  # √: 0.12, a fifth
        (0.04, [2.0, 6.0]),
        (0.0401, None),  # not beyond the last point
    ],
)
def test_a_curve_is_read_between_two_rounds_in_the_root_of_the_kl(
    target: float, expected: list[float] | None
) -> None:
    found = values_at_kl(CURVE, "reward", target)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found.tolist() == pytest.approx(expected)


def test_a_curve_ends_where_the_policy_collapses() -> None:
    run = run_of(
        point(1, 0.01, [1.0, 2.0]),
        point(2, 0.04, [9.0, 9.0], distinct2=0.1),
        point(3, 0.09, [3.0, 3.0]),
    )
    assert values_at_kl(run, "reward", 0.0025) is not None
    for target in (0.0225, 0.04, 0.05):
        assert values_at_kl(run, "reward", target) is None


def test_a_curve_that_turns_back_is_read_where_it_first_passes() -> None:
    run = run_of(point(1, 0.04, [2.0, 2.0]), point(2, 0.01, [7.0, 7.0]))
    found = values_at_kl(run, "reward", 0.01)
    assert found is not None
    assert found.tolist() == pytest.approx([1.0, 1.0])  # half way up from the start
    assert values_at_kl(run_of(), "reward", 0.01) is None


def test_a_judge_is_read_like_the_reward_and_what_is_missing_stays_missing() -> None:
    start = point(0, None, [0.0, 0.0], judges={"j": [0.0, 0.0]})
    run = run_of(point(1, 0.01, [None, 2.0], judges={"j": [4.0, None]}), start=start)
    reward, judge = values_at_kl(run, "reward", 0.0025), values_at_kl(run, "judges/j", 0.0025)
    assert reward is not None
    assert judge is not None
    np.testing.assert_allclose(reward, [NAN, 1.0])
    np.testing.assert_allclose(judge, [2.0, NAN])


def test_the_common_kl_is_what_every_run_passed_before_it_collapsed() -> None:
    far = run_of(point(1, 0.05, [0.0]), point(2, 0.03, [0.0]))
    late = run_of(
        point(1, 0.02, [0.0, 0.0]),
        point(2, 0.2, [0.0, 0.0], distinct2=0.1),
        point(3, 0.3, [0.0, 0.0]),
    )
    assert common_kl([far]) == 0.05
    assert common_kl([far, late]) == 0.02
    at_once, still = run_of(point(1, 0.2, [0.0, 0.0], distinct2=0.1)), run_of(point(1, None, [0.0]))
    assert common_kl([far, late, at_once, still]) == 0.02
    assert common_kl([at_once, still]) is None
    assert common_kl([]) is None


# ---- the table -----------------------------------------------------------------------------------


def starts() -> dict[int, Point]:
    """Two seeds, three prompts; the rewards are 0, 1, 2 and the judge's −1."""
    return {seed: point(0, None, [0.0, 1.0, 2.0], judges={"j": [-1.0] * 3}) for seed in (0, 1)}


def runs() -> list[Run]:
    """`a`, everything 0.5 better and at a second strength 1.5; `b`, some better and some worse, and
    in one seed collapsed.
    """
    before, made = starts(), []
    for seed in (0, 1):
        first = point(1, 0.01, [0.25, 1.25, 2.25], judges={"j": [0.0] * 3}, lengths=[12.0] * 3)
        last = point(
            2,
            0.04,
            [0.5, 1.5, 2.5],
            judges={"j": [1.0] * 3},
            lengths=[15.0] * 3,
            perplexity=11.0,
            distinct2=0.45 + 0.1 * seed,
        )
        made.append(
            run_of(first, last, seed=seed, start=before[seed], seconds=3.0, trained_tokens=70)
        )
        strong = point(2, 0.16, [1.5, 2.5, 3.5], judges={"j": [1.0] * 3})
        made.append(run_of(strong, strength="strong", seed=seed, start=before[seed]))
        mixed = point(
            2,
            0.02,
            [1.0, 1.0, None],
            judges={"j": [-1.0, -2.0, -3.0]},
            perplexity=20.0 if seed else 10.0,
        )
        made.append(run_of(mixed, method="b", seed=seed, start=before[seed]))
    return made


@functools.cache
def summary(kl_target: float | None) -> dict[str, Any]:
    return summarise(starts(), runs(), ["base", "a", "b"], kl_target)


def rows(kl_target: float | None = 0.01) -> dict[str, dict[str, Any]]:
    found = summary(kl_target)
    assert [r["method"] for r in found["table"]] == ["base", "a", "b"]
    return {r["method"]: r for r in found["table"]}


def flat(delta: float, mean: float) -> dict[str, Any]:
    """What is the same on every prompt with every seed has a point for an interval."""
    return pytest.approx({"mean": mean, "delta": delta, "low": delta, "high": delta})


def test_at_equal_budget_a_method_is_its_first_strength_at_its_end() -> None:
    table = rows()
    at = table["a"]["at_budget"]
    assert at["kl"] == {"mean": 0.04}
    assert at["reward"] == flat(0.5, 1.5)
    assert at["judges/j"] == flat(2.0, 1.0)
    # All are 5 tokens longer: no slope.
    even = {"delta": 0.5, "low": 0.5, "high": 0.5}
    assert at["length_controlled_reward"] == pytest.approx(even)
    assert at["perplexity"] == pytest.approx({"mean": 11.0, "ratio": 1.1})
    assert at["distinct2"] == pytest.approx({"mean": 0.5, "ratio": 1.0})
    assert at["mean_length"] == pytest.approx({"mean": 15.0, "ratio": 1.5})
    assert at["clipped"] == {"mean": 0.5}
    assert at["pair_accuracy"] == {"mean": 0.5}
    # Two seeds at the first strength.
    assert (table["a"]["runs"], table["a"]["collapsed"]) == (2, 0)


def test_base_has_means_and_no_differences() -> None:
    at = rows()["base"]["at_budget"]
    assert at["kl"] == {"mean": 0.0}
    assert at["reward"] == {"mean": 1.0}
    assert at["judges/j"] == {"mean": -1.0}
    assert at["perplexity"] == {"mean": 10.0}
    assert "length_controlled_reward" not in at
    assert rows()["base"]["at_equal_kl"] is None
    assert rows()["base"]["runs"] == 0


def test_missing_rewards_and_collapsed_runs() -> None:
    b = rows()["b"]
    assert b["collapsed"] == 1
    reward = b["at_budget"]["reward"]
    assert (reward["mean"], reward["delta"]) == (1.0, 0.5)  # of +1 and 0; the third abstained
    assert (reward["low"], reward["high"]) == (0.0, 1.0)
    assert b["at_budget"]["judges/j"]["delta"] == pytest.approx(-1.0)


def test_at_equal_kl_a_method_is_the_mean_over_its_strengths_that_pass() -> None:
    table = rows(0.01)
    # a: 0.25 at its first round; the strong one a quarter of the way to 1.5 (√0.01 / √0.16): the
    # mean is 0.3125.
    assert table["a"]["at_equal_kl"]["reward"] == flat(0.3125, 1.3125)
    assert table["a"]["at_equal_kl"]["judges/j"] == flat(0.75, -0.25)  # of 1 and a quarter of 2
    assert table["a"]["at_equal_kl"]["seeds"] == 2
    # b: √0.5 of the way, with the seed that did not collapse.
    assert table["b"]["at_equal_kl"]["seeds"] == 1
    assert table["b"]["at_equal_kl"]["reward"]["delta"] == pytest.approx(math.sqrt(0.5) * 0.5)
    far = rows(0.09)
    # The strong one alone: 0.3 / 0.4 of 1.5.
    assert far["a"]["at_equal_kl"]["reward"] == flat(1.125, 2.125)
    assert far["b"]["at_equal_kl"] is None
    assert far["a"]["against"]["b"]["at_equal_kl"] is None


def test_without_a_target_it_is_what_all_reached() -> None:
    assert summary(None)["kl_target"] == 0.02  # of the runs that did not collapse at once
    sound = [r for r in runs() if r.collapsed is None]
    assert summarise(starts(), sound, ["base", "a", "b"], None)["kl_target"] == 0.02
    assert rows(None)["a"]["at_equal_kl"]["seeds"] == 2
    collapsed = [r for r in runs() if r.collapsed is not None and len(r.points) == 1]
    assert collapsed
    nothing = summarise(starts(), collapsed, ["base", "a", "b"], None)
    assert nothing["kl_target"] is None
    assert all(row["at_equal_kl"] is None for row in nothing["table"])


def test_wins_are_counted_by_prompt_and_ties_are_their_own() -> None:
    table = rows()
    assert table["a"]["wins"]["base"] == {
        "win": 1.0,
        "tie": 0.0,
        "lose": 0.0,
        "net_low": 1.0,
        "net_high": 1.0,
    }
    # b against base: +1, 0, nothing.
    wins = table["b"]["wins"]["base"]
    assert (wins["win"], wins["tie"], wins["lose"]) == (0.5, 0.5, 0.0)
    assert (wins["net_low"], wins["net_high"]) == (0.0, 1.0)
    # a against b: −0.5, +0.5, nothing; and the other way round.
    for wins, low, high in (
        (table["a"]["wins"]["b"], -1.0, 1.0),
        (table["b"]["wins"]["a"], -1.0, 1.0),
    ):
        assert (wins["win"], wins["tie"], wins["lose"]) == (0.5, 0.0, 0.5)
        assert (wins["net_low"], wins["net_high"]) == (low, high)
    assert set(table["base"]["wins"]) == {"a", "b"}
    assert table["base"]["wins"]["a"]["lose"] == 1.0


def test_methods_are_compared_with_each_other_by_pairs() -> None:
    table = rows(0.0025)
    at = table["a"]["against"]["b"]["at_budget"]
    assert at["reward"]["delta"] == pytest.approx(0.0)  # −0.5, +0.5
    assert at["judges/j"]["delta"] == pytest.approx(3.0)  # 2, 3, 4
    equal = table["a"]["against"]["b"]["at_equal_kl"]
    # Seed 0 alone. a: half of 0.25, and an eighth of 1.5, of which the mean is 0.15625. b: √(1/8)
    # of +1 and of 0.
    assert equal["reward"]["delta"] == pytest.approx(0.15625 - math.sqrt(1 / 8) / 2)
    assert set(table["a"]["against"]) == {"b"}
    assert table["base"]["against"] == {}


def test_curves_and_runs_hold_every_round() -> None:
    found = summary(0.01)
    curves = {(c["method"], c["strength"]): c["points"] for c in found["frontier"]}
    assert list(curves) == [("a", "s"), ("a", "strong"), ("b", "s")]
    first, last = curves["a", "s"]
    kl = (first["kl"], first["kl_low"], first["kl_high"])
    assert (first["round"], *kl, first["collapsed"]) == (1, 0.01, 0.01, 0.01, False)
    assert last["reward"]["mean"] == pytest.approx(1.5)
    assert last["reward"]["low"] < 1.5 < last["reward"]["high"]
    assert curves["b", "s"][0]["collapsed"] is True
    assert [(r["method"], r["strength"], r["seed"]) for r in found["runs"][:3]] == [
        ("a", "s", 0),
        ("a", "strong", 0),
        ("b", "s", 0),
    ]
    facts = found["runs"][0]
    assert (facts["seconds"], facts["trained_tokens"], facts["collapsed"]) == (3.0, 70, None)
    assert [p["kl"] for p in facts["points"]] == [0.01, 0.04]
    assert facts["points"][1] == {
        "round": 2,
        "kl": 0.04,
        "reward": 1.5,
        "judges": {"j": 1.0},
        "contrast": {"plain": 0.0},
        "perplexity": 11.0,
        "distinct2": 0.45,
        "mean_length": 15.0,
        "clipped": 0.5,
        "repetition": 0.0,
        "refusals": 0.0,
        "pair_accuracy": 0.5,
        "entropy": 1.0,
        "training": {"loss/lm": 2.0},
    }


@pytest.mark.filterwarnings("error")
def test_a_reward_that_says_nothing_and_a_run_without_a_point_leave_gaps_and_no_nan() -> None:
    import json

    before = {
        0: point(
            0,
            None,
            [None, None],
            judges={"j": [1.0, 1.0]},
            perplexity=None,
            pair_accuracy=[None, None],
        )
    }
    silent = run_of(
        point(
            1,
            0.04,
            [None, None],
            judges={"j": [2.0, 2.0]},
            perplexity=None,
            pair_accuracy=[None, None],
        ),
        start=before[0],
    )
    found = summarise(
        before,
        [silent, run_of(method="b", broke="nothing to rank", start=before[0])],
        ["base", "a", "b"],
        0.01,
    )
    json.dumps(found, allow_nan=False)
    a, b = found["table"][1:]
    assert a["at_budget"]["reward"] == {"delta": None, "low": None, "high": None}
    assert a["at_budget"]["judges/j"] == flat(1.0, 2.0)
    assert "perplexity" not in a["at_budget"]
    assert a["at_equal_kl"]["judges/j"] == flat(0.5, 1.5)
    assert a["wins"] == {"base": None, "b": None}
    assert (b["at_budget"], b["at_equal_kl"], b["collapsed"], b["runs"]) == ({}, None, 1, 1)
    table = printed({**found, "name": "x", "judges": ["j"]})
    assert "collapsed" in table
    assert "–" in table


def printed(result: dict[str, Any]) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(comparison_table(result))
    return captured.get()


@pytest.mark.parametrize("judges", [["j"], []])
def test_the_table_fits_a_terminal(judges: list[str]) -> None:
    named = [
        {**r, "method": "neat-random-negatives" if r["method"] == "a" else r["method"]}
        for r in summary(0.01)["table"]
    ]
    text = printed({**summary(0.01), "table": named, "name": "demo", "judges": judges})
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    assert lines[1].count("┳") == 5 + len(judges)  # no column stands empty
    assert "+0.500" in text
    for digits in ("[+0.500,", "+0.500]") if judges else ("[+0.500, +0.500]",):
        assert digits in text
    assert "+10.0%" in text
    assert "+50.0%" in text
    assert "0.040" in text
    assert "collapsed" in text
