from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neat_align.errors import DataError
from neat_align.files.atomic import write_table
from neat_align.prompts.rows import Prompt
from neat_align.rounds.completions import (
    ORIGINS,
    Completion,
    CompletionGroup,
    Origin,
    groups_from_table,
    groups_to_table,
    read_groups,
    reward_names_of,
)
from neat_align.rounds.exports import preference_rows, ranked_rows
from neat_align.rounds.group_file import GroupFile
from neat_align.rounds.ranking import (
    BAD_ORIGINS,
    ORIGIN_STEP,
    best_index,
    extremes,
    kept_completions,
    ordered_pairs,
    rank_keys,
)

# The run-time type checker looks at a random item of each list, also of those that hypothesis is
# building.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

CONVERSATION: Prompt = [{"role": "user", "content": "Hi?"}]

TEXTS = st.one_of(
    st.text(max_size=12), st.sampled_from(["", "\x00", "a\x00b", "🙂👩‍👩‍👧", "\u2028\r\n", " "])
)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
LOGPROBS = st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(tuple)
NUMBERS = st.floats(allow_nan=False)
COMPLETIONS = st.builds(
    Completion,
    origin=st.sampled_from(ORIGINS),
    index=st.integers(0, 2**31 - 1),
    text=TEXTS,
    token_ids=IDS,
    finish_reason=st.sampled_from(["stop", "length"]),
    instruction=st.none() | TEXTS,
    seed=st.none() | st.integers(0, 2**63 - 1),
    sampling_logprob=st.none() | NUMBERS,
    policy_logprobs=LOGPROBS,
    ref_logprobs=LOGPROBS,
    reward=st.none() | NUMBERS,
    reward_components=st.lists(st.none() | NUMBERS, max_size=3).map(tuple),
    branch_at=st.none() | st.integers(0, 2**31 - 1),
    contrasts=LOGPROBS,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXTS}),
    min_size=1,
    max_size=3,
)


def groups_with(prompts: st.SearchStrategy[Any]) -> st.SearchStrategy[list[CompletionGroup]]:
    completions = st.lists(COMPLETIONS, max_size=4).map(tuple)
    return st.lists(
        st.builds(
            CompletionGroup,
            prompt_id=TEXTS,
            prompt=prompts,
            prompt_ids=IDS,
            completions=completions,
        ),
        max_size=4,
    )


def completion(
    origin: Origin = "plain",
    reward: float | None = None,
    *,
    finish_reason: Literal["stop", "length"] = "stop",
    text: str | None = None,
) -> Completion:
    return Completion(
        origin=origin,
        index=0,
        text=text or f"{origin} {reward}",
        token_ids=(1,),
        finish_reason=finish_reason,
        reward=reward,
    )


def group(*completions: Completion, prompt: Prompt = "Q:") -> CompletionGroup:
    return CompletionGroup("p", prompt, (1, 2), completions)


# ---- Arrow ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(groups_with(TEXTS) | groups_with(MESSAGES))
def test_groups_come_back_from_arrow_as_they_were(groups: list[CompletionGroup]) -> None:
    table = groups_to_table(groups, ["a", "b"])
    assert table.num_rows == len(groups)
    assert groups_from_table(table) == groups
    assert reward_names_of(table) == ["a", "b"]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(groups=groups_with(TEXTS) | groups_with(MESSAGES))
def test_groups_come_back_from_a_parquet_file_as_they_were(
    groups: list[CompletionGroup], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("groups") / "groups.parquet"
    write_table(path, groups_to_table(groups, ["r"]))
    assert read_groups(path) == groups
    assert reward_names_of(pq.read_table(path)) == ["r"]


def test_a_file_without_reward_names_has_none() -> None:
    assert reward_names_of(groups_to_table([group(completion())])) == []


def test_the_columns_that_people_read_are_named_as_the_ecosystem_names_them() -> None:
    row = groups_to_table(
        [group(completion("positive", 1.0), completion("negative", None), prompt=CONVERSATION)]
    ).to_pylist()[0]
    assert row["prompt"] == CONVERSATION
    assert row["completions"] == ["positive 1.0", "negative None"]
    assert row["origins"] == ["positive", "negative"]
    assert row["rewards"] == [1.0, None]


@pytest.mark.parametrize("order", [("Q:", CONVERSATION), (CONVERSATION, "Q:")])
def test_text_prompts_and_conversations_do_not_share_a_file(order: tuple[Prompt, Prompt]) -> None:
    with pytest.raises(DataError, match="mix text prompts and conversations"):
        groups_to_table([group(completion(), prompt=prompt) for prompt in order])


def test_another_parquet_file_is_not_a_group_file(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "text": ["b"]}), path)
    with pytest.raises(
        DataError,
        match=r"not a group file: columns completion_ids, .* are missing \(it has \['prompt', "
        r"'text'\]\)",
    ):
        read_groups(path)


