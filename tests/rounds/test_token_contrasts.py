"""Contrasts of tokens that a round keeps, where they weigh tokens in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import pytest

import small_rounds
from neat_align.errors import CollapseError
from neat_align.files.atomic import write_table
from neat_align.prompts.instruction_banks import InstructionBank, InstructionPair
from neat_align.rounds.completions import groups_to_table, read_groups
from neat_align.rounds.group_file import GroupFile
from neat_align.rounds.params import RoundTools
from neat_align.sampling.protocol import Sample, SampleRequest
from small_rounds import TOKENIZER, Seeded, letters, rows, scores

PAIRS = tuple(InstructionPair(f"Be kind {k}.", f"Be rude {k}.") for k in range(4))
BANK = InstructionBank("b", "", PAIRS)
PARAMS = replace(
    small_rounds.PARAMS, use_human_completions=True, contrast_pairs=3, weighing_pairs=2
)
run = partial(small_rounds.run, p=PARAMS, data=rows(5, "so it is", "no"))


class Short(Seeded):
    def answer(self, request: SampleRequest, limit: int) -> Sample:
        return Sample(letters(request.seed, 2 + request.seed % 4), "length", -1.0)


def contrast(prompt: Sequence[int], token: int) -> float:
    """A token's log-probability after a prompt: of the instruction's text and of the token."""
    text = TOKENIZER.decode(prompt)
    for k in range(len(PAIRS)):
        if f"kind {k}" in text:
            return -(token % 7) * (k + 1) / 3
        if f"rude {k}" in text:
            return -(token % 5) * (k + 1) / 3
    return -0.25


class Counted:
    """Log-probabilities, and under which prompts they were asked for."""

    def __init__(self) -> None:
        self.prompts: list[tuple[int, ...]] = []

    def __call__(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        self.prompts += [tuple(p) for p in prompts]
        return [
            tuple(contrast(prompt, t) for t in ids)
            for prompt, ids in zip(prompts, completions, strict=True)
        ]


def tools(**more: Any) -> RoundTools:
    return small_rounds.tools(Short(), **{"bank": BANK, "start_logprobs": Counted(), **more})


@pytest.mark.parametrize("weighing", [1, 2, 3])
def test_every_completion_keeps_the_mean_contrast_of_the_first_pairs(
    tmp_path: Path, weighing: int
) -> None:
    made = run(tmp_path, tools(), p=replace(PARAMS, weighing_pairs=weighing))
    origins = set()
    for g in made.groups:
        assert len(g.contrast_ids) == 3
        for c in g.completions:
            origins.add(c.origin)
            expected = [
                sum(contrast(p, t) - contrast(n, t) for p, n in g.contrast_ids[:weighing])
                / weighing
                for t in c.token_ids
            ]
            assert c.contrasts == pytest.approx(expected, abs=1e-6)
            assert any(c.contrasts)
    assert origins == {"positive", "negative", "plain", "chosen", "rejected"}


def test_a_round_says_how_much_contrast_its_answers_have(tmp_path: Path) -> None:
    made = run(tmp_path, tools())
    for origin in ("positive", "negative", "plain", "chosen", "rejected"):
        own = [fmean(c.contrasts) for g in made.groups for c in g.completions if c.origin == origin]
        found = made.metrics[f"sampling/token_contrast/{origin}"]
        assert found == pytest.approx(fmean(own))
    silent = run(tmp_path / "off", tools(), p=replace(PARAMS, weighing_pairs=0))
    assert not any("token_contrast" in name for name in silent.metrics)


def test_a_small_bank_gives_the_pairs_that_it_has(tmp_path: Path) -> None:
    t = replace(tools(), bank=InstructionBank("one", "", PAIRS[:1]))
    for g in run(tmp_path, t).groups:
        ((positive, negative),) = g.contrast_ids
        for c in g.completions:
            expected = [contrast(positive, t) - contrast(negative, t) for t in c.token_ids]
            assert c.contrasts == pytest.approx(expected, abs=1e-6)


def test_nothing_is_asked_for_where_nothing_is_weighed(tmp_path: Path) -> None:
    t = tools()
    made = run(tmp_path, t, p=replace(PARAMS, weighing_pairs=0))
    assert t.start_logprobs.prompts == []  # type: ignore[union-attr]
    assert all(c.contrasts == () for g in made.groups for c in g.completions)


def test_without_a_function_that_scores_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need start_logprobs: pass a function"):
        run(tmp_path, tools(start_logprobs=None))


@pytest.mark.parametrize("bad", ["kind", "rude"])
def test_a_contrast_that_is_not_finite_stops_the_round(tmp_path: Path, bad: str) -> None:
    def broken(prompts: Any, completions: Any) -> list[tuple[float, ...]]:
        return [
            tuple(float("nan") if bad in TOKENIZER.decode(p) else -1.0 for _ in ids)
            for p, ids in zip(prompts, completions, strict=True)
        ]

    name = {"kind": "positive", "rude": "negative"}[bad]
    with pytest.raises(CollapseError, match=f"under the {name} instruction of .* id-"):
        run(tmp_path, tools(start_logprobs=broken))


# ---- rounds that were interrupted ----------------------------------------------------------------


def flaky(after: int) -> Any:
    """A reward that fails once it was called so often."""
    calls = 0

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls > after:
            raise ConnectionError("away")
        return scores(completion_ids)

    return reward


@pytest.mark.parametrize("after", [1, 3])
def test_a_half_scored_round_goes_on_where_it_stopped(tmp_path: Path, after: int) -> None:
    whole = run(tmp_path / "whole", tools())
    with pytest.raises(Exception, match="away"):
        run(tmp_path / "cut", tools(reward=flaky(after)))
    t = tools()
    again = run(tmp_path / "cut", t)
    assert list(again.groups) == list(whole.groups)
    assert again.metrics == whole.metrics
    name = "groups.parquet"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    asked = len(t.start_logprobs.prompts)  # type: ignore[union-attr]
    each = sum(len(g.completions) for g in whole.groups) * 2 * PARAMS.weighing_pairs
    assert 0 < asked < each  # what was finished is not scored again


def test_stored_scores_without_contrasts_are_made_again(tmp_path: Path) -> None:
    """A group that was stored without them, by whatever wrote it."""
    whole = run(tmp_path / "whole", tools())
    with pytest.raises(Exception, match="away"):
        run(tmp_path / "cut", tools(reward=flaky(3)))
    stored = sorted((tmp_path / "cut").rglob("scored-*.parquet"))
    assert len(stored) == 3
    table = groups_to_table(read_groups(stored[1]), ["r"])
    write_table(stored[1], table.drop_columns(["token_contrasts"]))
    assert list(run(tmp_path / "cut", tools()).groups) == list(whole.groups)


def test_a_round_that_weighs_nothing_is_decided_as_before() -> None:
    plain = replace(PARAMS, weighing_pairs=0)
    assert "weighing_pairs" not in plain.deciding()
    assert PARAMS.deciding()["weighing_pairs"] == 2


def test_a_file_of_an_earlier_version_has_no_contrasts(tmp_path: Path) -> None:
    groups = list(run(tmp_path / "round", tools()).groups)
    path = tmp_path / "old.parquet"
    write_table(path, groups_to_table(groups, ["r"]).drop_columns(["token_contrasts"]))
    expected = [
        replace(g, completions=tuple(replace(c, contrasts=()) for c in g.completions))
        for g in groups
    ]
    assert read_groups(path) == list(GroupFile(path)) == expected
    assert "token_contrasts" in pq.read_schema(tmp_path / "round" / "groups.parquet").names
