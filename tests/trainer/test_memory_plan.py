"""The estimate of a run's memory against what is measured, and what is decided by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import LlamaConfig, TrainerCallback
from typer.testing import CliRunner

import neat_align.trainer.memory_plan as memory_plan
from measured_memory import TensorMemory
from neat_align import NEATTrainer
from neat_align.cli import app
from neat_align.modeling.device import free_bytes
from neat_align.modeling.memory_estimate import (
    GIB,
    NF4_BYTES,
    Divided,
    RunShape,
    estimate_memory,
)
from neat_align.modeling.model_shape import shape_of, shape_of_model
from neat_align.trainer.memory_plan import MemoryPlan, plan_memory
from neat_align.trainer.setup import read_data, set_up_policy
from small_trainer import ROWS, TOKENIZER, config, lora, trainer
from tiny import random_model, save_tiny, tiny_model

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def small_llama(layers: int = 3) -> Any:
    """Wide enough that weights and activations are the memory, not lists of lengths."""
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return random_model(config)


# ---- against what is measured --------------------------------------------------------------------


class Phases(TrainerCallback):
    """Marks the peak of every training step, apart from everything else."""

    def __init__(self, memory: TensorMemory) -> None:
        self.memory = memory

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.memory.mark("round")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.memory.mark("step")


def measured(t: NEATTrainer, memory: TensorMemory) -> dict[str, int]:
    """The peaks of a run, with all that is held while it goes on."""
    with memory:
        for p in t.policy.parameters():
            memory.see(p)
        if t.parts.policies.keeps_start:
            with t.parts.setup.reference() as start:
                for p in start.parameters():
                    memory.see(p)
        t.train()
    memory.mark("round")
    return memory.marks


def planned(t: NEATTrainer) -> MemoryPlan:
    data = t.parts.data
    rows, lengths = data.rows, data.prompt_lengths
    return plan_memory(t.args, t.policy, rows, lengths, evaluates=bool(data.eval_rows))


CASES: dict[str, dict[str, Any]] = {
    "all weights": {"bf16": True, "kl_weight": 1.0},
    "all weights in fp32": {"gradient_accumulation_steps": 2},
    "padded rows": {"bf16": True, "prefix_sharing": "off"},
    "an adapter": {"bf16": True, "adapter": True},
    "checkpointing": {"activation_checkpointing": True},
    "an adapter, checkpointing": {
        "bf16": True,
        "adapter": True,
        "activation_checkpointing": True,
        "prefix_sharing": "off",
    },
}


# These always, the others with the slow tests.
QUICK = ("all weights in fp32", "an adapter, checkpointing")


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(tmp_path: Path, case: str) -> None:
    options = {**CASES[case]}
    if options.pop("adapter", False):
        options["peft_config"] = lora()
    memory = TensorMemory()
    t = trainer(
        tmp_path,
        model=small_llama(),
        callbacks=[Phases(memory)],
        save_strategy="no",
        use_human_completions=False,
        max_completion_length=64,
        prompts_per_round=4,
        num_train_epochs=2,  # in the second, the optimizer's state is there while it samples
        per_device_train_batch_size=2,
        **options,
    )
    estimate, marks = planned(t).estimate, measured(t, memory)
    assert estimate.training == pytest.approx(marks["step"], rel=0.15)
    assert estimate.total == pytest.approx(max(marks.values()), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_the_estimate_is_within_15_percent_on_the_demos_model(
    tmp_path: Path, adapter: bool
) -> None:
    from neat_align.cli.options import options_from
    from neat_align.errors import ConfigError
    from neat_align.pipeline import build_trainer

    options: dict[str, Any] = {
        "model_name_or_path": "demo",
        "dataset_name": "demo",
        "holdout": 0,
        "reward_funcs": ["vader"],
        "output_dir": str(tmp_path / "run"),
        "prompts_per_round": 4,
        "num_train_epochs": 2,
        "max_completion_length": 24,  # nearly every answer is longer
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "drift_prompts": 0,
        "use_peft": adapter,
        "disable_tqdm": True,
    }
    memory = TensorMemory()
    try:
        t = build_trainer(*options_from(options), [Phases(memory)])
    except ConfigError as error:
        pytest.skip(f"the demo's model is not here: {error}")
    estimate, marks = planned(t).estimate, measured(t, memory)
    print(json.dumps({"estimate": vars(estimate), "total": estimate.total, "measured": marks}))
    assert estimate.total == pytest.approx(max(marks.values()), rel=0.15)


# ---- the arithmetic ------------------------------------------------------------------------------


def test_the_shape_of_a_large_model_is_counted_without_its_weights() -> None:
    shape = shape_of(LLAMA_8B)
    assert shape.parameters == 8_030_261_248  # as published
    attention, mlp = 4096 * (4096 * 2 + 1024 * 2), 3 * 4096 * 14336
    assert shape.linear == 32 * (attention + mlp)
    assert shape.head == 128256 * 4096
    # q, o: 4096 + 4096; k, v: 4096 + 1024; gate, up, down: 4096 + 14336
    assert shape.lora(16) == 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert (shape.query_width, shape.key_width) == (4096, 1024)


def test_weights_gradients_and_optimizer_by_hand() -> None:
    shape = shape_of(LLAMA_8B)
    n = shape.parameters
    full = estimate_memory(shape, RunShape())
    assert (full.weights, full.gradients, full.optimizer) == (4 * n, 4 * n, 8 * n)
    # The head is a linear layer of its own here, so all but embeddings and norms are narrow.
    wide = 128256 * 4096 + 65 * 4096
    assert full.reference == 2 * (n - wide) + 4 * wide
    adapter = shape.lora(16)
    run = RunShape(trained=adapter, linear_bytes=2, other_bytes=2, keeps_copy=False)
    lora8b = estimate_memory(shape, run)
    assert lora8b.weights == 2 * n + 4 * adapter
    assert (lora8b.gradients, lora8b.optimizer) == (4 * adapter, 8 * adapter)
    assert lora8b.reference == 0
    nf4 = estimate_memory(shape, replace(run, linear_bytes=NF4_BYTES))
    assert nf4.weights == pytest.approx(
        0.5625 * shape.linear + 2 * (n - shape.linear) + 4 * adapter
    )


@pytest.mark.parametrize(
    ("sharding", "weights", "gradients", "optimizer"),
    [("none", 1, 2, 1), ("optimizer", 1, 1, 1 / 8), ("gradients", 1, 1 / 8, 1 / 8)],
)
def test_ranks_divide_what_their_way_of_sharding_divides(
    sharding: Divided, weights: float, gradients: float, optimizer: float
) -> None:
    """Beside one process; DDP keeps gradients in buckets as well."""
    shape = shape_of(LLAMA_8B)
    alone = estimate_memory(shape, RunShape())
    one_of_8 = estimate_memory(shape, RunShape(world_size=8, sharding=sharding))
    assert one_of_8.weights == weights * alone.weights
    assert one_of_8.gradients == gradients * alone.gradients
    assert one_of_8.optimizer == optimizer * alone.optimizer
    assert one_of_8.activations == alone.activations


def test_sharded_weights_are_whole_for_a_layer_at_a_time() -> None:
    shape = shape_of(LLAMA_8B)
    alone = estimate_memory(shape, RunShape())
    sharded = estimate_memory(shape, RunShape(world_size=64, sharding="weights"))
    gathered = 2 * (shape.linear / 32 + shape.head)  # bf16: a layer, and the head
    assert sharded.weights == pytest.approx(alone.weights / 64 + gathered)
    assert sharded.reference == alone.reference / 64
    assert sharded.gradients == alone.gradients / 64


@settings(max_examples=60, deadline=None)
@given(
    trained=st.sampled_from([None, 10**6]),
    compute=st.sampled_from([2, 4]),
    packed=st.booleans(),
    groups=st.integers(1, 16),
    prompt=st.integers(1, 2000),
    own=st.integers(1, 2000),
    completions=st.integers(1, 8),
)
def test_more_of_anything_never_takes_less_and_checkpointing_never_more(
    trained: int | None,
    compute: int,
    packed: bool,
    groups: int,
    prompt: int,
    own: int,
    completions: int,
) -> None:
    shape = shape_of_model(_META)
    run = RunShape(
        trained=trained,
        compute_bytes=compute,
        packed=packed,
        groups=groups,
        micro_batch_tokens=10**9,
        prompt_tokens=prompt,
        completion_tokens=own,
        completions=completions,
    )
    size = estimate_memory(shape, run)
    for more in (
        {"groups": groups + 1},
        {"prompt_tokens": prompt + 50},
        {"completion_tokens": own + 50},
        {"completions": completions + 1},
    ):
        assert estimate_memory(shape, replace(run, **more)).training >= size.training
    shared = estimate_memory(shape, replace(run, checkpointing=True))
    assert shared.activations <= size.activations
    assert shared.sampling == size.sampling
    assert all(value >= 0 for value in vars(size).values())


_META = random_model(LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=100))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_shape_is_the_same_from_the_model_its_adapter_and_its_configuration(family: Any) -> None:
    from peft import get_peft_model

    model = tiny_model(family, len(TOKENIZER))
    shape = shape_of(model.config)
    assert shape == shape_of_model(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    adapted = get_peft_model(model, lora())
    assert shape_of_model(adapted) == shape
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    if family != "gpt2":  # peft does not take its Conv1D for a linear layer's shape
        assert trained == shape.lora(4)


# ---- what is decided and said --------------------------------------------------------------------


def room(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    monkeypatch.setattr(memory_plan, "free_bytes", lambda device: size)


def wide(path: Path, **options: Any) -> NEATTrainer:
    model = small_llama(layers=6)
    return trainer(path, model=model, max_completion_length=64, save_strategy="no", **options)


@pytest.mark.slow
def test_checkpointing_is_on_where_the_run_would_not_fit_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = planned(wide(tmp_path / "plan"))
    less = plan.with_checkpointing().estimate.total
    held = 4 * plan.shape.parameters  # what is there already does not count as free
    between = int((plan.estimate.total + less) / 2) - held
    room(monkeypatch, between)
    t = wide(tmp_path / "on")
    assert t.args.activation_checkpointing is True
    assert t.args.gradient_checkpointing is True
    assert "activation checkpointing is on: the run would take about" in caplog.text
    assert "estimated to take" not in caplog.text
    t.train()
    assert t.policy.is_activation_checkpointing
    room(monkeypatch, None)
    off = wide(tmp_path / "off")
    assert off.args.activation_checkpointing is False
    off.train()
    for name, weight in off.policy.state_dict().items():
        assert torch.allclose(weight, t.policy.state_dict()[name], atol=1e-5), name


def test_who_says_no_is_warned_and_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room(monkeypatch, 1)
    t = wide(tmp_path, activation_checkpointing=False)
    assert t.args.activation_checkpointing is False
    assert "this run is estimated to take" in caplog.text
    assert "set activation_checkpointing: true, or lower max_tokens_per_micro_batch" in caplog.text


def test_a_run_that_fits_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    t = trainer(tmp_path)
    assert t.args.activation_checkpointing is False
    assert "estimated" not in caplog.text


@pytest.mark.parametrize(
    ("how", "needs", "copied"),
    [
        ("full", True, True),
        ("full", False, False),
        ("new adapter", True, False),
        ("own adapter", True, True),
        ("own adapter", False, False),
        ("given", False, True),
    ],
)
def test_a_copy_is_counted_where_one_was_made(
    tmp_path: Path, how: str, needs: bool, copied: bool
) -> None:
    """Also of a model that comes with an adapter, which may hold something already."""
    model: Any = small_llama()
    if how == "own adapter":
        model = get_peft_model(model, lora())
    args, ref = config(tmp_path, kl_weight=0.1 if needs else 0.0), None
    if how == "given":
        ref = small_llama()
    peft_config = lora() if how == "new adapter" else None
    data = read_data(args, ROWS, None, ())
    setup, _ = set_up_policy(args, model, data, TOKENIZER, peft_config, ref)
    assert memory_plan._has_copy(setup) is copied


def test_loading_counts_the_processes_that_hold_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights are divided. fp32, and a start policy beside them: 8 bytes a weight."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    model = small_llama()
    weights = sum(p.numel() for p in model.parameters())
    args = config(tmp_path, kl_weight=0.1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    lengths = [20] * len(ROWS)
    plan = plan_memory(args, model, [], lengths, evaluates=False)
    assert plan.loading is not None
    assert (plan.loading.processes, plan.loading.size) == (8, 8 * 8 * weights)
    small = replace(plan, loading=replace(plan.loading, room=10))
    said = "\n".join(small.lines())
    assert "at most, of the machine's: 8 processes hold the whole model" in said
    assert "less than that; cpu_ram_efficient_loading: true has one process load it" in said
    args.loads_once = True  # type: ignore[misc]
    one = plan_memory(args, model, [], lengths, evaluates=False)
    assert one.loading is not None
    assert (one.loading.processes, one.loading.size) == (1, 8 * weights)
    assert "one process holds the whole model" in "\n".join(one.lines())
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert plan_memory(args, model, [], lengths, evaluates=False).loading is None  # it stays


def test_free_memory_is_that_of_the_device() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is not None
    assert 2**20 < free < 2**50
    assert free_bytes(torch.device("meta")) is None


# ---- --dry-run -----------------------------------------------------------------------------------


def dry(folder: Path, *more: str) -> Any:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ["--dataset_name", str(rows), "--reward_funcs", "vader", "--holdout", "2"]
    options += ["--output_dir", str(folder / "run"), "--max_prompt_length", "64"]
    return CliRunner().invoke(app, ["train", "--dry-run", *options, *more])


def figures(output: str) -> dict[str, float]:
    """GiB by name."""
    lines = [line for line in output.splitlines() if line.startswith("  ") and " GiB" in line]
    return {line[2:15].strip(): float(line[15:].split()[0]) for line in lines}


def test_a_dry_run_says_plan_and_memory_and_writes_nothing(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "m", "llama"))
    before = sorted(p.name for p in tmp_path.iterdir())
    result = dry(tmp_path, "--model_name_or_path", folder, "--prompts_per_round", "4")
    assert result.exit_code == 0, result.output
    assert "plan: 3 rounds of 4 prompts, 3 optimizer steps" in result.output
    assert "12 completions" in result.output or "48 completions" in result.output
    assert figures(result.output).keys() == {
        *("weights", "optimizer", "start policy", "gradients"),
        *("activations", "logits", "sampling", "at most", "free"),
    }
    assert "time: at most about " in result.output
    assert "2 prompts, answered as in the first round, not scored:" in result.output
    answers = result.output.partition("not scored:\n")[2].splitlines()
    assert sum(line.startswith("  prompt   What do you say") for line in answers) == 2
    assert sum(line.startswith("  positive ") for line in answers) == 2
    assert sum("(negative, folded away)" in line for line in answers) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "rows.jsonl"])


def test_a_configuration_is_enough_and_an_8b_model_takes_what_it_should(tmp_path: Path) -> None:
    folder = tmp_path / "llama-8b"
    LLAMA_8B.save_pretrained(folder)  # no weights, no tokenizer
    result = dry(tmp_path, "--model_name_or_path", str(folder), "--generation_copy", "never")
    assert result.exit_code == 0, result.output
    n = 8_030_261_248
    full = figures(result.output)
    assert full["weights"] == full["gradients"] == pytest.approx(4 * n / GIB, abs=1e-3)
    assert full["optimizer"] == pytest.approx(8 * n / GIB, abs=1e-3)
    assert "it does not fit: " in result.output
    assert "activation checkpointing would be on" in result.output
    assert result.output.splitlines()[-1] == "not tried, since it does not fit"
    adapter = ["--use_peft", "true", "--dtype", "bfloat16"]
    result = dry(tmp_path, "--model_name_or_path", str(folder), *adapter)
    half = figures(result.output)
    assert half["weights"] == pytest.approx((2 * n + 4 * 16 * 32 * 81920) / GIB, abs=1e-3)
    assert half["start policy"] == 0
    four = figures(
        dry(
            tmp_path, "--model_name_or_path", str(folder), *adapter, "--load_in_4bit", "true"
        ).output
    )
    assert four["weights"] < 0.4 * half["weights"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dtype", "bfloat16"], "dtype is bfloat16 and the weights are trained"),
        (
            ["--model_name_or_path", "/nowhere"],
            "the model /nowhere: there is no such file or folder",
        ),
        (["--num_plain", "-1"], "num_plain is -1; it must not be negative"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    tmp_path: Path, more: list[str], message: str
) -> None:
    folder = str(save_tiny(tmp_path / "m", "llama"))
    result = dry(tmp_path, "--model_name_or_path", folder, *more)
    assert result.exit_code != 0
    assert message in str(result.exception)