def test_one_missing_column_is_named() -> None:
    table = groups_to_table([group(completion())]).drop_columns(["seeds"])
    with pytest.raises(DataError, match="columns seeds are missing"):
        groups_from_table(table)


def test_a_file_of_an_earlier_version_has_no_branch_points(tmp_path: Path) -> None:
    groups = [group(replace(completion("positive", 1.0), branch_at=3), completion())]
    path = tmp_path / "groups.parquet"
    write_table(path, groups_to_table(groups).drop_columns(["branch_points"]))
    expected = [group(completion("positive", 1.0), completion())]
    assert read_groups(path) == expected
    assert list(GroupFile(path)) == expected
    assert next(iter(GroupFile(path).without_tokens())).completions[0].branch_at is None


# ---- ranking -------------------------------------------------------------------------------------


def test_pairs_by_hand() -> None:
    keys = [1.0, 3.0, None, 1.0, 2.0]
    assert ordered_pairs(keys, 0.0) == [(1, 0), (1, 3), (1, 4), (4, 0), (4, 3)]
    assert ordered_pairs(keys, 1.0) == [(1, 0), (1, 3)]  # a gap of exactly the margin is a near-tie
    assert ordered_pairs(keys, 2.0) == []


@pytest.mark.parametrize("keys", [[], [None, None], [1.0], [1.0, None], [2.0, 2.0]])
def test_nothing_to_rank_makes_no_pair(keys: list[float | None]) -> None:
    assert ordered_pairs(keys, 0.0) == []


@given(st.lists(st.none() | st.floats(-5, 5), max_size=6), st.floats(0, 3))
def test_pairs_are_exactly_the_gaps_above_the_margin(
    keys: list[float | None], margin: float
) -> None:
    pairs = set(ordered_pairs(keys, margin))
    for i, a in enumerate(keys):
        for j, b in enumerate(keys):
            assert ((i, j) in pairs) == (a is not None and b is not None and a - b > margin)


def test_keys_are_rewards_or_ranks_of_origins() -> None:
    g = group(*(completion(origin, 0.5 if origin == "plain" else None) for origin in ORIGINS))
    assert rank_keys(g, "reward") == [None, None, 0.5, None, None]
    by_origin = dict(zip(ORIGINS, rank_keys(g, "origin"), strict=True))
    assert by_origin == {"positive": 2, "chosen": 2, "plain": 1, "negative": 0, "rejected": 0}


@pytest.mark.parametrize(
    ("completions", "expected", "with_bad_origins"),
    [
        ([completion("positive", 1.0), completion("plain", 2.0)], 1, 1),
        # A tie goes to the earlier.
        ([completion("positive", 2.0), completion("plain", 2.0)], 0, 0),
        ([completion("positive", 1.0), completion("negative", 5.0)], 0, 1),
        ([completion("chosen", 1.0), completion("rejected", 5.0)], 0, 1),
        ([completion("positive", 9.0, finish_reason="length"), completion("plain", 1.0)], 1, 1),
        ([completion("positive", None), completion("plain", -3.0)], 1, 1),
        ([completion("negative", 1.0), completion("rejected", 0.0)], None, 0),
        ([completion("positive", None)], None, None),
        ([completion("positive", 1.0, finish_reason="length")], None, None),
        ([], None, None),
    ],
)
def test_the_target_of_the_language_model_loss(
    completions: list[Completion], expected: int | None, with_bad_origins: int | None
) -> None:
    g = group(*completions)
    keys = rank_keys(g, "reward")
    assert best_index(g, keys) == expected
    assert best_index(g, keys, allow_bad_origins=True) == with_bad_origins


def test_the_target_follows_the_keys_and_not_the_rewards() -> None:
    g = group(completion("plain", 9.0), completion("positive", 0.0))
    assert best_index(g, rank_keys(g, "origin")) == 1


