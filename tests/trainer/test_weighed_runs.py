"""Runs whose ranking loss weighs tokens by their contrast, on tiny real models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from crashes import Crash, crash_in_second_round
from neat_align import NEATTrainer
from neat_align.errors import ConfigError, PromptError
from small_trainer import (
    ROWS,
    TOKENIZER,
    assert_same_weights,
    config,
    count_e,
    logged,
    lora,
    trainer,
    weights,
)
from tiny import Family, alone, tiny_model

WEIGHED: dict[str, Any] = {"token_weight_scale": 1.0, "token_weight_pairs": 2}
TWO_ROUNDS: dict[str, Any] = {**WEIGHED, "num_train_epochs": 2, "generation_batch_size": 8}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "use_lora"), [("llama", False), ("gpt2", True)])
def test_contrasts_are_the_start_policys_own_also_after_steps(
    tmp_path: Path, family: Family, *, use_lora: bool
) -> None:
    """In the second round, which a trained policy samples; row by row, without padding."""
    more: dict[str, Any] = {"peft_config": lora()} if use_lora else {}
    t = trainer(tmp_path, family, **TWO_ROUNDS, **more)
    t.train()
    start = tiny_model(family, len(TOKENIZER), tokenizer=TOKENIZER).eval()
    seen = 0
    for group in t.make_round(1).groups[:3]:
        assert len(group.contrast_ids) == 2
        for c in group.completions:
            by_pair = [
                [
                    p - n
                    for p, n in zip(
                        alone(start, positive, c.token_ids),
                        alone(start, negative, c.token_ids),
                        strict=True,
                    )
                ]
                for positive, negative in group.contrast_ids
            ]
            expected = [sum(es) / 2 for es in zip(*by_pair, strict=True)]
            assert c.contrasts == pytest.approx(expected, abs=1e-4)
            seen += len(expected)
    assert seen > 20


@pytest.mark.parametrize("loss", ["logistic", "dpo"])
def test_it_trains_otherwise_than_without_weights(tmp_path: Path, loss: str) -> None:
    ends = []
    for name, changes in (("plain", {}), ("weighed", WEIGHED)):
        t = trainer(tmp_path / name, ranking_loss=loss, **changes)
        before = weights(t)
        t.train()
        ends.append(weights(t))
        assert any(not torch.equal(v, before[k]) for k, v in ends[-1].items())
        lines = [line for line in logged(tmp_path / name) if "loss/ranking" in line]
        assert all(0 <= line["ranking/accuracy"] <= 1 for line in lines)
        assert lines
    assert any(not torch.equal(v, ends[0][k]) for k, v in ends[1].items())


@pytest.mark.slow
def test_a_kill_between_two_batches_of_scores_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(tmp_path / "whole", **TWO_ROUNDS)
    whole.train()
    with monkeypatch.context() as patch:
        crash_in_second_round(patch, "write_scored", 1)
        with pytest.raises(Crash):
            trainer(tmp_path / "cut", **TWO_ROUNDS).train()
    resumed = trainer(tmp_path / "cut", **TWO_ROUNDS)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(whole, resumed)


def test_a_run_cannot_begin_without_weights_and_go_on_with_them(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    again: NEATTrainer = trainer(tmp_path, **WEIGHED, num_train_epochs=2)
    with pytest.raises(ConfigError, match=r"token_weight_scale was 0\.0 and is 1\.0"):
        again.train(resume_from_checkpoint=True)


def test_a_run_distils_and_weighs_at_once(tmp_path: Path) -> None:
    """Each reads its own number of pairs of those that the groups keep."""
    more: dict[str, Any] = {"distil_weight": 0.5, "distil_pairs": 3, "num_plain": 1}
    t = trainer(tmp_path, **WEIGHED, **more)
    t.train()
    assert {len(g.contrast_ids) for g in t.make_round(0).groups} == {3}
    (lines,) = [line for line in logged(tmp_path) if "loss/distil" in line][-1:]
    assert lines["loss/distil"] > 0


@pytest.mark.parametrize("reads", [{"token_weight_scale": 1.0}, {"distil_weight": 1.0}])
def test_a_template_that_drops_the_instruction_is_refused_for_plain_answers_too(
    tmp_path: Path, reads: dict[str, Any]
) -> None:
    """Nothing is sampled under an instruction, but the contrast would be 0 at every token."""
    deaf = copy.deepcopy(TOKENIZER)
    deaf.chat_template = (
        "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    plain: dict[str, Any] = {"num_positive": 0, "num_negative": 0, "num_plain": 4}
    for placement, refused in (("system", True), ("user_suffix", False)):
        given = config(tmp_path / placement, **plain, **reads, instruction_placement=placement)
        model = tiny_model("llama", len(deaf), tokenizer=deaf)

        def build(given: Any = given, model: Any = model) -> NEATTrainer:
            return NEATTrainer(model, count_e, given, ROWS, processing_class=deaf)

        if refused:
            with pytest.raises(PromptError, match="drops or changes the system instruction"):
                build()
        else:
            build()
