"""Which completions make rows of other trainers' data, and what the rows never are."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neat_align.errors import DataError
from neat_align.prompts.rows import Prompt
from neat_align.rounds.completions import ORIGINS, Completion, CompletionGroup, Origin
from neat_align.rounds.export_file import dealt, write_rows
from neat_align.rounds.exports import ROW_FORMS, RowRules, preference_rows, rows_of, why_none
from neat_align.rounds.ranking import BAD_ORIGINS, rank_keys

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

TALK: Prompt = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "Hi?"},
]


def said(
    text: str, reward: float | None, origin: Origin = "plain", *, cut: bool = False, seed: int = 7
) -> Completion:
    instruction = {"positive": "Be kind.", "negative": "Be rude."}.get(origin)
    return Completion(
        origin, 0, text, (1,), "length" if cut else "stop", instruction, seed, reward=reward
    )


def group(*completions: Completion, prompt: Prompt = "Q:") -> CompletionGroup:
    return CompletionGroup("id", prompt, (1,), completions)


def pairs(g: CompletionGroup, **rules: Any) -> list[tuple[str, str]]:
    return [(row["chosen"], row["rejected"]) for row in preference_rows([g], **rules)]


# ---- pairs ---------------------------------------------------------------------------------------

MIXED = group(
    said("bad best", 9.0, "negative"),
    said("cut", 8.0, "positive", cut=True),
    said("good", 5.0, "positive"),
    said("plain", 4.0),
    said("bad", 1.0, "negative"),
)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [("good", "bad")]),
        ({"allow_cut_chosen": True}, [("cut", "bad")]),
        ({"allow_negative_chosen": True}, [("bad best", "bad")]),
        ({"margin": 4.0}, []),
        ({"margin": 3.9}, [("good", "bad")]),
        ({"pairs": "all"}, [("good", "plain"), ("good", "bad"), ("plain", "bad")]),
        ({"pairs": "all", "margin": 1.0}, [("good", "bad"), ("plain", "bad")]),
        # By origin the cut positive is out, and the plain stands between.
        ({"rank_by": "origin"}, [("good", "bad best")]),
    ],
)
def test_what_may_be_chosen_by_hand(rules: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert pairs(MIXED, **rules) == expected


def test_the_same_text_is_never_both_sides() -> None:
    g = group(said("same", 2.0), said("same ", 1.0))
    assert pairs(g) == pairs(g, pairs="all") == []


def test_the_best_that_may_be_chosen_must_stand_above_the_worst() -> None:
    g = group(said("good", 1.0, "positive"), said("bad", 3.0, "negative"))
    assert pairs(g) == []
    assert why_none(g, "preference", RowRules()) == "negative"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(ORIGINS),
            st.none() | st.integers(-3, 3).map(float),
            st.booleans(),
            st.sampled_from("abcdef"),
        ),
        max_size=6,
    ),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from(["best_worst", "all"]),
    st.sampled_from(["reward", "origin", "origin_then_reward"]),
)
def test_pairs_are_those_that_the_rules_say_and_no_others(
    drawn: list[Any], margin: float, which: Any, rank_by: Any
) -> None:
    """Against the plain rule over all pairs of completions."""
    g = group(*(said(t, r, o, cut=cut, seed=i) for i, (o, r, cut, t) in enumerate(drawn)))
    keys = rank_keys(g, rank_by)
    allowed = {
        (i, j): ki - kj
        for (i, ki), (j, kj) in product(enumerate(keys), repeat=2)
        if ki is not None and kj is not None and ki - kj > margin
        if drawn[i][0] not in BAD_ORIGINS and not drawn[i][2] and drawn[i][3] != drawn[j][3]
    }
    rows = preference_rows([g], margin=margin, pairs=which, rank_by=rank_by)
    made = [(row["seed_chosen"], row["seed_rejected"]) for row in rows]
    assert len(set(made)) == len(made)
    assert set(made) <= set(allowed)
    if which == "all":
        assert set(made) == set(allowed)
    elif made:
        assert allowed[made[0]] == max(allowed.values())
    for form in ROW_FORMS:  # every group gives a row, or a reason
        rules = RowRules(rank_by, margin, which)
        if not rows_of(g, form, rules):
            assert why_none(g, form, rules) in ("no rewards", "near tie", "cut", "negative")


# ---- labels, answers, whole texts ----------------------------------------------------------------


def labels(g: CompletionGroup, **rules: Any) -> dict[str, bool]:
    return {row["completion"]: row["label"] for row in rows_of(g, "kto", RowRules(**rules))}


def test_labels_say_which_side_of_the_mean_by_hand() -> None:
    """The mean is 5.4: the negative that stands above it is no answer to imitate, nor the cut."""
    assert labels(MIXED) == {"good": False, "plain": False, "bad": False}
    assert labels(MIXED, allow_cut_chosen=True)["cut"] is True
    assert labels(MIXED, allow_negative_chosen=True)["bad best"] is True
    # A gap of half the margin is a near tie: good is 0.4 below the mean.
    assert labels(MIXED, margin=1.0) == {"plain": False, "bad": False}


def test_rewards_of_zero_and_one_give_both_labels() -> None:
    """The median of these is 1, and would make no answer desirable."""
    g = group(*(said(f"right {i}", 1.0) for i in range(3)), said("wrong", 0.0))
    assert labels(g) == {"right 0": True, "right 1": True, "right 2": True, "wrong": False}


@given(st.lists(st.none() | st.integers(-9, 9).map(float), max_size=6))
def test_a_label_is_the_sign_of_the_distance_to_the_mean(rewards: list[float | None]) -> None:
    g = group(*(said(str(i), r) for i, r in enumerate(rewards)))
    there = [r for r in rewards if r is not None]
    mean = fmean(there) if there else 0.0
    expected = {
        str(i): r > mean for i, r in enumerate(rewards) if r is not None and abs(r - mean) > 0
    }
    assert labels(g) == (expected if len(there) > 1 else {})


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, "good"),
        ({"allow_cut_chosen": True}, "cut"),
        ({"allow_negative_chosen": True}, "bad best"),
        ({"rank_by": "origin"}, "good"),
    ],
)
def test_the_answer_to_imitate_is_the_best_whole_one(rules: dict[str, Any], expected: str) -> None:
    (row,) = rows_of(MIXED, "sft", RowRules(**rules))
    assert (row["prompt"], row["completion"]) == ("Q:", expected)


def test_rows_of_conversations_are_conversations_without_the_instruction() -> None:
    g = group(said("good", 1.0, "positive"), said("bad", 0.0, "negative"), prompt=TALK)
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    expected: dict[str, list[dict[str, Any]]] = {
        "preference": [{"prompt": TALK, "chosen": [good], "rejected": [bad]}],
        "reward": [{"chosen": [*TALK, good], "rejected": [*TALK, bad]}],
        "kto": [
            {"prompt": TALK, "completion": [good], "label": True},
            {"prompt": TALK, "completion": [bad], "label": False},
        ],
        "sft": [{"prompt": TALK, "completion": [good]}],
    }
    for form, wanted in expected.items():
        rows = rows_of(g, form, RowRules())  # type: ignore[arg-type]
        assert [{k: row[k] for k in w} for row, w in zip(rows, wanted, strict=True)] == wanted
        assert "Be kind." not in str(rows)
        assert "Be rude." not in str(rows)


def test_a_text_for_a_reward_model_is_prompt_and_answer() -> None:
    (row,) = rows_of(group(said(" yes", 1.0), said(" no", 0.0)), "reward", RowRules())
    assert (row["chosen"], row["rejected"]) == ("Q: yes", "Q: no")
    assert (row["score_chosen"], row["score_rejected"], row["score_margin"]) == (1.0, 0.0, 1.0)


def test_no_column_is_called_as_trainers_call_what_they_subtract() -> None:
    """TRL's RewardTrainer and OpenRLHF put `margin` into their loss when it is there."""
    columns = {key for form in ROW_FORMS for row in rows_of(MIXED, form, RowRules()) for key in row}
    assert "margin" not in columns
    assert {"score_margin", "score", "origin", "seed", "prompt_id"} <= columns


