"""NEATTrainer on tiny random models: gradients, rounds, resume, limits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, TrainerCallback

from neat_align import (
    CollapseError,
    ConfigError,
    DataError,
    NEATTrainer,
    PromptError,
    RewardError,
)
from neat_align.cli.progress import PrintGroups, terminal_callbacks
from neat_align.learning.batches import collate_groups
from neat_align.learning.objective import LossCounts, loss_terms, micro_batch_of
from neat_align.modeling.layout import choose_layout
from neat_align.modeling.loading import load_policy
from neat_align.modeling.requirements import disable_dropout
from neat_align.rounds import params, round_files
from neat_align.sampling.policies import Policies
from small_trainer import (
    ROWS,
    TOKENIZER,
    StopAt,
    assert_same_weights,
    config,
    count_e,
    logged,
    lora,
    trainer,
    weights,
)
from tiny import FAMILIES, Family, save_tiny, tiny_model, tiny_tokenizer

# ---- the gradient ----


@pytest.mark.parametrize("loss", ["hinge", "logistic", "listwise", "dpo", "kto"])
def test_accumulating_one_group_at_a_time_is_one_big_batch(tmp_path: Path, loss: str) -> None:
    """1×8 = 8×1 with groups of unequal size (leaks, duplicates and cut targets make them so): same
    weights after a step.
    """
    # Two rows have no human answers, so groups differ in size and some have no language-modelling
    # target.
    rows = [row if i % 3 else {"prompt": row["prompt"]} for i, row in enumerate(ROWS)]
    extra = {
        "ranking_loss": loss,
        "rows": rows,
        "negative_penalty": "unlikelihood",
        "negative_weight": 0.5,
        "kl_weight": 0.1,
    }
    big = trainer(
        tmp_path / "big", per_device_train_batch_size=8, gradient_accumulation_steps=1, **extra
    )
    small = trainer(
        tmp_path / "small", per_device_train_batch_size=1, gradient_accumulation_steps=8, **extra
    )
    start = weights(big)
    for t in (big, small):
        t.create_optimizer()
        t.optimizer = torch.optim.SGD(t.policy.parameters(), lr=1.0)
        t.train()
    sizes = {len(g.completions) for g in big.rounds.groups}
    assert len(sizes) > 1, "the test needs unequal groups"
    assert big.state.global_step == small.state.global_step == 1
    moved = 0.0
    for name, value in weights(big).items():
        torch.testing.assert_close(weights(small)[name], value, rtol=1e-4, atol=1e-6)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-4
    a, b = (next(line for line in logged(tmp_path / n) if "loss" in line) for n in ("big", "small"))
    for name in ("loss", "loss/ranking", "loss/lm", "loss/negative", "loss/kl", "ranking/accuracy"):
        assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_any_layout_and_token_budget_make_the_same_step(
    tmp_path: Path, family: Family, checkpointing: bool
) -> None:
    """Packed in one micro-batch, packed in many, padded: same weights after a step, and the same
    loss is logged.
    """
    rows = [row if i % 3 else {"prompt": row["prompt"]} for i, row in enumerate(ROWS)]
    ways: dict[str, dict[str, Any]] = {
        "packed": {},
        "cut": {"max_tokens_per_micro_batch": 120},
        "padded": {"prefix_sharing": "off"},
    }
    found = {}
    for name, way in ways.items():
        t = trainer(
            *(tmp_path / name, family),
            rows=rows,
            per_device_train_batch_size=8,
            kl_weight=0.1,
            gradient_checkpointing=checkpointing,
            **way,
        )
        t.create_optimizer()
        t.optimizer = torch.optim.SGD(t.policy.parameters(), lr=1.0)
        t.train()
        assert t.parts.policies.layout == ("padded" if name == "padded" else "packed")
        line = next(line for line in logged(tmp_path / name) if "loss" in line)
        found[name] = (weights(t), line)
    start = weights(trainer(tmp_path / "start", family))
    expected, line = found["padded"]
    for name in ("packed", "cut"):
        for key, value in expected.items():
            torch.testing.assert_close(found[name][0][key], value, rtol=1e-4, atol=1e-5)
        for metric in (
            "loss",
            "loss/ranking",
            "loss/lm",
            "loss/kl",
            "ranking/accuracy",
            "logps/negative",
        ):
            assert found[name][1][metric] == pytest.approx(line[metric], rel=1e-4, abs=1e-5)
    assert max(float((v - start[k]).abs().max()) for k, v in expected.items()) > 1e-3
    tokens = {name: line["packing/tokens_per_micro_batch"] for name, (_, line) in found.items()}
    assert tokens["cut"] < 120 < tokens["packed"] < tokens["padded"]
    assert 0 < found["packed"][1]["packing/padding_fraction"] < 1


@pytest.mark.parametrize("loss", ["hinge", "logistic", "listwise", "dpo", "kto"])
def test_the_gradient_of_a_negative_pushes_its_own_log_probability_down(
    tmp_path: Path, loss: str
) -> None:
    t = trainer(tmp_path, ranking_loss=loss, **({"hinge_margin": 5.0} if loss == "hinge" else {}))
    made = t.make_round(0)
    group = made.groups[0]
    # Make a negative the worst of its group, whatever this random model wrote.
    ranked = [
        replace(c, reward=-1.0 if c.origin == "negative" and c.index == 0 else float(i))
        for i, c in enumerate(group.completions)
    ]
    group = replace(group, completions=tuple(ranked))
    batch = collate_groups([group], pad_token_id=0, rank_by="reward", lm_on_bad_origins=False)
    worst = min(range(len(group.completions)), key=lambda i: group.completions[i].reward or 0.0)
    before = torch.tensor(
        [
            c.policy_logprobs + (0.0,) * (batch.ref_logps.shape[1] - len(c.policy_logprobs))
            for c in group.completions
        ]
    )
    logps = before.clone().requires_grad_()
    objective = t.parts.engine.objective
    micro_batch = micro_batch_of(batch, objective)
    terms = loss_terms(micro_batch, logps, LossCounts(1, 1, 1, 1, 1), objective)
    (gradient,) = torch.autograd.grad(terms.ranking, logps)
    # Descending the gradient lowers every token of the worst completion, and touches no padding.
    length = len(group.completions[worst].token_ids)
    assert (gradient[worst, :length] > 0).all()
    assert (gradient[worst, length:] == 0).all()


def test_a_small_learning_rate_moves_fp32_weights_under_bf16_autocast(tmp_path: Path) -> None:
    t = trainer(tmp_path, bf16=True, learning_rate=1e-5)
    start = weights(t)
    t.train()
    moved = [name for name, value in weights(t).items() if not torch.equal(value, start[name])]
    assert len(moved) > len(start) / 2


def test_trainable_weights_held_in_bf16_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER).to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"held in bfloat16.*dtype=torch.float32"):
        trainer(tmp_path, model=model)


# ---- rounds ----


@pytest.mark.parametrize("family", FAMILIES)
def test_one_epoch_is_one_round_sampled_from_the_current_policy(
    tmp_path: Path, family: Family
) -> None:
    t = trainer(tmp_path, family, num_train_epochs=2)
    t.train()
    first, second = t.make_round(0), t.make_round(1)  # read back, not made again
    assert t.state.global_step == 8
    assert [g.prompt_id for g in first.groups] != [g.prompt_id for g in second.groups]
    lines = [line for line in logged(tmp_path) if "round" in line]
    assert [line["round"] for line in lines] == [0, 1]
    assert {
        "reward",
        "reward_std",
        "rewards/count_e/mean",
        "contrast/reward_gap",
        "contrast/inversion_rate",
    } <= set(lines[0])
    step = next(line for line in logged(tmp_path) if "loss" in line)
    assert {
        "loss/ranking",
        "loss/lm",
        "ranking/accuracy",
        "ranking/active_pair_fraction/negative",
        "logps/negative",
    } <= set(step)
    assert step["loss"] == pytest.approx(step["loss/ranking"] + step["loss/lm"], rel=1e-5)
    # The first round's completions are the start policy's: under the plain prompt both
    # log-probabilities are one.
    assert all(c.policy_logprobs == c.ref_logprobs for g in first.groups for c in g.completions)


def test_the_policy_is_scored_for_metrics_on_the_first_prompts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing learns from its log-probabilities, nor from the start policy's without a KL term."""
    monkeypatch.setattr(params, "MEASURED_SHARE", 1 / 2)
    scored: list[str] = []
    score = Policies._score

    def counting(self: Any, model: Any, prompts: Any, completions: Any) -> Any:
        scored.extend(str(prompt) for prompt in prompts)
        return score(self, model, prompts, completions)

    monkeypatch.setattr(Policies, "_score", counting)
    t = trainer(
        tmp_path,
        num_train_epochs=2,
        kl_weight=0.0,
        logging_steps=1,
        per_device_train_batch_size=1,  # steps in which every group has the reference
    )
    t.train()
    assert len(scored) <= 2 * 4 * 6  # four of a round's eight prompts, of at most six answers
    for index in (0, 1):
        groups = t.make_round(index).groups
        for i, c in ((i, c) for i, g in enumerate(groups) for c in g.completions):
            assert bool(c.policy_logprobs) == (i < 4)
            assert bool(c.ref_logprobs) == (i < 4 and index == 0)
    rounds = [line for line in logged(tmp_path) if "round" in line]
    assert [line["round/measured_prompts"] for line in rounds] == [4, 4]
    assert rounds[0]["kl/negative"] == 0.0
    assert "kl/negative" not in rounds[1]
    assert {"logps/negative", "sampling/instruction_gap/negative"} <= set(rounds[1])
    assert {line["loss/kl"] for line in logged(tmp_path) if "loss/kl" in line} == {0.0}