@pytest.mark.parametrize(
    ("completions", "expected", "with_bad_origins"),
    [
        ([completion("plain", 9.0, finish_reason="length"), completion("plain", 1.0)], 0, 0),
        # A tie goes to the earlier.
        ([completion("plain", 1.0), completion("plain", 1.0, finish_reason="length")], 0, 0),
        ([completion("plain", None, finish_reason="length"), completion("plain", 1.0)], 1, 1),
        (
            [
                completion("negative", 9.0, finish_reason="length"),
                completion("plain", 1.0, finish_reason="length"),
            ],
            1,
            0,
        ),
        ([completion("rejected", 9.0, finish_reason="length")], None, 0),
    ],
)
def test_cut_completions_are_targets_only_when_allowed(
    completions: list[Completion], expected: int | None, with_bad_origins: int | None
) -> None:
    g = group(*completions)
    keys = rank_keys(g, "reward")
    assert best_index(g, keys, allow_cut=True) == expected
    assert best_index(g, keys, allow_bad_origins=True, allow_cut=True) == with_bad_origins
    ended = [i for i, c in enumerate(completions) if c.finish_reason == "stop"]
    assert best_index(g, keys, allow_bad_origins=True) == (ended[0] if ended else None)


def test_bad_origins_stand_one_step_below_the_others_by_hand() -> None:
    """Worst of the good −2, best of the bad 5: the bad go down by 8, to at most −3.

    What abstained stays out.
    """
    g = group(
        completion("positive", 1.0),
        completion("negative", 3.0),
        completion("chosen", -2.0),
        completion("rejected", 5.0),
        completion("plain", None),
        completion("negative", None),
        completion("negative", 4.5),
    )
    assert rank_keys(g, "origin_then_reward") == [1.0, -5.0, -2.0, -3.0, None, None, -3.5]
    assert rank_keys(g, "reward") == [1.0, 3.0, -2.0, 5.0, None, None, 4.5]


@pytest.mark.parametrize(
    "origins", [("positive", "plain", "chosen"), ("negative", "rejected", "negative")]
)
def test_one_kind_of_origin_alone_is_ranked_by_reward(origins: tuple[Origin, ...]) -> None:
    g = group(
        *(
            completion(origin, reward)
            for origin, reward in zip(origins, (2.0, None, -1.0), strict=True)
        )
    )
    assert rank_keys(g, "origin_then_reward") == [2.0, None, -1.0]
    abstained = group(
        *g.completions, completion("negative" if origins[0] == "positive" else "plain", None)
    )
    assert rank_keys(abstained, "origin_then_reward") == [2.0, None, -1.0, None]
    assert rank_keys(group(), "origin_then_reward") == []


@given(
    st.lists(
        st.tuples(st.sampled_from(ORIGINS), st.none() | st.integers(-40, 40).map(lambda n: n / 4)),
        max_size=7,
    )
)
def test_origin_comes_first_and_reward_decides_within_it(
    drawn: list[tuple[Origin, float | None]],
) -> None:
    g = group(*(completion(*d) for d in drawn))
    keys = rank_keys(g, "origin_then_reward")
    assert [k is None for k in keys] == [reward is None for _, reward in drawn]
    good = [
        (k, r)
        for k, (o, r) in zip(keys, drawn, strict=True)
        if o not in BAD_ORIGINS and k is not None
    ]
    bad = [
        (k, r) for k, (o, r) in zip(keys, drawn, strict=True) if o in BAD_ORIGINS and k is not None
    ]
    assert all(k == r for k, r in good)
    if good and bad:
        assert max(k for k, _ in bad) == min(k for k, _ in good) - ORIGIN_STEP
    for a, ra in bad:  # quarters are exact: so are the differences
        assert all(a - b == ra - rb for b, rb in bad)


# ---- best and worst ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "margin", "expected"),
    [
        ([2.0, 5.0, 1.0], 0.0, (1, 2)),
        ([5.0, 1.0, 5.0, 1.0], 0.0, (0, 1)),  # of equal ones the earlier
        ([None, 5.0, None, 1.0], 0.0, (1, 3)),
        ([3.0, 1.0], 2.0, None),  # a gap of exactly the margin is a near-tie
        ([3.0, 1.0], 1.9, (0, 1)),
        ([2.0, 2.0], 0.0, None),
        ([2.0], 0.0, None),
        ([None, 2.0], 0.0, None),
        ([None, None], 0.0, None),
        ([], 0.0, None),
    ],
)
def test_the_best_against_the_worst(
    keys: list[float | None], margin: float, expected: tuple[int, int] | None
) -> None:
    assert extremes(keys, margin) == expected


@given(
    st.lists(st.none() | st.integers(-3, 3).map(float), max_size=7),
    st.sampled_from([0.0, 1.0, 2.5]),
)
def test_extremes_are_the_widest_of_the_ordered_pairs(
    keys: list[float | None], margin: float
) -> None:
    pairs = ordered_pairs(keys, margin)
    # Widest first; of equally wide ones the earliest winner, then the earliest loser.
    widest = sorted(pairs, key=lambda p: (-(keys[p[0]] or 0.0) + (keys[p[1]] or 0.0), p))
    assert extremes(keys, margin) == (widest[0] if widest else None)


