"""What a dry run shows of its answers costs as little as it can, and is what the round says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import neat_align.sampling.policies as policies
from neat_align.cli import dry_run
from neat_align.cli.options import options_from
from neat_align.cli.run_state import asked_and_answered, fills_its_line, quoted
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.sampling.protocol import Sampler
from neat_align.trainer.round_maker import RoundMaker
from small_trainer import ROWS, trainer
from tiny import save_tiny

ANSWER = Completion("plain", 0, "", (1, 2), finish_reason="length", seed=1)


@pytest.mark.parametrize(
    ("changes", "fills"),
    [
        ({"text": "a" * 64}, False),
        ({"text": "a" * 65}, True),
        ({"text": " a" * 33}, True),  # 65 without the first space
        ({"text": "a" + " " * 100 + "b"}, False),  # spaces are one
        ({"text": "a", "finish_reason": "stop"}, True),
        ({"text": "a", "origin": "negative"}, True),
    ],
)
def test_an_answer_fills_its_line_when_more_of_it_would_not_be_seen(
    changes: dict[str, Any], fills: bool
) -> None:
    assert fills_its_line(replace(ANSWER, **changes)) is fills


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab é漢👍\n", min_size=40, max_size=120), cut=st.integers(1, 400))
def test_a_line_that_is_filled_stays_as_it_is(text: str, cut: int) -> None:
    """Cut between bytes, as tokens of a byte-level vocabulary are."""
    part = text.encode()[:cut].decode(errors="replace")
    if fills_its_line(replace(ANSWER, text=part)):
        assert quoted(replace(ANSWER, text=part)) == quoted(replace(ANSWER, text=text))


class Counting:
    """A round maker that notes how many answers and tokens each trial draws."""

    def __init__(self, maker: RoundMaker) -> None:
        self._maker = maker
        self.drawn: list[tuple[int, int]] = []

    def trial(
        self, prompts: int, sampler: Sampler, *, at_most: int | None = None
    ) -> list[CompletionGroup]:
        groups = self._maker.trial(prompts, sampler, at_most=at_most)
        sampled = [c for g in groups for c in g.completions if c.seed is not None]
        self.drawn.append((len(sampled), max(len(c.token_ids) for c in sampled)))
        return groups


@pytest.mark.parametrize(
    ("tokens", "trials"),
    [
        # Of 2 prompts, one positive, one negative and one plain answer, long enough for a line …
        (96, [(6, 96)]),
        # … and too short for one: then as a round draws them.
        (2, [(6, 2), (10, 128)]),
    ],
)
def test_the_answers_are_the_rounds_with_no_more_drawn_than_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, trials: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(dry_run, "TRIED_TOKENS", tokens)
    made = trainer(tmp_path, num_positive=2, num_negative=2, num_plain=1, max_completion_length=128)
    maker: Any = Counting(made.parts.round_maker)
    sampler = made.parts.policies.sampler()
    groups = dry_run._answered(made.args, maker, sampler)
    shown = [asked_and_answered(group) for group in groups]
    assert maker.drawn == trials
    whole = made.parts.round_maker.trial(2, sampler)
    assert shown == [asked_and_answered(group) for group in whole]
    assert [len(lines) for lines in shown] == [4, 4]  # the prompt and an answer of each origin


def test_answers_that_branch_are_drawn_whole(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        contrast_from="branch",
        num_positive=1,
        num_negative=1,
        num_plain=1,
        max_completion_length=12,
    )
    maker: Any = Counting(made.parts.round_maker)
    dry_run._answered(made.args, maker, made.parts.policies.sampler())
    assert len(maker.drawn) == 1


def test_data_and_tokenizer_are_read_once_and_the_policy_is_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[object] = []

    def copied(*given: Any) -> Any:
        copies.append(given)
        return policies_copy(*given)

    policies_copy = policies.half_precision_copy
    monkeypatch.setattr(policies, "half_precision_copy", copied)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    script, args = options_from(
        {
            "model_name_or_path": str(save_tiny(tmp_path / "m", "llama")),
            "dataset_name": str(rows),
            "reward_funcs": ["vader"],
            "output_dir": str(tmp_path / "run"),
            "bf16": True,
            "generation_copy": "always",
            "max_prompt_length": 64,
            "max_completion_length": 8,
            "holdout": 0,
        }
    )
    plan = dry_run.planned(script, args)
    assert plan.untried is None
    monkeypatch.setattr("neat_align.pipeline.load_data", None)
    monkeypatch.setattr("neat_align.modeling.loading.AutoTokenizer", None)
    lines = list(dry_run.tried(script, args, plan.read))
    assert any(line.startswith("time: at most about ") for line in lines)
    assert "2 prompts, answered as in the first round, not scored:" in lines
    assert len(copies) == 1
