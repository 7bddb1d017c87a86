"""What Trainer would find out after the first round is a ConfigError when the trainer is made.

None of these may sample, call a reward, or raise anything else.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback

from neat_align import ConfigError, NEATConfig
from neat_align.config.trainer_values import CHOICES
from neat_align.evaluation.held_out import Evaluation, metric_names
from neat_align.trainer.neat_trainer import NEATTrainer
from small_trainer import ROWS, TOKENIZER, config, count_e, trainer, weights
from tiny import tiny_model

HELD_OUT = ROWS[:2]
EVERY_EPOCH: dict[str, Any] = {"eval_strategy": "epoch"}
BEST: dict[str, Any] = {"load_best_model_at_end": True, **EVERY_EPOCH}
PACKAGES = "Install the package that it needs"


def never(**_: Any) -> list[float]:
    raise AssertionError("a reward was called")


def make(folder: Path, **changes: Any) -> NEATTrainer:
    return trainer(folder, reward=never, **{"eval_dataset": HELD_OUT, **changes})


def scheduled(name: str, given: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    return {"lr_scheduler_type": name, "lr_scheduler_kwargs": given, **others}


LATE = [
    # ---- optimizers ----
    ({"optim": "adamw_8bit"}, f"optim is adamw_8bit, .*bitsandbytes.*{PACKAGES}"),
    ({"optim": "paged_lion_8bit"}, "optim is paged_lion_8bit, .*bitsandbytes"),
    ({"optim": "galore_adamw"}, "optim is galore_adamw, .*galore"),
    ({"optim": "apollo_adamw"}, "optim is apollo_adamw, .*apollo"),
    ({"optim": "grokadamw"}, "optim is grokadamw, .*grokadamw"),
    ({"optim": "schedule_free_adamw"}, "optim is schedule_free_adamw, .*schedulefree"),
    ({"optim": "adamw_torch_4bit"}, "optim is adamw_torch_4bit, .*torchao"),
    ({"optim": "stable_adamw"}, "optim is stable_adamw, .*optimi"),
    (
        {"optim": "adamw_apex_fused"},
        "optim is 'adamw_apex_fused'; did you mean 'adamw_torch_fused'",
    ),
    ({"optim": "lomo"}, "optim is lomo, which changes the weights at every micro-batch"),
    ({"optim": "adamw"}, "optim is 'adamw'; did you mean "),
    ({"optim": "sgd", "optim_args": "momentum"}, "optim is sgd and optim_args 'momentum'"),
    ({"optim": "sgd", "optim_args": "momentum=x"}, "optim is sgd and optim_args 'momentum=x'"),
    ({"optim": "sgd", "optim_args": "momentun=0.9"}, "optim_args has momentun, which optim sgd"),
    ({"optim_args": "beta1=0.9"}, "optim_args has beta1, which optim adamw_torch_fused does not"),
    ({"optim_target_modules": ["q_proj"]}, "optim_target_modules is read only by galore and"),
    ({"adam_beta1": 1.5}, "adam_beta1 is 1.5; it must be 0 or more and below 1"),
    ({"adam_epsilon": -1.0}, "adam_epsilon is -1.0; it must not be negative"),
    ({"weight_decay": None}, "weight_decay is None; it must be a number"),
    # ---- schedules ----
    (scheduled("cosine_with_min_lr"), "lr_scheduler_type is cosine_with_min_lr with .*min_lr"),
    (scheduled("cosine_warmup_with_min_lr"), "lr_scheduler_type is cosine_warmup_with_min_lr"),
    (
        # Two passes over 12 prompts are 6 rounds of 2 steps, and all of them would warm up.
        scheduled(
            "polynomial", warmup_steps=12, data_passes=2, prompts_per_round=4, num_train_epochs=3
        ),
        "polynomial with .*division by zero",
    ),
    (scheduled("warmup_stable_decay"), "warmup_stable_decay with .*num_decay_steps"),
    (scheduled("cosine", {"num_cycle": 2}), "lr_scheduler_kwargs {'num_cycle': 2}.*num_cycle"),
    (scheduled("linear", {"min_lr": 0.0}), "lr_scheduler_kwargs {'min_lr': 0.0}"),
    (scheduled("constant", {"min_lr": 0.0}), "lr_scheduler_kwargs is not read with .* constant"),
    # Only the part after the warm-up looks at it.
    (scheduled("cosine_with_restarts", {"num_cycles": "x"}, warmup_steps=2), "num_cycles"),
    (scheduled("polynomial", {"lr_end": 1.0}), "lr_scheduler_type is polynomial"),
    (
        scheduled("reduce_lr_on_plateau", **EVERY_EPOCH),
        "metric_for_best_model is loss.*set metric_for_best_model: reward",
    ),
    (
        scheduled("reduce_lr_on_plateau", metric_for_best_model="reward"),
        "reduce_lr_on_plateau requires an eval strategy",
    ),
    (
        scheduled(
            "reduce_lr_on_plateau",
            {"factor": 2.0},
            metric_for_best_model="reward",
            **EVERY_EPOCH,
        ),
        "lr_scheduler_kwargs .*Factor should be < 1.0",
    ),
    (
        scheduled(
            "reduce_lr_on_plateau",
            {"mode": "min"},
            metric_for_best_model="reward",
            **EVERY_EPOCH,
        ),
        "the learning rate would fall while reward gets better",
    ),
    (
        scheduled("greedy", metric_for_best_model="reward", learning_rate=1e-5, **EVERY_EPOCH),
        "greedy would raise it to its own min_lr, which is 0.001",
    ),
    (scheduled("cosin"), "lr_scheduler_type is 'cosin'; did you mean 'cosine'"),
    (scheduled("cosine", "{num_cycles: 1}"), "lr_scheduler_kwargs is '{num_cycles: 1}', .*no JSON"),
    # ---- the metric that is followed ----
    (BEST, "metric_for_best_model is loss.*an evaluation computes no loss"),
    ({**BEST, "metric_for_best_model": "rewards/mean"}, "'rewards/mean', which no evaluation of"),
    ({**BEST, "metric_for_best_model": "eval_rewards"}, "did you mean 'reward'?"),
    ({**BEST, "metric_for_best_model": "judges/vader"}, "'judges/vader', which no evaluation"),
    ({**EVERY_EPOCH, "metric_for_best_model": "accuracy"}, "'accuracy', which no evaluation"),
    (
        {"load_best_model_at_end": True, "metric_for_best_model": "reward", "save_strategy": "no"},
        "eval_strategy is no: nothing would say which model is best",
    ),
    (
        {"save_strategy": "best", "metric_for_best_model": "reward"},
        "save_strategy is best and eval_strategy is no: nothing would ever be saved",
    ),
    (
        {**BEST, "metric_for_best_model": "reward", "save_strategy": "steps"},
        "load_best_model_at_end requires the save and eval strategy to match",
    ),
    ({**EVERY_EPOCH, "eval_dataset": None}, "eval_strategy is epoch and there is nothing to eval"),
    ({"eval_on_start": True, "eval_dataset": None}, "eval_on_start is true and there is nothing"),
    ({"callbacks": [EarlyStoppingCallback()]}, "EarlyStoppingCallback follows a metric of eval"),
    # ---- loggers, kernels, compilers ----
    ({"report_to": "wandb"}, "report_to names wandb, which is not installed"),
    ({"report_to": ["tensorbord"]}, "report_to names 'tensorbord'; did you mean 'tensorboard'"),
    ({"report_to": "flyte"}, "report_to names flyte, which is not installed"),
    ({"report_to": ["none", "all"]}, "report_to lists none among others"),
    ({"use_liger_kernel": True}, "use_liger_kernel is true and there is no liger-kernel"),
    ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config is read only with use_liger"),
    ({"torch_compile_backend": "inductr"}, "torch_compile_backend is 'inductr'; did you mean 'ind"),
    (
        {"torch_compile": True, "torch_compile_mode": "fast"},
        "torch_compile_mode fast.* cannot comp",
    ),
    ({"tf32": True}, "tf32"),
    ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed is set and the package is not"),
    ({"fsdp": "full_shard"}, "fsdp is set and the run is on a CPU: accelerate would"),
    # ---- the loop ----
    ({"train_sampling_strategy": "group_by_length"}, "it must be one of random, sequential"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; it must be 1 or more"),
    ({"save_strategy": "steps", "save_steps": 0}, "save_steps is 0; it must be a number of steps"),
    ({"eval_strategy": "steps", "eval_steps": 1.5}, "eval_steps must be an integer if bigger"),
    ({"max_steps": 0}, "max_steps is 0; it must be a number of optimizer steps, or -1"),
    ({"max_steps": 1.5}, "max_steps is 1.5; it must be a whole number"),
    ({"log_level": "loud"}, "log_level is 'loud'; it must be one of critical, debug"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1; it must not be negative"),
    ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor can only be set when"),
    (
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"},
        "processes are started by spawn here, which cannot hand them a round's groups",
    ),
    (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"reentrant": True}},
        "gradient_checkpointing_kwargs.* is {'reentrant': True}.*reentrant",
    ),
    (
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"every_n_layers": 0},
        },
        "every_n_layers must be a whole number of 1 or more",
    ),
    (
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
        r"activation_checkpointing_kwargs \(gradient_checkpointing_kwargs\) is read only with",
    ),
    ({"accelerator_config": {"split_batch": True}}, "accelerator_config has 'split_batch'; did"),
    ({"accelerator_config": "nowhere.json"}, "accelerator_config names 'nowhere.json'"),
    ({"bf16": "no"}, "bf16 is 'no'; it must be true or false"),
    ({"num_positive": 1.5}, "num_positive is 1.5; it must be a whole number"),
    ({"prompts_per_round": [4]}, r"prompts_per_round is \[4\]; it must be a whole number"),
    ({"max_prompt_length": True}, "max_prompt_length is True; it must be a whole number"),
    ({"save_total_limit": -1}, "save_total_limit is -1; it must be a number of checkpoints"),
]


@pytest.mark.parametrize(("changes", "message"), LATE, ids=lambda v: str(v)[:60])
def test_what_trainer_would_find_out_late_is_said_when_it_is_made(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **changes)


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_a_word_that_is_none_of_an_options_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is 'nothing-like-it'; it must be one of "):
        NEATConfig(output_dir="run", **{name: "nothing-like-it"})


@pytest.mark.parametrize("folder", ["", "file/run"])
def test_a_folder_that_cannot_be_made_is_said_before_a_model_is_loaded(
    folder: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir is "):
        trainer(tmp_path, reward=never, output_dir=folder and str(tmp_path / folder))


# ---- what works still works, and nothing is changed by trying it ---------------------------------

WORKS = [
    {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
    {"optim": "adafactor"},
    {"optim": "adagrad"},
    scheduled("cosine_with_min_lr", {"min_lr": 1e-6}),
    scheduled("warmup_stable_decay", {"num_decay_steps": 2}),
    scheduled("reduce_lr_on_plateau", metric_for_best_model="reward", **EVERY_EPOCH),
    scheduled("greedy", {"min_lr": 0.0}, metric_for_best_model="kl", greater_is_better=False)
    | EVERY_EPOCH,
    {**BEST, "metric_for_best_model": "eval_pair_accuracy"},
    {"save_strategy": "best", "metric_for_best_model": "perplexity", **EVERY_EPOCH},
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    {"report_to": "all"},
    {"dataloader_num_workers": 1},
    {"max_grad_norm": 0.0, "save_total_limit": None},
    {"adam_beta1": 0, "learning_rate": 1, "per_device_train_batch_size": 2.0},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", WORKS, ids=lambda v: str(v)[:60])
def test_options_that_work_train_a_round(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = {"eval_dataset": HELD_OUT, "evaluate_contrast": False, "prompts_per_round": 4}
    t = trainer(tmp_path, **{**settings, **changes})
    assert t.optimizer is None
    assert t.lr_scheduler is None
    t.train()
    assert t.state.global_step == 2


def test_the_schedule_is_that_of_all_passes_over_the_data(tmp_path: Path) -> None:
    """Three rounds, which num_train_epochs would say, are 6 steps."""
    passes = {"data_passes": 2, "num_train_epochs": 3, "prompts_per_round": 4}
    trainer(tmp_path, **scheduled("polynomial", warmup_steps=6), **passes)


def test_trying_changes_no_weight_and_no_random_state(tmp_path: Path) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    torch.manual_seed(3)
    t = trainer(tmp_path, model=model, optim="adagrad", activation_checkpointing=True)
    before, numbers = weights(t), torch.random.get_rng_state()
    from neat_align.trainer.startup_checks import rehearse

    rehearse(t, t.parts.plan.optimizer_steps)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert all(torch.equal(v, before[k]) for k, v in weights(t).items())
    assert not t.policy.is_activation_checkpointing
    assert all(p.grad is None for p in t.policy.parameters())


def test_an_optimizer_of_the_users_own_keeps_its_rate(tmp_path: Path) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    own = torch.optim.SGD(model.parameters(), lr=0.5)
    args = config(tmp_path, warmup_steps=4, lr_scheduler_type="linear", optim="adamw_8bit")
    t = NEATTrainer(model, count_e, args, ROWS, processing_class=TOKENIZER, optimizers=(own, None))
    assert t.optimizer is own
    assert own.param_groups[0]["lr"] == 0.5
    assert "initial_lr" not in own.param_groups[0]


def test_a_plateau_is_looked_for_in_the_direction_in_which_the_metric_gets_better() -> None:
    """transformers' own default takes a reward that rises for one that got worse."""
    for metric, better, mode in (("reward", None, "max"), ("kl", False, "min")):
        c = NEATConfig(
            output_dir="run",
            lr_scheduler_type="reduce_lr_on_plateau",
            metric_for_best_model=metric,
            greater_is_better=better,
            **EVERY_EPOCH,
        )
        assert c.lr_scheduler_kwargs == {"mode": mode}


