"""A prompt that fits the model's context plainly, and not with an instruction on it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from peft import PromptTuningConfig

from neat_align import NEATTrainer
from neat_align.errors import DataError
from neat_align.prompts import instructed_limit
from neat_align.prompts.instruction_banks import load_bank
from neat_align.prompts.row_prompts import instructed_prompt_ids
from neat_align.prompts.rows import Prompt
from small_trainer import ROWS, TOKENIZER, config, trainer
from tiny import MAX_POSITIONS, tiny_model

BANK = load_bank("politeness")
COMPLETION = 10
PLAIN: dict[str, Any] = {"num_positive": 0, "num_negative": 0, "num_plain": 2}
DISTIL: dict[str, Any] = {**PLAIN, "distil_weight": 1.0, "num_plain": 2}
LIMITS: dict[str, Any] = {
    "max_prompt_length": MAX_POSITIONS - COMPLETION,
    "max_completion_length": COMPLETION,
}


def asked(text: str) -> Prompt:
    return [{"role": "user", "content": text}]


def longest(text: str, texts: list[str], placement: str = "user_suffix") -> int:
    """Tokens under the instruction that makes most of them, one by one."""
    return max(len(instructed_prompt_ids(TOKENIZER, asked(text), t, placement)) for t in texts)


def of_tokens(tokens: int, texts: list[str], placement: str = "user_suffix") -> dict[str, Any]:
    """A row whose prompt has so many under its longest instruction."""
    text = "?" * (300 + tokens - longest("?" * 300, texts, placement))
    assert longest(text, texts, placement) == tokens
    return {"prompt": asked(text), "id": f"of {tokens}"}


POSITIVE = [pair.positive for pair in BANK.pairs]
NEGATIVE = [pair.negative for pair in BANK.pairs]
ROOM = MAX_POSITIONS - COMPLETION


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({}, POSITIVE + NEGATIVE),
        ({"num_negative": 0, "num_plain": 1}, POSITIVE),
        ({"num_positive": 0, "num_plain": 1}, NEGATIVE),
        ({"negative_source": "other_prompts", "rank_by": "origin_then_reward"}, POSITIVE),
        (DISTIL, POSITIVE + NEGATIVE),
        ({**PLAIN, "token_weight_scale": 1.0}, POSITIVE + NEGATIVE),
        ({"num_negative": 0, "num_plain": 1, "contrast_from": "branch"}, POSITIVE + NEGATIVE),
    ],
    ids=["both", "positive", "negative", "other prompts", "distil", "token weights", "branch"],
)
def test_what_an_instruction_makes_too_long_is_found_at_the_start(
    tmp_path: Path, changes: dict[str, Any], texts: list[str]
) -> None:
    fits, over = of_tokens(ROOM, texts), of_tokens(ROOM + 1, texts)
    kept = trainer(tmp_path / "a", rows=[fits, *ROWS], **LIMITS, **changes).parts.data.rows
    assert kept[0].id == fits["id"]
    with pytest.raises(DataError) as error:
        trainer(tmp_path / "b", rows=[*ROWS, over], **LIMITS, **changes)
    said = str(error.value)
    assert "row 12: the prompt is 503 tokens with the instruction '" in said
    assert "on it, and the model's context of 512 leaves 502 for it beside" in said
    assert "max_completion_length=10: lower that" in said
    assert "on_bad_row: skip leaves such rows out" in said


def test_such_rows_are_left_out_and_listed(tmp_path: Path) -> None:
    over = of_tokens(ROOM + 1, POSITIVE + NEGATIVE)
    t = trainer(tmp_path, rows=[over, *ROWS], on_bad_row="skip", **LIMITS)
    assert [row.id for row in t.parts.data.rows][:1] != [over["id"]]
    t.train()
    (line,) = (tmp_path / "skipped-rows.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == over["id"]
    assert "503 tokens with the instruction" in json.loads(line)["reason"]


@pytest.mark.parametrize("placement", ["system", "affix"])
def test_wherever_the_instruction_goes(tmp_path: Path, placement: str) -> None:
    texts, changes = POSITIVE + NEGATIVE, {**LIMITS, "instruction_placement": placement}
    trainer(tmp_path / "a", rows=[of_tokens(ROOM, texts, placement), *ROWS], **changes)
    with pytest.raises(DataError, match="503 tokens with the instruction"):
        trainer(tmp_path / "b", rows=[of_tokens(ROOM + 1, texts, placement), *ROWS], **changes)


def test_a_run_that_reads_no_instruction_has_the_whole_context(tmp_path: Path) -> None:
    rows = [of_tokens(ROOM + 1, POSITIVE + NEGATIVE), *ROWS]
    for folder, changes in (
        ("plain", PLAIN),
        ("sharpened", {**DISTIL, "distil_toward": "sharpened"}),
    ):
        t = trainer(tmp_path / folder, rows=rows, **LIMITS, **changes)
        assert len(t.parts.data.rows) == 13


def test_held_out_prompts_need_the_place_where_they_are_contrasted(tmp_path: Path) -> None:
    held = [of_tokens(ROOM + 1, POSITIVE + NEGATIVE), *ROWS[:2]]
    changes: dict[str, Any] = {**LIMITS, **PLAIN, "eval_dataset": held}
    t = trainer(tmp_path / "a", evaluate_contrast=False, **changes)
    assert len(t.parts.data.eval_rows) == 3
    with pytest.raises(DataError, match="503 tokens with the instruction"):
        trainer(tmp_path / "b", evaluate_contrast=True, **changes)


def test_an_adapter_s_own_tokens_take_their_part(tmp_path: Path) -> None:
    texts = POSITIVE + NEGATIVE
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    changes: dict[str, Any] = {**LIMITS, "max_prompt_length": ROOM - 8, "peft_config": adapter}
    trainer(tmp_path / "a", rows=[of_tokens(ROOM - 8, texts), *ROWS], **changes)
    with pytest.raises(DataError, match=r"495 tokens .* context of 504 leaves 494"):
        trainer(tmp_path / "b", rows=[of_tokens(ROOM - 7, texts), *ROWS], **changes)


def test_prompts_that_surely_fit_are_not_rendered_with_every_instruction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start over a million prompts stays linear, and cheap."""
    rendered = []
    real = instructed_limit.instructed_ids

    def counted(tokenizer: Any, row: Any, *rest: Any) -> list[int]:
        rendered.append(row.id)
        return real(tokenizer, row, *rest)

    monkeypatch.setattr(instructed_limit, "instructed_ids", counted)
    near = of_tokens(ROOM, POSITIVE + NEGATIVE)
    trainer(tmp_path, rows=[near, *ROWS], **LIMITS)
    assert rendered == [near["id"]] * 2 * len(BANK.pairs)