# ---- why a group gives nothing -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completions", "form", "rules", "why"),
    [
        ([said("a", None), said("b", 1.0)], "preference", {}, "no rewards"),
        ([said("a", None)], "sft", {}, "no rewards"),
        ([said("a", 1.0), said("b", 1.0)], "preference", {}, "near tie"),
        ([said("a", 1.0), said("b", 0.5)], "kto", {"margin": 0.5}, "near tie"),
        ([said("a", 1.0, cut=True), said("b", 0.5)], "preference", {}, "cut"),
        ([said("a", 1.0, cut=True)], "sft", {}, "cut"),
        ([said("a", 1.0, "negative"), said("b", 0.5)], "reward", {}, "negative"),
        ([said("a", 1.0, "rejected")], "sft", {}, "negative"),
    ],
)
def test_a_group_without_a_row_has_a_reason(
    completions: Sequence[Completion], form: Any, rules: dict[str, Any], why: str
) -> None:
    g = group(*completions)
    assert rows_of(g, form, RowRules(**rules)) == []
    assert why_none(g, form, RowRules(**rules)) == why


def test_what_goes_into_a_file_is_counted(tmp_path: Path) -> None:
    groups = [
        MIXED,
        group(said("a", 1.0), said("b", 1.0)),
        group(said("x", 1.0, cut=True), said("y", 0.0)),
    ]
    with (tmp_path / "rows.jsonl").open("wb") as file:
        counts = write_rows(file, iter(groups), "preference", as_lines=True)
    assert (counts.groups, counts.rows) == (3, 1)
    assert counts.left_out == {"near tie": 1, "cut": 1}
    assert counts.used == {("origin_chosen", "positive"): 1, ("origin_rejected", "negative"): 1}
    assert counts.instructions == {("positive", "Be kind."): 2, ("negative", "Be rude."): 2}
    plain = counts.origins["plain"]
    assert (plain.completions, plain.rewarded, plain.total) == (5, 5, 4.0 + 1 + 1 + 1 + 0)


