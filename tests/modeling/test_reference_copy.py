"""The copy of the start policy: made where something reads it, and no larger than it need be."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

import neat_align.sampling.policies as policies_module
from neat_align import NEATTrainer
from neat_align.errors import ConfigError
from neat_align.modeling.logprobs import score_completions
from neat_align.modeling.precision import held_in, linear_weights
from neat_align.modeling.reference import not_kept
from small_trainer import ROWS, TOKENIZER, lora, trainer
from tiny import FAMILIES, Family, tiny_model

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
ANSWERS = [[12, 13, 14], [15, 16]]


def scored(model: torch.nn.Module, layout: Any = "packed") -> list[tuple[float, ...]]:
    return score_completions(
        model,
        PROMPTS,
        ANSWERS,
        layout=layout,
        pad_token_id=0,
        autocast_dtype=torch.bfloat16,
    )


# ---- in the compute type -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_in_bf16_says_the_same_under_autocast_to_the_bit(
    family: Family, layout: Any
) -> None:
    model = tiny_model(family, len(TOKENIZER)).eval().requires_grad_(False)
    expected, size = scored(model, layout), sum(p.numel() for p in linear_weights(model))
    assert held_in(model, torch.bfloat16)
    assert scored(model, layout) == expected
    half = [p for p in model.parameters() if p.dtype == torch.bfloat16]
    assert sum(p.numel() for p in half) == size
    assert size > 0.3 * sum(p.numel() for p in model.parameters())
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Module)
    assert next(embeddings.parameters()).dtype == torch.float32


class ReadsAWeight(torch.nn.Module):
    """Reads a linear layer's weight without the layer: autocast has no part in that."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return x.float() @ self.inner.weight.float().T


def test_a_copy_that_would_say_something_else_stays_fp32(tmp_path: Path) -> None:
    model: Any = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    model.model.layers[0].mlp.up_proj = ReadsAWeight(model.model.layers[0].mlp.up_proj)
    t = trainer(tmp_path, model=model, bf16=True, kl_weight=1.0)
    with t.parts.setup.reference() as start:
        assert {p.dtype for p in start.parameters()} == {torch.float32}
        assert scored(start) == scored(t.policy)


def test_without_autocast_the_copy_is_exact(tmp_path: Path) -> None:
    t = trainer(tmp_path, kl_weight=1.0)
    with t.parts.setup.reference() as start:
        assert {p.dtype for p in start.parameters()} == {torch.float32}


# ---- none where nothing reads it -----------------------------------------------------------------

NEEDS: dict[str, dict[str, Any]] = {
    "kl": {"kl_weight": 0.1},
    "dpo": {"ranking_loss": "dpo"},
    "kto": {"ranking_loss": "kto"},
    "npo": {"negative_penalty": "npo", "negative_weight": 1.0},
    "distillation": {"distil_weight": 1.0, "num_plain": 1},
    "token weights": {"token_weight_scale": 1.0},
    "drift": {"drift_prompts": 2},
    "negatives of the start": {"negative_policy": "initial"},
    "evaluations": {"eval_dataset": ROWS[:2]},
}
NEEDS_NOT: dict[str, dict[str, Any]] = {
    "ranking by reward": {},
    "distillation of the current policy": {
        "distil_weight": 1.0,
        "num_plain": 1,
        "distil_teacher": "current",
    },
    "no evaluation of those rows": {"eval_dataset": ROWS[:2], "num_eval_prompts": 0},
    "the contrast of the current policy": {"reward": "contrast"},
}


@pytest.mark.parametrize("need", NEEDS)
def test_a_copy_is_kept_where_something_reads_it(tmp_path: Path, need: str) -> None:
    t = trainer(tmp_path, **NEEDS[need])
    assert t.parts.policies.keeps_start
    with t.parts.setup.reference() as start:
        assert start is not t.policy


@pytest.mark.parametrize("need", NEEDS_NOT)
def test_no_copy_is_made_where_nothing_reads_it_and_the_run_is_the_same(
    tmp_path: Path, need: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer(tmp_path / "without", num_train_epochs=2, prompts_per_round=4, **NEEDS_NOT[need])
    assert t.parts.setup.reference is not_kept
    t.train()
    monkeypatch.setattr("neat_align.NEATConfig.needs_start_policy", lambda self, evaluates: True)
    kept = trainer(tmp_path / "with", num_train_epochs=2, prompts_per_round=4, **NEEDS_NOT[need])
    assert kept.parts.policies.keeps_start
    kept.train()
    for name, weight in kept.policy.state_dict().items():
        assert torch.equal(weight, t.policy.state_dict()[name]), name
    for index in range(2):
        assert t.make_round(index).groups == kept.make_round(index).groups


def test_an_adapter_needs_no_copy(tmp_path: Path) -> None:
    t = trainer(tmp_path, peft_config=lora(), kl_weight=1.0)
    with t.parts.setup.reference() as start:
        assert start is t.policy


def test_an_evaluation_on_rows_that_come_later_says_that_it_has_no_kl(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    t = trainer(tmp_path / "a", prompts_per_round=4)
    t.train()
    metrics = t.evaluate(ROWS[:2])
    assert "eval_kl" not in metrics
    assert "this evaluation has no KL: the start policy was not kept" in caplog.text
    judged = trainer(tmp_path / "b", reward="contrast", prompts_per_round=4)
    judged.evaluate(ROWS[:2])  # the policy is the start still
    judged.train()
    with pytest.raises(
        ConfigError, match=r"judges by contrast .* pass eval_dataset to NEATTrainer"
    ):
        judged.evaluate(ROWS[:2])


# ---- the copy that samples -----------------------------------------------------------------------


class CopiesAlive(TrainerCallback):
    def __init__(self, made: list[Any]) -> None:
        self.made = made
        self.alive: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.alive.append(sum(r() is not None for r in self.made))


MEASURED = {"eval_dataset": ROWS[:2], "eval_strategy": "epoch", "drift_prompts": 2}


@pytest.mark.parametrize(
    ("peft", "more", "copies"), [(False, {}, 2), (True, {}, 2), (False, MEASURED, 7)]
)
def test_the_copy_that_samples_is_let_go_before_training(
    tmp_path: Path, peft: bool, more: Any, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    copy = policies_module.half_precision_copy

    def watched(model: PreTrainedModel, dtype: torch.dtype) -> Any:
        copied = copy(model, dtype)
        made.append(weakref.ref(copied))
        return copied

    monkeypatch.setattr(policies_module, "half_precision_copy", watched)
    seen = CopiesAlive(made)
    more = {"peft_config": lora()} if peft else more
    t: NEATTrainer = trainer(tmp_path, bf16=True, callbacks=[seen], num_train_epochs=2, **more)
    gc.disable()  # what only the collector lets go may stay for long
    try:
        t.train()
    finally:
        gc.enable()
    assert len(made) == copies
    assert seen.alive == [0] * len(seen.alive)