# ---- names of metrics ----------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("answers", [False, True])
def test_the_names_that_may_be_followed_are_those_that_an_evaluation_has(
    answers: bool, contrast: bool, tmp_path: Path
) -> None:
    rows = HELD_OUT if answers else [{"prompt": row["prompt"]} for row in HELD_OUT]
    t = trainer(
        tmp_path,
        eval_dataset=rows,
        evaluate_contrast=contrast,
        judge_funcs=[count_e],
        max_completion_length=40,
        prompts_per_round=4,
        eval_strategy="epoch",
    )
    t.train()
    assert t.last_evaluation is not None
    names = metric_names(t.parts.data.eval_rows, ["count_e"], rewards=["a"], contrast=contrast)
    assert set(names) == set(t.last_evaluation.summary())
    assert "kl" in names
    without = metric_names(t.parts.data.eval_rows, [], rewards=[], contrast=contrast)
    assert set(names) - set(without) == {
        "reward",
        "judges/count_e",
        "contrast/reward/plain",
        *(("contrast/reward/positive", "contrast/reward/negative") if contrast else ()),
    }


def test_an_evaluation_without_the_followed_metric_counts_as_no_improvement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer(
        tmp_path, eval_dataset=HELD_OUT, metric_for_best_model="reward", prompts_per_round=4, **BEST
    )
    real = Evaluation.summary

    def without_reward(self: Evaluation) -> dict[str, float]:
        return {k: v for k, v in real(self).items() if k != "reward"}

    monkeypatch.setattr(Evaluation, "summary", without_reward)
    t.train()
    assert t.state.global_step == 2
    assert t.state.best_model_checkpoint is None
    assert math.isnan(t.evaluate()["eval_reward"])
    assert "before_reward" not in t.evaluate(metric_key_prefix="before")