def test_a_model_without_a_limit_has_none(tmp_path: Path) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    model.config.max_position_embeddings = 0
    over = of_tokens(ROOM + 1, POSITIVE + NEGATIVE)
    t = trainer(tmp_path, rows=[over, *ROWS], model=model, **LIMITS)
    assert len(t.parts.data.rows) == 13
    assert config(tmp_path, **LIMITS).num_positive == 2


def test_a_start_policy_of_a_smaller_context_reads_the_instructions_too(tmp_path: Path) -> None:
    texts = POSITIVE + NEGATIVE
    for tokens in (400 - COMPLETION, 401 - COMPLETION):
        start, model = (
            tiny_model("llama", len(TOKENIZER), seed, tokenizer=TOKENIZER) for seed in (0, 1)
        )
        start.config.max_position_embeddings = 400
        build = functools.partial(
            NEATTrainer,
            model,
            None,
            config(tmp_path / str(tokens), **{**LIMITS, **DISTIL, "rank_by": "origin"}),
            [of_tokens(tokens, texts), *ROWS],
            processing_class=TOKENIZER,
            ref_model=start,
        )
        if tokens + COMPLETION <= 400:
            assert len(build().parts.data.rows) == 13
        else:
            with pytest.raises(DataError, match=r"391 tokens .* context of 400 leaves 390"):
                build()