def test_with_a_kl_term_every_completion_has_the_reference(tmp_path: Path) -> None:
    t = trainer(tmp_path, num_train_epochs=2, kl_weight=0.1, drift_prompts=0)
    t.train()
    for index in (0, 1):
        groups = t.make_round(index).groups
        completions = [(i, c) for i, g in enumerate(groups) for c in g.completions]
        assert all(len(c.ref_logprobs) == len(c.token_ids) for _, c in completions)
        assert all(bool(c.policy_logprobs) == (i == 0) for i, c in completions)


def test_a_round_on_the_disk_is_read_through_once_when_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trainer(tmp_path).writing():
        trainer(tmp_path).make_round(0)
    digest, read = round_files.sha256_of, list[str]()

    def counting(path: Path) -> str:
        read.append(path.parent.name)
        return digest(path)

    monkeypatch.setattr(round_files, "sha256_of", counting)
    t = trainer(tmp_path, num_train_epochs=2)
    t.train(resume_from_checkpoint=True)
    assert read == ["00000"]  # the second was hashed while it was written
    assert t.make_round(1).groups == t.rounds.groups
    assert read == ["00000", "00001"]


def test_the_model_learns_what_the_reward_asks_for(tmp_path: Path) -> None:
    """Ranking accuracy on a fixed round rises when the round is trained on again and again."""
    t = trainer(tmp_path, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=3e-3)
    made = t.make_round(0)
    (batch,) = t.parts.engine.collate(list(made.groups))["micro_batches"]
    optimizer = torch.optim.AdamW(t.policy.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = t.compute_loss(t.policy, {"micro_batch": batch})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("stop_after", [pytest.param(3, marks=pytest.mark.slow), 4, 6])
def test_resumed_is_uninterrupted_bit_for_bit(
    tmp_path: Path, stop_after: int, use_lora: bool
) -> None:
    """Interrupted inside a round (3, 6) and at its end (4 steps a round): same weights, round files
    and final metrics.
    """

    def make(name: str, **kwargs: Any) -> NEATTrainer:
        peft_config = lora() if use_lora else None
        settings: dict[str, Any] = {
            "num_train_epochs": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "drift_prompts": 2,
        }
        return trainer(tmp_path / name, **settings, peft_config=peft_config, **kwargs)

    whole = make("whole")
    whole.train()
    broken = make("parts", callbacks=[StopAt(stop_after + 1)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make("parts")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 8
    assert_same_weights(whole, resumed)
    for index in range(2):
        one, other = (
            (tmp_path / n / "rounds" / f"{index:05d}" / "groups.parquet").read_bytes()
            for n in ("whole", "parts")
        )
        assert one == other
    last = [
        [line for line in logged(tmp_path / n) if line["step"] == 8 and "loss" in line]
        for n in ("whole", "parts")
    ]
    assert last[0] == last[1]


def test_resume_takes_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    t = trainer(tmp_path, num_train_epochs=2)
    t.train()
    (tmp_path / "checkpoint-8" / "COMPLETE.json").unlink()
    again = trainer(tmp_path, num_train_epochs=2)
    again.train(resume_from_checkpoint=True)
    assert_same_weights(t, again)
    shutil.rmtree(tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        trainer(tmp_path, num_train_epochs=2).train(resume_from_checkpoint=True)


def test_a_used_folder_without_resume_and_an_empty_one_with_it_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "a").train()
    with pytest.raises(ConfigError, match="already holds a run"):
        trainer(tmp_path / "a").train()
    with pytest.raises(ConfigError, match="no run to resume"):
        trainer(tmp_path / "b").train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_crash_while_scoring_the_first_round_is_resumed_without_sampling_again(
    tmp_path: Path,
) -> None:
    def broken(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        raise OSError("the reward server is down")

    with pytest.raises(RewardError, match="broken"):
        trainer(tmp_path, reward=broken).train()
    sampled = list((tmp_path / "rounds" / "00000").rglob("sampled.parquet"))
    assert sampled
    written = sampled[0].stat().st_mtime_ns
    seen: list[int] = []

    def watching(
        prompts: Any, completions: Any, completion_ids: Any, **columns: Any
    ) -> list[float]:
        seen.append(sampled[0].stat().st_mtime_ns)
        return count_e(prompts, completions, completion_ids)

    watching.__name__ = "broken"  # the same server, up again
    trainer(tmp_path, reward=watching).train(resume_from_checkpoint=True)
    fresh = trainer(tmp_path / "fresh")
    fresh.train()
    assert seen[0] == written, "the samples were drawn again"
    resumed, uninterrupted = (
        NEATTrainer.make_round(trainer(f), 0).groups for f in (tmp_path, tmp_path / "fresh")
    )
    assert resumed == uninterrupted


# ---- drift, limits, reference ----


def test_training_stops_when_kl_passes_its_limit(tmp_path: Path) -> None:
    t = trainer(tmp_path, num_train_epochs=3, drift_prompts=3, max_kl=1e-4, learning_rate=1e-2)
    t.train()
    assert t.state.global_step == 4
    assert t.stopped_because is not None
    assert "max_kl" in t.stopped_because
    drift = [line["drift/kl"] for line in logged(tmp_path) if "drift/kl" in line]
    assert drift[0] == pytest.approx(0, abs=1e-6)
    assert drift[1] > 1e-4
    assert (tmp_path / "checkpoint-4" / "COMPLETE.json").is_file()


def test_the_reference_stays_at_the_start_with_and_without_an_adapter(tmp_path: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    for name, peft_config in (("full", None), ("lora", lora)):
        t = trainer(
            tmp_path / name, peft_config=peft_config, ranking_loss="dpo", learning_rate=1e-2
        )
        prompts, answers = [[3, 4, 5]], [[6, 7, 8]]
        before = t.parts.policies.start_logprobs(prompts, answers)
        assert t.parts.policies.logprobs(prompts, answers) == before
        t.train()
        assert t.parts.policies.start_logprobs(prompts, answers) == before
        assert t.parts.policies.logprobs(prompts, answers) != before


@pytest.mark.slow
def test_negatives_can_be_written_by_the_start_policy(tmp_path: Path) -> None:
    """After a step the current policy writes other negatives than the initial one, which repeats
    itself.
    """
    texts = {}
    for who in ("current", "initial"):
        t = trainer(
            tmp_path / who,
            negative_policy=who,
            num_train_epochs=2,
            prompts_per_round=12,
            learning_rate=5e-2,
        )
        t.train()
        texts[who] = {
            g.prompt_id: [c.text for c in g.completions if c.origin == "negative"]
            for g in t.make_round(1).groups
        }
    start = trainer(tmp_path / "start", prompts_per_round=12)
    start.train()  # a first round to continue from
    fresh = trainer(tmp_path / "start", prompts_per_round=12, num_train_epochs=2)
    fresh.policy.load_state_dict(
        tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER).state_dict()
    )
    initial = {
        g.prompt_id: [c.text for c in g.completions if c.origin == "negative"]
        for g in fresh.make_round(1).groups
    }
    shared = set(initial) & set(texts["initial"])
    assert shared
    assert all(texts["initial"][i] == initial[i] for i in shared)
    assert any(texts["current"].get(i) != texts["initial"].get(i) for i in shared)


def test_the_start_policy_writes_only_the_negatives_also_with_an_adapter(tmp_path: Path) -> None:
    """With LoRA the start policy is the adapter switched off: it must be off for the negatives
    alone, copied or not.
    """
    for name, changes in (("plain", {}), ("copy", {"bf16": True, "generation_copy": "always"})):
        texts: dict[str, dict[str, list[str]]] = {}
        for who in ("current", "initial"):
            torch.manual_seed(0)
            lora = LoraConfig(
                task_type="CAUSAL_LM", r=4, lora_alpha=64, target_modules="all-linear"
            )
            t = trainer(
                tmp_path / name / who,
                peft_config=lora,
                negative_policy=who,
                prompts_per_round=12,
                **changes,
            )
            for p_name, p in t.policy.named_parameters():
                if "lora_B" in p_name:
                    torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(1))
            groups = t.make_round(0).groups
            texts[who] = {
                o: [c.text for g in groups for c in g.completions if c.origin == o]
                for o in ("positive", "negative")
            }
        assert texts["current"]["positive"] == texts["initial"]["positive"]
        assert texts["current"]["negative"] != texts["initial"]["negative"]


def test_a_trained_adapter_folder_is_loaded_with_what_it_learned(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    t = NEATTrainer(str(base), count_e, config(tmp_path / "run"), ROWS, peft_config=lora)
    t.train()
    t.save_model(str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = t.policy.eval()(ids).logits
        loaded = load_policy(str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(load_policy(str(base)).eval()(ids).logits, expected, atol=1e-3)
    NEATTrainer(
        str(tmp_path / "adapter"),
        count_e,
        config(tmp_path / "again", num_train_epochs=1),
        ROWS,
        peft_config=lora,
    ).train()


def test_prompts_that_are_too_long_are_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"12 prompts are longer than max_prompt_length=20 tokens: dataset 'train_dataset', "
        r"row 0",
    ):
        trainer(tmp_path, max_prompt_length=20)


def test_a_round_without_pairs_stops_with_advice(tmp_path: Path) -> None:
    def flat(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    with pytest.raises(CollapseError, match="too little to rank"):
        trainer(tmp_path, reward=flat).train()


def test_a_non_finite_loss_never_reaches_the_weights(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            if state.global_step == 2:
                model.get_output_embeddings().weight.data[0, 0] = float("nan")

    t = trainer(tmp_path, callbacks=[Poison()])
    with pytest.raises(CollapseError, match="the loss is nan at step 3"):
        t.train()


# ---- what is refused, and what works without ----


def test_ranking_by_origin_needs_no_reward(tmp_path: Path) -> None:
    t = trainer(tmp_path, reward=None, rank_by="origin")
    t.train()
    step = next(line for line in logged(tmp_path) if "loss" in line)
    assert step["loss/ranking"] > 0
    for rank_by in ("reward", "origin_then_reward"):
        with pytest.raises(ConfigError, match=f"rank_by is {rank_by} but reward_funcs is empty"):
            trainer(tmp_path / "b", reward=None, rank_by=rank_by)


@pytest.mark.parametrize("side", ["rewards", "judges"])
def test_in_evaluations_the_start_policy_judges_the_contrast(tmp_path: Path, side: str) -> None:
    """A judge that moves with the policy would compare two different scores."""
    given: dict[str, Any] = {"reward": "contrast", "judge_funcs": ["contrast"]}
    t = trainer(tmp_path, eval_dataset=ROWS[:2], **given)
    (moving,) = getattr(t.parts.scored_by, side)
    rows = {
        "prompts": [row["prompt"] for row in ROWS[:2]],
        "completions": ["thank you", "no"],
        "completion_ids": [TOKENIZER(text)["input_ids"] for text in ("thank you", "no")],
    }
    before = moving.function(**rows)
    t.train()
    (fixed,) = getattr(t.parts.eval_tools(with_reference=True), side)
    assert fixed.function(**rows) == pytest.approx(before, abs=1e-5)
    assert moving.function(**rows) != pytest.approx(before, abs=1e-3)


def test_the_contrast_reward_needs_no_reward_model(tmp_path: Path) -> None:
    t = trainer(tmp_path, reward="contrast")
    t.train()
    line = next(line for line in logged(tmp_path) if "round" in line)
    # The policy's own preference for the instruction that an answer was written under.
    assert line["reward/positive"] > line["reward/negative"]


def test_chat_data_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    bare = tiny_tokenizer("none")
    with pytest.raises(PromptError, match="chat template"):
        NEATTrainer(
            tiny_model("llama", len(bare), tokenizer=bare),
            count_e,
            config(tmp_path),
            ROWS,
            processing_class=bare,
        )


@pytest.mark.parametrize("logging_steps", [1, 2, 3])
def test_logged_terms_add_up_to_the_logged_loss(tmp_path: Path, logging_steps: int) -> None:
    """The loss is Trainer's mean over the steps of a log line; ours has to be over the same."""
    t = trainer(tmp_path, logging_steps=logging_steps, num_train_epochs=2, lm_weight=0.5)
    t.train()
    lines = [line for line in logged(tmp_path) if "loss" in line]
    assert len(lines) == 8 // logging_steps
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/ranking"] + 0.5 * line["loss/lm"], rel=1e-4)


def test_logged_terms_are_means_over_a_line_that_a_checkpoint_cuts(tmp_path: Path) -> None:
    changes = {"logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    trainer(tmp_path / "whole", **changes).train()
    trainer(tmp_path / "cut", callbacks=[_StopsAt(4)], **changes).train()
    trainer(tmp_path / "cut", **changes).train(resume_from_checkpoint=True)
    whole, cut = (
        [line for line in logged(tmp_path / name) if "loss" in line] for name in ("whole", "cut")
    )
    assert [line["loss/ranking"] for line in cut] == [line["loss/ranking"] for line in whole]
    assert [line["step"] for line in whole] == [3, 6]


class _StopsAt(TrainerCallback):
    """Ends training after a step, whose checkpoint is complete."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def test_a_user_may_log_a_loss_before_training(tmp_path: Path) -> None:
    trainer(tmp_path).log({"loss": 1.0})
    assert logged(tmp_path)[0]["loss"] == 1.0


def test_a_trainer_that_met_a_number_that_is_not_finite_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer(tmp_path, num_train_epochs=2)
    compute = t.compute_loss

    def poisoned(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if t.state.global_step == 5:
            monkeypatch.setattr(
                "neat_align.learning.step_engine.total_loss",
                lambda terms, **_: terms.ranking * float("nan"),
            )
        return compute(model, inputs, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(t, "compute_loss", poisoned)
        with pytest.raises(CollapseError, match="the loss is nan at step 6"):
            t.train()
    monkeypatch.undo()
    t.train(resume_from_checkpoint=True)
    assert t.state.global_step == 8


def test_bars_that_are_given_stand_for_trainers_own(tmp_path: Path) -> None:
    from transformers import ProgressCallback

    class First(ProgressCallback):
        pass

    class Second(ProgressCallback):
        pass

    def bars(disable_tqdm: bool) -> list[type]:
        folder = tmp_path / str(disable_tqdm)
        t = trainer(folder, disable_tqdm=disable_tqdm, callbacks=[First(), Second()])
        kinds = [type(c) for c in t.callback_handler.callbacks]
        return [kind for kind in kinds if issubclass(kind, ProgressCallback)]

    assert bars(disable_tqdm=False) == bars(disable_tqdm=True) == [First, Second]


def test_log_completions_prints_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = terminal_callbacks(config(tmp_path, log_completions=True))
    trainer(tmp_path, log_completions=True, callbacks=callbacks).train()
    shown = capsys.readouterr().out
    assert "positive" in shown
    assert "negative" in shown
    with pytest.raises(ConfigError, match=r"callbacks=neat_align\.terminal_callbacks"):
        trainer(tmp_path / "silent", log_completions=True)
    trainer(tmp_path / "by class", log_completions=True, callbacks=[PrintGroups])


def test_evaluate_samples_on_held_out_prompts(tmp_path: Path) -> None:
    t = trainer(tmp_path, eval_dataset=ROWS[:3], judge_funcs=[count_e])
    metrics = t.evaluate()
    assert {
        "eval_reward",
        "eval_judges/count_e",
        "eval_perplexity",
        "eval_distinct2",
        "eval_contrast/reward/negative",
    } <= set(metrics)
    again = t.evaluate()
    assert metrics == again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ranking_loss": "margin"},
            "ranking_loss is 'margin'; it must be one of hinge, logistic, listwise, dpo, kto, none",
        ),
        (
            {"pair_selection": "random"},
            "pair_selection is 'random'; it must be one of all, best_worst",
        ),
        (
            {"negative_source": "web"},
            "negative_source is 'web'; it must be one of instruction, other_prompts",
        ),
        (
            {"rank_by": "length"},
            "rank_by is 'length'; it must be one of reward, origin, origin_then_reward",
        ),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"num_train_epochs": 0}, "number of rounds"),
        ({"num_train_epochs": 1.5}, "number of rounds"),
        ({"num_positive": 0, "num_negative": 0}, "nothing would be sampled"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"hinge_margin": 1.0}, "hinge_margin is set but ranking_loss is logistic"),
        ({"ranking_loss": "hinge", "beta": 1.0}, "beta is set but ranking_loss hinge has none"),
        ({"ranking_loss": "none", "beta": 1.0}, "beta is set but ranking_loss none has none"),
        ({"ranking_loss": "none", "gamma": 1.0}, "gamma is set but ranking_loss is none"),
        (
            {"ranking_loss": "none", "hinge_margin": 1.0},
            "hinge_margin is set but ranking_loss is none",
        ),
        (
            {"ranking_loss": "none", "lm_weight": 0.0},
            "distil_weight is 0: nothing would be learned",
        ),
        (
            {"ranking_loss": "none", "pair_selection": "best_worst"},
            "pair_selection is set but ranking_loss is none: no pair is ranked",
        ),
        (
            {"lm_weight": 0.0, "lm_on_bad_origins": True},
            "lm_weight is 0: there is no language-modelling target",
        ),
        (
            {"lm_weight": 0.0, "lm_on_cut_completions": True},
            "lm_weight is 0: there is no language-modelling target",
        ),
        (
            {
                "negative_penalty": "unlikelihood",
                "negative_weight": 0.1,
                "pair_selection": "best_worst",
            },
            "negative_penalty looks at whole groups and pair_selection: best_worst trains on two "
            "of each",
        ),
        (
            {
                "negative_source": "other_prompts",
                "rank_by": "origin_then_reward",
                "num_negative": 0,
            },
            "negative_source is other_prompts but num_negative is 0",
        ),
        (
            {"negative_source": "other_prompts"},
            "negative_source is other_prompts and rank_by is reward: a good answer to another "
            "prompt",
        ),
        (
            {"negative_source": "other_prompts", "rank_by": "origin", "negative_policy": "initial"},
            "negative_policy is initial but negative_source is other_prompts: the current policy "
            "writes those",
        ),
        ({"ranking_loss": "dpo", "gamma": 1.0}, "gamma is set but ranking_loss is dpo"),
        ({"ranking_loss": "kto", "gamma": 1.0}, "gamma is set but ranking_loss is kto"),
        (
            {"ranking_loss": "kto", "hinge_margin": 1.0},
            "hinge_margin is set but ranking_loss is kto",
        ),
        ({"negative_penalty": "npo"}, "set both, or neither"),
        ({"negative_weight": 1.0}, "set both, or neither"),
        ({"npo_beta": 1.0}, "npo_beta is set but negative_penalty is none"),
        (
            {"negative_policy": "initial", "num_negative": 0},
            "negative_policy is initial but num_negative is 0",
        ),
        ({"max_kl": 1.0, "drift_prompts": 0}, "nothing would measure the KL"),
        ({"remove_unused_columns": True}, "must stay false"),
        (
            {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
            "first round's groups",
        ),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        config(tmp_path, **changes)


def test_the_new_ways_to_train_are_allowed_together(tmp_path: Path) -> None:
    c = config(tmp_path, ranking_loss="none", lm_on_cut_completions=True, num_negative=0)
    assert c.resolved_beta == 1.0
    assert not c.needs_reference
    config(
        tmp_path, ranking_loss="none", lm_weight=1.0, negative_penalty="npo", negative_weight=0.1
    )
    config(tmp_path, ranking_loss="dpo", pair_selection="best_worst", lm_weight=0.0, kl_weight=0.1)
    for rank_by in ("origin", "origin_then_reward"):
        config(tmp_path, negative_source="other_prompts", rank_by=rank_by)


def test_lengths_over_the_context_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="over the model's context of 512 tokens"):
        trainer(tmp_path, max_prompt_length=510)


def test_the_seed_draws_the_adapter(tmp_path: Path) -> None:
    def start(folder: str, seed: int) -> torch.Tensor:
        t = trainer(
            tmp_path / folder, seed=seed, peft_config=LoraConfig(r=2, target_modules=["q_proj"])
        )
        return next(v for k, v in weights(t).items() if "lora_A" in k)

    assert torch.equal(start("a", 1), start("b", 1))
    assert not torch.equal(start("c", 2), start("d", 1))


def test_dropout_is_off_wherever_it_is_kept() -> None:
    """OPT applies it as a function, from a number; attention keeps a number, too."""
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for model_config in (
        OPTConfig(**shape, ffn_dim=16, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5),
        LlamaConfig(**shape, intermediate_size=16, attention_dropout=0.5),
    ):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).train()
        ids = torch.arange(3, 23)[None]
        assert not torch.equal(model(ids).logits, model(ids).logits)
        disable_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_the_layout_is_checked_with_the_adapter_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what training runs; the start policy is the same model with the adapter off."""
    checked = []

    def check(model: Any, prompts: Any, **kwargs: Any) -> str:
        checked.append(model.get_model_status().enabled)
        return choose_layout(model, prompts, **kwargs)

    monkeypatch.setattr("neat_align.trainer.setup.choose_layout", check)
    assert (
        trainer(
            tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"])
        ).parts.policies.layout
        == "packed"
    )
    assert checked == [True]