@given(st.lists(st.integers(0, 5), max_size=8))
def test_dealt_rows_are_all_there_and_neighbours_are_of_different_groups(sizes: list[int]) -> None:
    groups = [[{"group": g, "row": r} for r in range(n)] for g, n in enumerate(sizes)]
    rows = dealt(groups)
    assert sorted((row["group"], row["row"]) for row in rows) == [
        (g, r) for g, n in enumerate(sizes) for r in range(n)
    ]
    even = [[{"group": g, "row": r} for r in range(4)] for g in range(len(sizes) + 2)]
    assert all(a["group"] != b["group"] for a, b in pairwise(dealt(even)))


def test_labels_of_neighbours_are_mixed(tmp_path: Path) -> None:
    """Completions of a group stand in order of origin: in that order a batch had one label."""
    groups = [
        group(said("a", 2.0, "positive"), said("b", 1.0, "negative"), prompt=f"Q{i}:")
        for i in range(4)
    ]
    with (tmp_path / "rows.jsonl").open("wb") as file:
        write_rows(file, groups, "kto", as_lines=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["label"]) for row in rows] == [
        *(("Q0:", True), ("Q1:", False), ("Q2:", True), ("Q3:", False)),
        *(("Q0:", False), ("Q1:", True), ("Q2:", False), ("Q3:", True)),
    ]


def test_rows_are_written_while_the_groups_come() -> None:
    """A million prompts: what is drawn and not yet written is a few hundred groups."""
    drawn = 0
    behind: list[int] = []

    def stream() -> Iterator[CompletionGroup]:
        nonlocal drawn
        for _ in range(1200):
            drawn += 1
            yield MIXED

    class Watched(io.BytesIO):
        def write(self, data: Any) -> int:
            behind.append(drawn - sum(behind))
            return super().write(data)

    file = Watched()
    assert write_rows(file, stream(), "preference", as_lines=True).rows == 1200
    assert max(behind) <= 256
    assert file.getvalue().count(b"\n") == 1200


def test_text_prompts_and_conversations_do_not_share_a_file(tmp_path: Path) -> None:
    groups = [group(said("a", 1.0)), group(said("a", 1.0), prompt=TALK)]
    with (
        (tmp_path / "rows.jsonl").open("wb") as file,
        pytest.raises(DataError, match="mix text prompts and conversations"),
    ):
        write_rows(file, groups, "sft", as_lines=True)
