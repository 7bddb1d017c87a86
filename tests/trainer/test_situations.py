"""Situations in which other trainers were reported to fail, and that no other test here holds.

`docs/peer_reports.md` names the reports.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from neat_align import NEATTrainer
from neat_align.rewards.resolve import resolve_rewards
from small_trainer import ROWS, TOKENIZER, config, count_e, logged, trainer, weights
from tiny import tiny_model, tiny_tokenizer


def with_tokenizer(folder: Path, tokenizer: Any, *, rows: Any = ROWS, **changes: Any) -> Any:
    model = tiny_model("llama", len(tokenizer), tokenizer=tokenizer)
    args = config(folder, **changes)
    return NEATTrainer(model, length, args, rows, processing_class=tokenizer)


def length(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def sampled(t: NEATTrainer) -> list[tuple[int, ...]]:
    return [c.token_ids for group in t.make_round(0).groups for c in group.completions]


# ---- sampling ------------------------------------------------------------------------------------


def test_checkpointing_and_a_model_without_cache_do_not_change_what_is_sampled(
    tmp_path: Path,
) -> None:
    plain = sampled(trainer(tmp_path / "plain"))
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    t = trainer(tmp_path / "checkpointing", model=model, gradient_checkpointing=True)
    assert sampled(t) == plain


def test_every_end_token_that_the_model_lists_ends_an_answer(tmp_path: Path) -> None:
    plain = sampled(trainer(tmp_path / "one", use_human_completions=False))
    plain = [ids[:-1] for ids in plain]
    common = max({t for ids in plain for t in ids}, key=lambda t: sum(t in ids for ids in plain))
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, common]
    t = trainer(tmp_path / "two", model=model, use_human_completions=False)
    answers = [c for g in t.make_round(0).groups for c in g.completions]
    assert any(c.token_ids[-1] == common for c in answers)
    for c in answers:
        assert common not in c.token_ids[:-1]
        assert (c.finish_reason == "stop") == (c.token_ids[-1] in (TOKENIZER.eos_token_id, common))


def test_tokens_that_the_tokenizer_has_not_are_kept_as_they_were_drawn(tmp_path: Path) -> None:
    """Models have more rows than their tokenizer has tokens; such a row can be drawn."""
    model = tiny_model("llama", len(TOKENIZER) + 64, tokenizer=TOKENIZER)
    t = trainer(tmp_path, model=model)
    t.train()
    assert max(max(ids) for ids in sampled(t)) >= len(TOKENIZER)


@pytest.mark.parametrize(
    "drawn", [{"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 20, "top_p": 0.9}]
)
def test_at_the_first_step_the_policy_is_at_its_start_however_it_is_sampled(
    tmp_path: Path, drawn: dict[str, Any]
) -> None:
    trainer(tmp_path, kl_weight=1.0, per_device_train_batch_size=8, **drawn).train()
    first = next(line for line in logged(tmp_path) if "loss" in line)
    assert first["loss/kl"] == pytest.approx(0, abs=1e-9)


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", ["chatml", "none"])
def test_a_beginning_stands_once_before_the_prompt_and_never_before_an_answer(
    tmp_path: Path, template: Any, bos: bool
) -> None:
    tokenizer = tiny_tokenizer(template, bos=bos)
    text = [{"prompt": f"Q{i}:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(4)]
    rows = ROWS[:4] if template == "chatml" else text
    t = with_tokenizer(tmp_path, tokenizer, rows=rows, prompts_per_round=4)
    for group in t.make_round(0).groups:
        assert group.prompt_ids.count(tokenizer.bos_token_id) == bos
        assert (group.prompt_ids[0] == tokenizer.bos_token_id) == bos
        human = [c for c in group.completions if c.origin in ("chosen", "rejected")]
        assert len(human) == 2
        for answer in human:
            assert tokenizer.bos_token_id not in answer.token_ids
            assert None not in answer.token_ids


def test_how_the_tokenizer_pads_and_cuts_by_default_changes_nothing(tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.padding_side, other.truncation_side, other.model_max_length = "left", "left", 8
    other._tokenizer.enable_truncation(5)
    other._tokenizer.enable_padding(length=40)
    by_default = sampled(with_tokenizer(tmp_path / "a", tiny_tokenizer()))
    assert sampled(with_tokenizer(tmp_path / "b", other)) == by_default


# ---- data and rewards ----------------------------------------------------------------------------


def test_a_streamed_data_set_is_read(tmp_path: Path) -> None:
    def stream() -> Iterator[dict[str, Any]]:
        yield from ROWS[:6]

    t = trainer(tmp_path, rows=datasets.IterableDataset.from_generator(stream), prompts_per_round=4)
    t.train()
    assert len(t.parts.data.rows) == 6
    assert t.state.global_step == 2


def test_every_prompt_of_a_round_is_learned_from_where_batches_do_not_divide_it(
    tmp_path: Path,
) -> None:
    t = trainer(tmp_path, rows=ROWS[:5], prompts_per_round=5, per_device_train_batch_size=2)
    learned: list[str] = []
    collate = t.parts.engine.micro_batch

    def noting(groups: Any) -> Any:
        learned.extend(group.prompt_id for group in groups)
        return collate(groups)

    t.parts.engine.micro_batch = noting
    t.train()
    assert sorted(learned) == sorted(row.id for row in t.parts.data.rows)
    assert t.state.global_step == t.steps_per_round == 3


def test_rewards_that_abstain_now_and_then_leave_no_nan_in_a_metric(tmp_path: Path) -> None:
    given: list[float | None] = []

    def now_and_then(completions: list[Any], **columns: Any) -> list[float | None]:
        scores = [None if i % 3 == 0 else float(i % 5) for i in range(len(completions))]
        given.extend(scores)
        return scores

    trainer(tmp_path, reward=[now_and_then, count_e], logging_steps=2).train()
    lines = logged(tmp_path)
    numbers = [v for line in lines for v in line.values() if isinstance(v, float)]
    assert all(map(math.isfinite, numbers))
    said = [score for score in given if score is not None]
    (mean,) = [line[key] for line in lines for key in line if key == "rewards/now_and_then/mean"]
    assert mean == pytest.approx(sum(said) / len(said))


def test_rewards_without_a_name_of_their_own_have_one() -> None:
    class Judge:
        def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
            return length(completions)

        def score(self, completions: list[Any], **columns: Any) -> list[float]:
            return length(completions)

    rewards = resolve_rewards([functools.partial(length), Judge(), Judge().score], None)
    assert [r.name for r in rewards] == ["length", "Judge", "score"]


# ---- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["auto", "off"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(
    tmp_path: Path, sharing: str, reentrant: bool | None
) -> None:
    def moved(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
        )
        t = trainer(
            tmp_path / name,
            peft_config=lora,
            per_device_train_batch_size=8,
            optim="sgd",
            max_grad_norm=0.0,
            prefix_sharing=sharing,
            **changes,
        )
        before = weights(t)
        t.train()
        layers = [m for m in t.policy.modules() if isinstance(m, GradientCheckpointingLayer)]
        assert [layer.gradient_checkpointing for layer in layers] == [bool(changes)] * 2
        return {k: v - before[k] for k, v in weights(t).items() if "lora_" in k}

    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    plain = moved("plain")
    checkpointed = moved("c", gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert len(plain) == 8
    for name, step in plain.items():
        assert step.abs().max() > 0, name
        assert torch.allclose(checkpointed[name], step, atol=1e-6), name


def test_logged_losses_count_each_step_once_whatever_its_number_of_batches(tmp_path: Path) -> None:
    """Three batches make the first step and one the second; one line for both is their mean."""

    def lines(name: str, steps: int) -> list[dict[str, float]]:
        folder = tmp_path / name
        settings: dict[str, Any] = {"prompts_per_round": 4, "gradient_accumulation_steps": 3}
        t = trainer(
            folder, rows=ROWS[:4], per_device_train_batch_size=1, logging_steps=steps, **settings
        )
        t.train()
        assert t.state.global_step == 2
        return [line for line in logged(folder) if "loss" in line]

    first, second = lines("each", 1)
    (both,) = lines("both", 2)
    for name in ("loss", "loss/ranking", "loss/lm", "loss/kl"):
        assert both[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-5), name


# ---- saving --------------------------------------------------------------------------------------


def test_what_is_saved_has_the_template_and_generates_with_its_cache(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{# changed by hand #}"
    t = with_tokenizer(tmp_path, tokenizer, gradient_checkpointing=True)
    t.train()
    t.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-4"):
        back = AutoTokenizer.from_pretrained(folder)
        assert back.chat_template == tokenizer.chat_template
        assert (back.eos_token, back.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    widths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3)
    assert widths == [3, 1, 1]
