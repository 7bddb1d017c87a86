"""Runs whose positive and negative answers branch from plain ones, on tiny real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crashes import Crash, crash_in_second_round
from neat_align import NEATTrainer
from neat_align.errors import ConfigError
from neat_align.prompts.row_prompts import instructed_ids
from neat_align.rounds.completions import Completion, CompletionGroup
from small_trainer import TOKENIZER, assert_same_weights, config, logged, lora, trainer, weights
from tiny import Family, alone, tiny_model

BRANCH: dict[str, Any] = {
    "contrast_from": "branch",
    "num_plain": 2,
    "num_positive": 1,
    "num_negative": 1,
}
EOS = 2


def of(group: CompletionGroup, origin: str) -> list[Completion]:
    return [c for c in group.completions if c.origin == origin]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("placement", ["user_suffix", "affix"])
def test_answers_branch_where_the_models_own_contrast_is_highest(
    tmp_path: Path, family: Family, placement: str
) -> None:
    t = trainer(tmp_path, family, **BRANCH, instruction_placement=placement)
    rows = {row.id: row for row in t.parts.data.rows}
    model = tiny_model(family, len(TOKENIZER), tokenizer=TOKENIZER).eval()
    seen = 0
    for group in t.make_round(0).groups:
        for c in (*of(group, "positive"), *of(group, "negative")):
            plain = of(group, "plain")
            if not plain or plain[0].index != 0 or c.instruction is None:
                continue  # the answer that it branched from was left out
            (other,) = (o for o in ("positive", "negative") if o != c.origin)
            partner = of(group, other)
            if not partner or partner[0].instruction is None:
                continue
            own, others = (
                tuple(instructed_ids(TOKENIZER, rows[group.prompt_id], text, placement))
                for text in (c.instruction, partner[0].instruction)
            )
            answer = plain[0].token_ids
            contrast = [
                abs(a - b)
                for a, b in zip(
                    alone(model, own, answer), alone(model, others, answer), strict=True
                )
            ]
            assert c.branch_at is not None
            assert contrast[c.branch_at] == pytest.approx(max(contrast), abs=1e-4)
            assert c.token_ids[: c.branch_at] == answer[: c.branch_at]
            assert 0 < len(c.token_ids) <= 10
            assert EOS not in c.token_ids[:-1]
            logprob = sum(alone(model, own, c.token_ids))
            assert c.sampling_logprob == pytest.approx(logprob, abs=1e-3)
            seen += 1
    assert seen > 8


@pytest.mark.parametrize("use_lora", [False, True])
def test_it_trains_and_says_how_much_was_kept(tmp_path: Path, *, use_lora: bool) -> None:
    more: dict[str, Any] = {"peft_config": lora()} if use_lora else {}
    t = trainer(tmp_path, **BRANCH, num_train_epochs=2, **more)
    before = weights(t)
    t.train()
    assert any(not torch.equal(v, before[k]) for k, v in weights(t).items())
    lines = [line for line in logged(tmp_path) if "round/groups" in line]
    assert len(lines) == 2
    for line in lines:
        assert 0 < line["sampling/branch_position"] < 10
        assert 0 < line["sampling/branch_shared"] < 1
    for index in range(2):
        for group in t.make_round(index).groups:
            kept = {c.branch_at for c in group.completions if c.origin in ("positive", "negative")}
            assert len(kept) <= 1  # a pair shares its beginning
            beginnings = {
                c.token_ids[: c.branch_at] for c in group.completions if c.branch_at is not None
            }
            assert len(beginnings) <= 1


CUT: dict[str, Any] = {
    **BRANCH,
    "num_train_epochs": 2,
    "prompts_per_round": 4,
    "generation_batch_size": 4,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> NEATTrainer:
    """A run that nobody interrupts."""
    t = trainer(tmp_path_factory.mktemp("whole"), **CUT)
    t.train()
    return t


@pytest.mark.parametrize("stage", ["write_samples 1", "write_branches 0", "write_samples 2"])
def test_a_kill_between_the_two_stages_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: NEATTrainer, stage: str
) -> None:
    """In the second round: among plain answers, before and after where they branch is stored."""
    method, after = stage.split()
    with monkeypatch.context() as patch:
        crash_in_second_round(patch, method, int(after))
        with pytest.raises(Crash):
            trainer(tmp_path, **CUT).train()
    resumed = trainer(tmp_path, **CUT)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(whole, resumed)
    groups = Path("rounds", "00001", "groups.parquet")
    assert (tmp_path / groups).read_bytes() == (whole.output_dir / groups).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrast_from": "token"}, "contrast_from is 'token'; it must be one of prompt, branch"),
        (
            {**BRANCH, "num_plain": 0},
            "contrast_from is branch but num_plain is 0: there is no plain answer to branch from",
        ),
        (
            {**BRANCH, "num_positive": 0, "num_negative": 0},
            "contrast_from is branch but num_positive and num_negative are 0: nothing would branch",
        ),
        (
            {**BRANCH, "negative_source": "other_prompts", "rank_by": "origin"},
            "contrast_from is branch and negative_source is other_prompts: an answer to another "
            "prompt shares no beginning",
        ),
        (
            {**BRANCH, "negative_policy": "initial"},
            "contrast_from is branch and negative_policy is initial: the current policy would "
            "write a negative's beginning and the start policy the rest",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize("alone_with", ["num_positive", "num_negative"])
def test_one_side_alone_may_branch(tmp_path: Path, alone_with: str) -> None:
    counts = {"num_positive": 0, "num_negative": 0, alone_with: 2}
    assert config(tmp_path, **{**BRANCH, **counts}).num_generations == 4


def test_a_run_cannot_begin_whole_and_go_on_with_branches(tmp_path: Path) -> None:
    whole = {**BRANCH, "contrast_from": "prompt"}
    trainer(tmp_path, **whole).train()
    again: NEATTrainer = trainer(tmp_path, **BRANCH, num_train_epochs=2)
    with pytest.raises(ConfigError, match="contrast_from was 'prompt' and is 'branch'"):
        again.train(resume_from_checkpoint=True)
