"""Ranks that hold parts of a model's weights make the same passes, whatever their shares are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launch import launch
from neat_align.modeling.lockstep import class_of, is_sharded, lockstep
from neat_align.sampling.policy_now import weights_version
from tiny import tiny_model
from two_shards import CASES, LAYOUTS, SHARES, case, leaves

EVERYTHING = [0, 1, 2, 3, 4]


def test_a_whole_model_is_stepped_with_nobody() -> None:
    model = tiny_model("llama", 96)
    assert not is_sharded(model)
    assert class_of(model) is type(model)
    before = len(model._forward_pre_hooks)
    with lockstep(model, model), lockstep(model):
        assert len(model._forward_pre_hooks) == before


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("shards")
    launch("two_shards.py", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _, _ in CASES])
def test_uneven_and_empty_shares_give_what_one_process_gives(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    _, family, adapter = next(c for c in CASES if c[0] == name)
    reference, model = case(family, adapter=adapter)
    model.eval()
    alone = leaves(model, reference, lambda _: EVERYTHING)
    for shares, (first, second) in SHARES.items():
        assert len(first) + len(second) == len(EVERYTHING)
        key = f"sample {shares}"
        together = [*ranks[0][name][key], *ranks[1][name][key]]
        for (ids, logprob), (expected_ids, expected) in zip(together, alone[key], strict=True):
            assert ids == expected_ids
            assert logprob == pytest.approx(expected, rel=1e-6)
        for layout in LAYOUTS:
            key = f"score {shares} {layout}"
            scored = [*ranks[0][name][key], *ranks[1][name][key]]
            for row, expected_row in zip(scored, alone[key], strict=True):
                assert row == pytest.approx(expected_row, rel=1e-6)
            key = f"divergence {shares} {layout}"
            found = [*ranks[0][name][key], *ranks[1][name][key]]
            assert found == pytest.approx(alone[key], rel=1e-6)
            assert min(found) > 0


@pytest.mark.distributed
@pytest.mark.slow
def test_an_error_on_one_rank_reaches_it_and_leaves_the_others_to_finish(
    ranks: list[dict[str, Any]],
) -> None:
    for name, _, _ in CASES:
        assert ranks[0][f"{name} error"] == "went on"
        assert ranks[1][f"{name} error"] == "the second rank fails"


@pytest.mark.distributed
@pytest.mark.slow
def test_ranks_whose_passes_are_of_different_models_take_turns(
    ranks: list[dict[str, Any]],
) -> None:
    """One rank scores with the policy, then the start policy; the other the other way round."""
    for name, _, _ in CASES:
        (policy, start), (start_first, policy_second) = (r[f"{name} turns"] for r in ranks)
        assert policy == pytest.approx(policy_second, rel=1e-6)
        assert start == pytest.approx(start_first, rel=1e-6)
        assert policy != pytest.approx(start, rel=1e-3)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("name", "family", "adapter"), CASES)
def test_weights_are_gathered_as_one_process_has_them(
    name: str, family: str, adapter: bool, ranks: list[dict[str, Any]]
) -> None:
    _, model = case(family, adapter=adapter)
    expected = model.state_dict()
    for rank in ranks:
        found = rank[f"{name} gathered"]
        for kind, dtype in (("weights", torch.double), ("halves", torch.half)):
            assert found[kind].keys() == expected.keys()
            for weight, value in expected.items():
                assert torch.equal(found[kind][weight], value.to(dtype)), weight
        assert found["version"] == weights_version(model)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("how", ["gone", "stuck"])
def test_a_rank_that_is_gone_or_stuck_is_an_error_on_the_others(tmp_path: Path, how: str) -> None:
    """The one that is stuck goes on when the other has given up, after the limit that was set."""
    launch("two_shards.py", tmp_path, how)
    said = (tmp_path / "gone.txt").read_text()
    assert said.startswith("another process is gone, or is stuck, while all of them were to make")
