from __future__ import annotations

import math

import pytest
import torch

from neat_align.learning.batches import GroupBatch, collate_groups
from neat_align.modeling.packing import pad_rows
from neat_align.rounds.completions import Completion, CompletionGroup, Origin

PAD = 0


def completion(
    origin: Origin,
    ids: tuple[int, ...],
    reward: float | None,
    *,
    ref: tuple[float, ...] = (),
    cut: bool = False,
) -> Completion:
    return Completion(
        origin=origin,
        index=0,
        text="…",
        token_ids=ids,
        finish_reason="length" if cut else "stop",
        ref_logprobs=ref,
        reward=reward,
    )


def two_groups() -> list[CompletionGroup]:
    first = (
        completion("positive", (5, 6, 2), 1.0, cut=True),
        completion("negative", (7, 2), 3.0),
        completion("plain", (8, 9, 9, 2), None),
        completion("chosen", (4, 2), 0.5),
    )
    second = (completion("rejected", (3, 2), 2.0), completion("negative", (6,), -1.0))
    return [
        CompletionGroup("a", "Q", (10, 11, 12), first),
        CompletionGroup("b", "R", (13,), second),
    ]


def collated(groups: list[CompletionGroup], *, lm_on_bad_origins: bool = False) -> GroupBatch:
    return collate_groups(
        groups, pad_token_id=PAD, rank_by="reward", lm_on_bad_origins=lm_on_bad_origins
    )


# ---- rows ----------------------------------------------------------------------------------------


def test_rows_are_padded_on_the_right_only() -> None:
    rows = pad_rows([[5, 6, 7], [8]], [[2], [3, 4]], PAD)
    assert rows.input_ids.tolist() == [[5, 6, 7, 2], [8, 3, 4, PAD]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    # The prompt's last token and all but the completion's; nothing follows a row's last position.
    assert rows.read_at.tolist() == [[2, 3], [0, 1]]
    assert rows.completion_ids.tolist() == [[2, 0], [3, 4]]
    assert rows.completion_mask.tolist() == [[True, False], [True, True]]


def test_masks_go_by_length_where_the_pad_token_is_content() -> None:
    rows = pad_rows([[PAD, 5, PAD], [8, PAD]], [[PAD, PAD], [3, PAD, PAD]], PAD)
    assert rows.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert rows.completion_mask.tolist() == [[True, True, False], [True, True, True]]


def test_a_batch_of_empty_completions_keeps_one_masked_column() -> None:
    rows = pad_rows([[5], [6, 7]], [[], []], PAD)
    assert rows.completion_ids.shape == (2, 1)
    assert not rows.completion_mask.any()


# ---- groups --------------------------------------------------------------------------------------


def test_a_batch_of_groups_by_hand() -> None:
    batch = collated(two_groups())
    assert batch.group.tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.slot.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.present.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.origins.tolist() == [[0, 1, 2, 3], [4, 1, -1, -1]]
    keys = batch.keys.tolist()
    assert keys[0][:2] + keys[0][3:] == [1.0, 3.0, 0.5]
    assert math.isnan(keys[0][2])  # abstained
    assert keys[1][:2] == [2.0, -1.0]
    assert all(math.isnan(k) for k in keys[1][2:])  # absent
    assert batch.rows.completion_ids[2].tolist() == [8, 9, 9, 2]
    assert batch.rows.input_ids[4].tolist() == [13, 3, 2, PAD, PAD, PAD, PAD]


def test_the_target_is_a_row_and_not_a_slot() -> None:
    # In the first group the best is cut and the next one negative; in the second all are of bad
    # origin.
    assert collated(two_groups()).best_row.tolist() == [3, -1]
    assert collated(two_groups(), lm_on_bad_origins=True).best_row.tolist() == [1, 4]
    swapped = two_groups()[::-1]
    assert collated(swapped).best_row.tolist() == [-1, 5]
    assert collated(swapped, lm_on_bad_origins=True).best_row.tolist() == [0, 3]


def test_ranking_by_origin_needs_no_reward() -> None:
    batch = collate_groups(
        two_groups(), pad_token_id=PAD, rank_by="origin", lm_on_bad_origins=False
    )
    assert batch.keys[0].tolist() == [2.0, 0.0, 1.0, 2.0]
    assert batch.keys[1, :2].tolist() == [0.0, 0.0]
    assert batch.best_row.tolist() == [3, -1]


def test_values_of_rows_lie_in_the_table_where_their_completion_is() -> None:
    batch = collated(two_groups())
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], requires_grad=True)
    table = batch.table(values)
    assert table.tolist() == [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 0.0, 0.0]]
    weights = torch.arange(8.0).view(2, 4)
    (table * weights).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def with_refs(*refs: tuple[float, ...]) -> list[CompletionGroup]:
    ids = [(5, 2), (6, 7, 2), (2,)]
    rows = tuple(completion("plain", i, 0.0, ref=r) for i, r in zip(ids, refs, strict=True))
    return [CompletionGroup("a", "Q", (10,), rows[:2]), CompletionGroup("b", "Q", (10,), rows[2:])]


def test_the_start_policys_log_probabilities_stand_at_their_tokens() -> None:
    batch = collated(with_refs((-1.0, -2.0), (-3.0, -4.0, -5.0), (-6.0,)))
    assert batch.has_ref
    assert batch.ref_logps.tolist() == [[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0], [-6.0, 0.0, 0.0]]


@pytest.mark.parametrize("last", [(), (-6.0, -7.0)])
def test_one_completion_without_them_means_that_the_batch_has_none(last: tuple[float, ...]) -> None:
    batch = collated(with_refs((-1.0, -2.0), (-3.0, -4.0, -5.0), last))
    assert not batch.has_ref
    assert not batch.ref_logps.any()


def test_a_batch_moves_with_all_its_tensors() -> None:
    moved = collated(two_groups()).to("meta")
    values = [*vars(moved).values(), *vars(moved.rows).values()]
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    assert len(tensors) == 13
    assert {t.device.type for t in tensors} == {"meta"}