def test_kept_completions_stay_in_order_and_a_group_is_never_empty() -> None:
    g = group(*(completion("plain", float(i)) for i in range(4)))
    assert kept_completions(g, (3, 1, None, 1)).completions == (g.completions[1], g.completions[3])
    assert kept_completions(g, (None, 2)).completions == (g.completions[2],)
    for nothing in ((), (None, None)):
        assert kept_completions(g, nothing).completions == (g.completions[0],)
    kept = kept_completions(g, (0,))
    assert (kept.prompt_id, kept.prompt, kept.prompt_ids) == (g.prompt_id, g.prompt, g.prompt_ids)


# ---- exports -------------------------------------------------------------------------------------


def test_ranked_rows_go_from_best_to_worst_and_abstentions_come_last() -> None:
    g = group(
        completion("negative", -1.0, text="n"),
        completion("plain", None, text="x"),
        completion("positive", 2.0, text="p"),
        completion("chosen", 2.0, text="c"),
    )
    assert ranked_rows([g]) == [
        {
            "prompt": "Q:",
            "completions": ["p", "c", "n", "x"],
            "rewards": [2.0, 2.0, -1.0, None],
            "origins": ["positive", "chosen", "negative", "plain"],
        }
    ]


def test_preference_rows_are_best_against_worst() -> None:
    g = group(
        completion("plain", 0.5, text="m"),
        completion("negative", 0.0, text="w"),
        completion("positive", 1.0, text="b"),
    )
    expected = {
        "prompt": "Q:",
        "chosen": "b",
        "rejected": "w",
        "score_chosen": 1.0,
        "score_rejected": 0.0,
        "score_margin": 1.0,
        "origin_chosen": "positive",
        "origin_rejected": "negative",
        "seed_chosen": None,
        "seed_rejected": None,
        "prompt_id": "p",
    }
    assert preference_rows([g]) == [expected]
    conversation = CompletionGroup("p", CONVERSATION, (1,), g.completions)
    (row,) = preference_rows([conversation])
    assert row["prompt"] == CONVERSATION
    assert row["chosen"] == [{"role": "assistant", "content": "b"}]
    assert row["rejected"] == [{"role": "assistant", "content": "w"}]


def test_groups_without_a_gap_above_the_margin_make_no_preference() -> None:
    groups = [
        group(completion("plain", 1.0), completion("positive", 1.0)),
        group(completion("plain", None), completion("positive", None)),
        group(completion("plain", 1.0), completion("positive", None)),
        group(),
        group(completion("plain", 1.0), completion("positive", 1.5, text="kept")),
    ]
    assert [r["chosen"] for r in preference_rows(groups)] == ["kept"]
    assert preference_rows(groups, margin=0.5) == []


@given(
    st.lists(
        st.tuples(st.sampled_from(ORIGINS), st.none() | st.integers(-3, 3).map(float)), max_size=6
    ),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from(["reward", "origin", "origin_then_reward"]),
)
def test_a_preference_is_one_of_the_ordered_pairs_and_the_widest(
    drawn: list[Any], margin: float, rank_by: Any
) -> None:
    g = group(*(completion(o, r, text=str(i)) for i, (o, r) in enumerate(drawn)))
    keys = rank_keys(g, rank_by)
    pairs = ordered_pairs(keys, margin)
    rows = preference_rows([g], margin=margin, rank_by=rank_by, allow_negative_chosen=True)
    assert bool(rows) == bool(pairs)
    for row in rows:
        best, worst = int(row["chosen"]), int(row["rejected"])
        assert (best, worst) in pairs
        present = [k for k in keys if k is not None]
        assert (keys[best], keys[worst]) == (max(present), min(present))
        assert (best, worst) == (keys.index(max(present)), keys.index(min(present)))
        assert (row["score_chosen"], row["origin_rejected"]) == (drawn[best][1], drawn[worst][0])


def test_bad_origins_come_last_in_an_export_by_origin_then_reward() -> None:
    g = group(
        completion("negative", 9.0, text="n9"),
        completion("positive", 0.0, text="p0"),
        completion("rejected", 8.0, text="r8"),
        completion("plain", 1.0, text="x1"),
        completion("positive", None, text="none"),
    )
    (row,) = ranked_rows([g], rank_by="origin_then_reward")
    assert row["completions"] == ["x1", "p0", "n9", "r8", "none"]
    assert row["rewards"] == [1.0, 0.0, 9.0, 8.0, None]  # as they were given, not shifted
    (preferred,) = preference_rows([g], rank_by="origin_then_reward")
    assert (preferred["chosen"], preferred["rejected"]) == ("x1", "r8")
