"""The reward `similarity`, and the data's own answers as what reward functions are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from neat_align.errors import RewardError
from neat_align.prompts.rows import PromptRow
from neat_align.rewards.minilm_tone import find_encoder, load_encoder
from neat_align.rewards.protocol import NamedReward
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rewards.scoring import score, score_answers, unscorable_rows
from neat_align.rewards.similarity import SimilarityReward
from tiny import skip_without_encoder

CHOSEN = "Put the oven on for half an hour and wipe it out with vinegar."


def row(i: int, chosen: str | None, rejected: str | None = None) -> PromptRow:
    return PromptRow(str(i), f"Question {i}", chosen, rejected, {"topic": "x"}, f"d.jsonl:{i + 1}")


def scored(rows: Sequence[PromptRow], texts: Sequence[str], function: Any, **given: Any) -> Any:
    return score_answers(
        rows, texts, [[1]] * len(rows), (NamedReward("own", function, 1.0),), **given
    )


# ---- what functions are given --------------------------------------------------------------------


def test_a_function_that_names_the_datas_answers_is_given_them() -> None:
    """And one that does not is not: it may send all its columns elsewhere."""
    seen: dict[str, Any] = {}

    def names(completions: Any, chosen: Any, rejected: Any = None, **columns: Any) -> list[float]:
        seen.update(chosen=chosen, rejected=rejected, columns=sorted(columns))
        return [0.0] * len(completions)

    def does_not(completions: Any, **columns: Any) -> list[float]:
        seen.update(columns_of_others=sorted(columns))
        return [0.0] * len(completions)

    rows = [row(0, "good", "bad"), row(1, None)]
    both = (NamedReward("a", names, 1.0), NamedReward("b", does_not, 1.0))
    score_answers(rows, ["x", "y"], [[1], [2]], both)
    assert seen["chosen"] == ["good", None]
    assert seen["rejected"] == ["bad", None]
    assert seen["columns"] == ["completion_ids", "prompts", "topic"]
    assert seen["columns_of_others"] == ["completion_ids", "prompts", "topic"]


def test_answers_go_with_their_rows_where_memory_ran_out() -> None:
    sizes: list[int] = []

    def small(completions: Any, chosen: Any, **columns: Any) -> list[float]:
        sizes.append(len(completions))
        if len(completions) > 1:
            raise MemoryError
        return [float(chosen[0][1:])]

    rows = [row(i, f"c{i}") for i in range(3)]
    assert scored(rows, ["x"] * 3, small).rewards == (0.0, 1.0, 2.0)
    assert max(sizes) == 3


def test_as_many_answers_as_rows_are_needed() -> None:
    reward = (NamedReward("a", lambda completions, **_: [0.0] * len(completions), 1.0),)
    with pytest.raises(RewardError, match="2 completions to score but 1 chosen"):
        score(
            reward,
            prompts=["a", "b"],
            completions=["x", "y"],
            completion_ids=[[1], [1]],
            columns={},
            answers={"chosen": ["c"]},
        )


# ---- similarity ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def similarity() -> SimilarityReward:
    skip_without_encoder()
    (reward,) = resolve_rewards("similarity", None)
    assert isinstance(reward.function, SimilarityReward)
    assert reward.name == "similarity"
    return reward.function


def test_it_is_the_cosine_of_the_two_embeddings(similarity: SimilarityReward) -> None:
    texts = [
        CHOSEN,
        "Vinegar, and let it warm up before you wipe it.",
        "My dog is called Max.",
        " ",
    ]
    rows = [row(i, f" {CHOSEN}\n") for i in range(4)]
    found = scored(rows, texts, similarity).rewards
    vectors = load_encoder(find_encoder()).embed([CHOSEN, *texts[1:3]])
    expected = torch.nn.functional.cosine_similarity(vectors[:1], vectors).tolist()
    assert found[:3] == pytest.approx(expected, abs=1e-5)
    assert found[0] == pytest.approx(1.0, abs=1e-5)
    assert found[0] <= 1
    assert found[0] > found[1] > found[2] + 0.2
    assert found[3] is None


def test_each_row_has_its_own_answer_and_the_batch_changes_nothing(
    similarity: SimilarityReward,
) -> None:
    chosen = ["Bake it.", "Call the bank.", "Bake it."]
    texts = ["Call your bank now.", "Call your bank now.", "Put it into the oven."]
    rows = [row(i, c) for i, c in enumerate(chosen)]
    together = scored(rows, texts, similarity).rewards
    alone = [scored([r], [t], similarity).rewards[0] for r, t in zip(rows, texts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert together[1] > together[0]


@pytest.mark.parametrize("missing", [None, "", "  \n"])
def test_a_row_without_an_answer_is_named(
    similarity: SimilarityReward, missing: str | None
) -> None:
    rows = [row(0, CHOSEN), row(1, missing)]
    with pytest.raises(RewardError, match=r"cannot score d\.jsonl:2, .* it has no chosen answer"):
        scored(rows, ["x", "y"], similarity)
    left = scored(rows, ["x", "y"], similarity, on_bad_row="skip")
    assert left.rewards[1] is None
    assert [(part.row, part.reward) for part in left.left_out] == [(1, "own")]
    found = unscorable_rows((NamedReward("own", similarity, 1.0),), rows)
    assert [(part.row, part.reward) for part in found] == [(1, "own")]
    assert "has no chosen answer, and the reward 'similarity'" in found[0].reason


def test_without_any_answers_every_row_is_named(similarity: SimilarityReward) -> None:
    with pytest.raises(RewardError, match=r"cannot score row 0, .*no chosen answer.*and 1 more"):
        score(
            (NamedReward("own", similarity, 1.0),),
            prompts=["a", "b"],
            completions=["x", "y"],
            completion_ids=[[1], [1]],
            columns={},
        )
