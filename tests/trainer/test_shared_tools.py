"""Shares of a round's calls: whole prompts, even costs, and the same result as one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from neat_align.prompts.rows import PromptRow
from neat_align.rewards.protocol import LeftOut, NamedReward, ScoredRows, Unscorable
from neat_align.rewards.scoring import score_answers
from neat_align.trainer.shared_tools import deal, in_order, merged_scores

ITEMS = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 50)), max_size=40)


@given(ITEMS, st.integers(1, 6))
def test_every_item_is_dealt_once_and_equal_keys_stay_together(
    items: list[tuple[str, int]], ranks: int
) -> None:
    keys, costs = [k for k, _ in items], [c for _, c in items]
    shares = deal(keys, costs, ranks)
    assert len(shares) == ranks
    assert sorted(i for share in shares for i in share) == list(range(len(items)))
    assert all(share == sorted(share) for share in shares)
    owners = {key: {r for r, share in enumerate(shares) for i in share if keys[i] == key}
              for key in keys}  # fmt: skip
    assert all(len(ranks_of) == 1 for ranks_of in owners.values())
    # No rank has more than the least loaded one by more than its dearest prompt.
    loads = [sum(costs[i] for i in share) for share in shares]
    dearest = max((sum(c for k, c in items if k == key) for key in set(keys)), default=0)
    assert max(loads) - min(loads) <= dearest
    assert in_order(shares, [[items[i] for i in share] for share in shares]) == items


def test_ranks_without_a_prompt_have_empty_shares() -> None:
    assert deal(["a", "a", "a"], [1, 1, 1], 3) == [[0, 1, 2], [], []]
    assert in_order([[0, 1, 2], [], []], [["x", "y", "z"], None, None]) == ["x", "y", "z"]


def rows(ids: str) -> list[PromptRow]:
    return [PromptRow(i, f"Say {i}", None, None, {}, f"row {i}") for i in ids]


def measure(
    prompts: Sequence[str],
    completions: Sequence[str],
    log_metric: Any = None,
    log_extra: Any = None,
    log_total: Any = None,
    **_: Any,
) -> list[Any]:
    log_metric("letters", sum(map(len, completions)))
    log_total("tokens", sum(map(len, completions)))
    if any("b" in prompt for prompt in prompts):
        log_extra("seen", [c.upper() for c in completions])
    return [Unscorable("is a q") if c == "q" else None if not c else float(len(c))
            for c in completions]  # fmt: skip


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "q", "xx", "yyy"]))),
    st.integers(1, 4),
)
def test_scores_in_shares_are_those_of_one_call(answers: list[tuple[str, str]], ranks: int) -> None:
    given_rows = rows("".join(name for name, _ in answers))
    texts = [text for _, text in answers]
    ids = [[1] * len(text) for text in texts]
    rewards = (NamedReward("measure", measure, 2.0),)
    whole = score_answers(given_rows, texts, ids, rewards, "skip")
    shares = deal([row.id for row in given_rows], [1 + len(i) for i in ids], ranks)
    found: list[ScoredRows | None] = [
        score_answers(
            [given_rows[i] for i in share],
            [texts[i] for i in share],
            [ids[i] for i in share],
            rewards,
            "skip",
        )
        if share
        else None
        for share in shares
    ]
    merged = merged_scores(shares, found)
    assert merged.rewards == whole.rewards
    assert merged.components == whole.components
    assert merged.left_out == whole.left_out
    assert sum(merged.metrics.get("letters", ())) == sum(whole.metrics.get("letters", ()))
    assert merged.totals == whole.totals
    for place, value in enumerate(merged.extra.get("seen", ())):
        # A call that had no b logged no column.
        assert value in (None, texts[place].upper())


def test_rows_that_cannot_be_scored_keep_their_places() -> None:
    left = LeftOut(row=1, reward="r", reason="is long")
    a = ScoredRows((1.0, None), ((1.0,), (None,)), (left,), {"m": (1.0,)}, {})
    b = ScoredRows((3.0,), ((3.0,),), (), {"m": (5.0,)}, {"x": ("c",)})
    merged = merged_scores([[0, 2], [1]], [a, b])
    assert merged.rewards == (1.0, 3.0, None)
    assert merged.left_out == (LeftOut(row=2, reward="r", reason="is long"),)
    assert merged.metrics == {"m": (1.0, 5.0)}
    assert merged.extra == {"x": (None, "c", None)}
