"""Contrast distillation: divergences by hand, and the whole against a slow reference."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

from neat_align.errors import CollapseError, ConfigError, DataError
from neat_align.learning import distillation as distillation_module
from neat_align.learning import teacher_rows as teacher_rows_module
from neat_align.learning.batches import collate_groups
from neat_align.learning.distillation import DistilParams, distillation, token_divergence
from neat_align.learning.teacher_rows import TeachParams, distilled, teacher_rows
from neat_align.modeling.chunked_values import values_in_chunks
from neat_align.modeling.head_inputs import head_inputs
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.group_file import GroupFile, write_groups
from small_trainer import StopAt, assert_same_weights, config, trainer, weights
from tiny import FAMILIES, Family, tiny_model

VOCAB = 40
KINDS = ("reverse", "forward", "js")


# ---- the divergence ------------------------------------------------------------------------------


def slow_divergence(p: list[float], q: list[float], kind: str) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    if kind == "reverse":
        return kl(p, q)
    if kind == "forward":
        return kl(q, p)
    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (kl(p, m) + kl(q, m)) / 2


def test_divergences_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.5]]).double().log()
    teacher = torch.tensor([[0.75, 0.25]]).double().log()
    found = {k: float(token_divergence(logits, teacher, k)) for k in KINDS}
    # ½ ln(½/¾) + ½ ln(½/¼) = ½ ln 4/3;  ¾ ln 3/2 + ¼ ln ½
    assert found["reverse"] == pytest.approx(0.5 * math.log(4 / 3))
    assert found["forward"] == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))
    half = 0.5 * (0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375))
    other = 0.5 * (0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375))
    assert found["js"] == pytest.approx(half + other)


values = st.lists(st.floats(-4, 4), min_size=6, max_size=6)


@given(values, values, st.sampled_from(KINDS))
def test_divergences_are_those_of_the_slow_reference(
    policy: list[float], teacher: list[float], kind: Any
) -> None:
    logits = torch.tensor([policy]).double()
    target = torch.tensor([teacher]).double().log_softmax(-1)
    found = float(token_divergence(logits, target, kind))
    p, q = logits.softmax(-1)[0].tolist(), target.exp()[0].tolist()
    assert found == pytest.approx(slow_divergence(p, q, kind), abs=1e-9)
    assert found >= -1e-12
    if kind == "js":
        assert found <= math.log(2)
    assert float(token_divergence(target, target, kind)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_never_said_is_no_difference(kind: Any) -> None:
    logits = torch.tensor([[0.3, -torch.inf, 1.0]]).double().requires_grad_()
    teacher = torch.tensor([[0.6, -1e4, 0.4]]).double()
    teacher = teacher.log_softmax(-1)
    found = token_divergence(logits, teacher, kind)
    found.sum().backward()
    shorter = torch.tensor([[0.3, 1.0]]).double()
    expected = token_divergence(shorter, torch.tensor([[0.6, 0.4]]).double().log_softmax(-1), kind)
    torch.testing.assert_close(found.detach(), expected)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_divergence(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    assert torch.autograd.gradcheck(lambda z: token_divergence(z, teacher, kind), (logits,))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_chunks_change_nothing(rows: int, frozen: bool) -> None:
    states = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(4, 9, dtype=torch.float64, requires_grad=not frozen)
    teacher = torch.randn(7, 9, dtype=torch.float64).log_softmax(-1)
    weight = torch.arange(7.0).double()

    def value_of(chunk: Tensor, part: slice) -> Tensor:
        return token_divergence(chunk @ head, teacher[part], "reverse")

    found = values_in_chunks(states, value_of, rows, frozen_head=frozen)
    whole = value_of(states, slice(0, 7))
    torch.testing.assert_close(found, whole)
    wanted = [states] if frozen else [states, head]
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), wanted),
        torch.autograd.grad((whole * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(
            values_in_chunks(states, value_of, rows, frozen_head=frozen), whole
        )


# ---- against a slow reference --------------------------------------------------------------------


def answer(ids: tuple[int, ...], origin: Any = "plain", reward: float | None = None) -> Completion:
    return Completion(origin, 0, "", ids, reward=reward)


def group(name: str, prompt: tuple[int, ...], *completions: Completion) -> CompletionGroup:
    contrast = tuple(((*prompt, 30 + j, 31), (*prompt, 20 - j, 21, 22)) for j in range(2))
    return CompletionGroup(name, name, prompt, completions, contrast)


GROUPS = (
    group("a", (5, 6, 7), answer((8, 9, 10)), answer((4,), "positive"), answer((11, 12))),
    group("b", (9, 3), answer((1, 2, 3, 4, 5)), answer((7, 7), "negative")),
)
PARAMS = DistilParams(
    alpha=0.7,
    toward="contrast",
    min_p=0.0,
    threshold=0.0,
    raise_only=False,
    clip=None,
    max_kl=None,
    divergence="reverse",
    teacher="start",
)
TEACH = TeachParams(answers="all", first=1.0, pairs=2, negatives=True)


def slow_teacher(
    logprobs: Callable[[Any], Tensor], prompts: Any, ids: tuple[int, ...], p: DistilParams
) -> Tensor:
    """[tokens, vocab] log q, one pass over one row for each prompt, nothing shared."""
    plain, pairs = prompts

    def after(prompt: tuple[int, ...]) -> Tensor:
        return logprobs((*prompt, *ids))[len(prompt) - 1 : len(prompt) + len(ids) - 1]

    start = after(plain)
    if p.toward == "sharpened":
        ratio = start
    else:
        ratio = torch.zeros_like(start)
        for positive, negative in pairs:
            of = after(positive) - (after(negative) if p.toward == "contrast" else start)
            ratio += (of if p.clip is None else of.clamp(-p.clip, p.clip)) / len(pairs)
    q = []
    for p0, r in zip(start.exp(), ratio, strict=True):
        kept = p0 >= p.min_p * p0.max()
        moved = p0.clone()
        moved[kept] = p0[kept] * (p.alpha * r[kept]).exp()
        moved[kept] *= p0[kept].sum() / moved[kept].sum()
        q.append(moved.log())
    return torch.stack(q)


def slow_distillation(
    policy: torch.nn.Module, start: torch.nn.Module, p: DistilParams, first: float = 1.0
) -> list[Tensor]:
    """The divergence of each plain answer from its teacher, token by token."""

    def logprobs(model: torch.nn.Module, row: tuple[int, ...]) -> Tensor:
        return model(torch.tensor([row])).logits[0].log_softmax(-1)

    found = []
    for g in GROUPS:
        for c in g.completions:
            if c.origin != "plain":
                continue
            with torch.no_grad():
                q = slow_teacher(
                    lambda row: logprobs(start, row),
                    (g.prompt_ids, g.contrast_ids),
                    c.token_ids,
                    p,
                )
            n = len(g.prompt_ids)
            own = logprobs(policy, (*g.prompt_ids, *c.token_ids))[n - 1 : -1]
            if p.divergence == "reverse":
                each = (own.exp() * (own - q)).sum(-1)
            else:
                each = (q.exp() * (q - own)).sum(-1)
            found.append(each[: math.ceil(first * len(each))].mean())
    return found


def fast_distillation(
    policy: torch.nn.Module,
    reference: Any,
    p: DistilParams,
    layout: Any,
    teach: TeachParams = TEACH,
) -> Tensor:
    batch = collate_groups(
        GROUPS, pad_token_id=0, rank_by="origin", lm_on_bad_origins=False, layout=layout
    )
    inputs = head_inputs(policy, batch.rows)
    parts = teacher_rows(GROUPS, batch.rows, teach, layout=layout, pad_token_id=0)
    return torch.cat(
        [distillation(policy, reference, inputs, part, p, autocast_dtype=None) for part in parts]
    )


VARIANTS: dict[str, DistilParams] = {
    "plain": PARAMS,
    "cut": replace(PARAMS, min_p=0.6),
    "clip": replace(PARAMS, clip=0.05),
    "forward": replace(PARAMS, divergence="forward", alpha=1.5),
    "positive": replace(PARAMS, toward="positive", alpha=1.0),
    "sharpened": replace(PARAMS, toward="sharpened", alpha=0.3),
    "swapped": replace(PARAMS, alpha=-0.7),
}


@pytest.mark.parametrize("layout", ["packed", "padded", "unpadded"])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_slow_reference(name: str, layout: Any) -> None:
    policy, start = tiny_model("llama", VOCAB).double(), tiny_model("llama", VOCAB, seed=1).double()
    p = VARIANTS[name]
    found = fast_distillation(policy, lambda: contextlib.nullcontext(start), p, layout)
    expected = torch.stack(slow_distillation(policy, start, p))
    assert float(expected.detach().min()) > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("p", [PARAMS, replace(PARAMS, clip=0.05), replace(PARAMS, max_kl=1e9)])
def test_the_vocabulary_is_held_for_a_few_tokens_at_a_time(
    p: DistilParams, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, start = tiny_model("llama", VOCAB).double(), tiny_model("llama", VOCAB, seed=1).double()
    monkeypatch.setattr(distillation_module, "rows_at_once", lambda model: 3)
    found = fast_distillation(policy, lambda: contextlib.nullcontext(start), p, layout)
    expected = torch.stack(slow_distillation(policy, start, p))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_gradients_are_those_of_the_slow_reference(family: Family, layout: Any) -> None:
    policy, start = tiny_model(family, VOCAB).double(), tiny_model(family, VOCAB, seed=1).double()
    for model in (policy, start):
        model.eval()  # GPT-2 has dropout
    p = replace(PARAMS, min_p=0.3)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        policy.zero_grad()
        loss.backward()
        named = policy.named_parameters()
        return {n: w.grad.clone() for n, w in named if w.grad is not None}

    fast = gradients(
        fast_distillation(policy, lambda: contextlib.nullcontext(start), p, layout).sum()
    )
    slow = gradients(torch.stack(slow_distillation(policy, start, p)).sum())
    assert fast.keys() == slow.keys()
    for name, gradient in slow.items():  # the families' norms compute in fp32
        torch.testing.assert_close(fast[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_an_adapter_switched_off_is_the_start_policy(targets: list[str]) -> None:
    base = tiny_model("llama", VOCAB)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=targets)).double()
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)

    @contextlib.contextmanager
    def off() -> Any:
        with model.disable_adapter():
            yield model

    start = tiny_model("llama", VOCAB).double()
    for layout in ("packed", "padded"):
        found = fast_distillation(model, off, PARAMS, layout)
        expected = torch.stack(slow_distillation(model, start, PARAMS))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
        found.sum().backward()
        grads = {n: w.grad for n, w in model.named_parameters() if w.requires_grad}
        assert all(g is not None and g.abs().sum() > 0 for n, g in grads.items() if "lora_B" in n)
    assert all(w.requires_grad == ("lora_" in n) for n, w in model.named_parameters())


def test_the_teacher_may_be_the_current_policy() -> None:
    policy = tiny_model("llama", VOCAB).double().train()
    p = replace(PARAMS, teacher="current")

    def closed() -> Any:
        raise AssertionError("the start policy is not read")

    found = fast_distillation(policy, closed, p, "packed")
    torch.testing.assert_close(found, torch.stack(slow_distillation(policy, policy, p)))
    assert policy.training


def test_the_first_part_of_each_answer() -> None:
    policy, start = tiny_model("llama", VOCAB).double(), tiny_model("llama", VOCAB, seed=1).double()
    teach = replace(TEACH, first=0.4)
    for layout in ("packed", "padded"):
        found = fast_distillation(
            policy, lambda: contextlib.nullcontext(start), PARAMS, layout, teach
        )
        expected = torch.stack(slow_distillation(policy, start, PARAMS, first=0.4))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_alpha_is_lowered_where_the_teacher_would_go_too_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = tiny_model("llama", VOCAB).double()

    def taught(max_kl: float | None, alpha: float = 3.0) -> Tensor:
        p = replace(PARAMS, alpha=alpha, max_kl=max_kl, divergence="forward")
        # KL(q || start): the policy that is asked is the start policy itself.
        return fast_distillation(start, lambda: contextlib.nullcontext(start), p, "packed")

    free, limited = taught(None), taught(1e-4)
    assert (free > 1e-3).all()
    by_prompt = (limited[:2] * torch.tensor([3, 2])).sum() / 5, limited[2]
    for kl in by_prompt:  # second order: near the limit for a small one
        assert float(kl) == pytest.approx(1e-4, rel=0.05)
    torch.testing.assert_close(taught(10.0), free)
    for padded_tokens in (1024, 12):  # a prompt has one alpha, however its rows are cut
        monkeypatch.setattr(teacher_rows_module, "PADDED_TOKENS", padded_tokens)
        p = replace(PARAMS, alpha=3.0, max_kl=1e-4, divergence="forward")
        cut = fast_distillation(start, lambda: contextlib.nullcontext(start), p, "padded")
        torch.testing.assert_close(cut, limited, rtol=1e-6, atol=1e-10)
    assert not torch.allclose(taught(1e-4, alpha=-3.0), limited)


def test_the_lower_half_of_the_plain_answers() -> None:
    rewards = (0.5, None, 0.1, 0.9, 0.1)
    completions = [answer((1,), reward=r) for r in rewards]
    g = group("a", (5,), answer((1,), "negative", -9.0), *completions)
    assert distilled(g, "all") == [1, 2, 3, 4, 5]
    assert distilled(g, "lower_half") == [3, 5]


def test_groups_of_a_round_without_contrast_are_refused() -> None:
    bare = replace(GROUPS[0], contrast_ids=())
    batch = collate_groups([bare], pad_token_id=0, rank_by="origin", lm_on_bad_origins=False)
    with pytest.raises(DataError, match="prompt a has its prompt under 0 instruction pairs"):
        teacher_rows([bare], batch.rows, TEACH, layout="padded", pad_token_id=0)


# ---- a run ---------------------------------------------------------------------------------------

ALONE = {
    "num_positive": 0,
    "num_negative": 0,
    "num_plain": 2,
    "ranking_loss": "none",
    "lm_weight": 0.0,
    "kl_weight": 0.0,
    "distil_weight": 1.0,
    "rank_by": "origin",
    "use_human_completions": False,
}


def test_a_run_without_a_reward_learns_the_contrast(tmp_path: Path) -> None:
    t = trainer(
        tmp_path / "run",
        reward=None,
        num_train_epochs=3,
        logging_steps=1,
        learning_rate=5e-4,
        **ALONE,
    )
    asked = trainer(tmp_path / "asked", reward=None, num_train_epochs=3, **ALONE)
    groups = list(asked.make_round(0).groups)

    def distance() -> float:
        engine = asked.parts.engine  # of another trainer: what it measures is not logged
        return float(engine.loss(t.policy, engine.micro_batch(groups), None, autocast_dtype=None))

    before = distance()
    t.train()
    assert distance() < 0.8 * before
    lines = [line for line in t.state.log_history if "loss" in line]
    assert [line["loss"] for line in lines] == [line["loss/distil"] for line in lines]
    made = GroupFile(tmp_path / "run/rounds/00000/groups.parquet")
    assert all(len(g.contrast_ids) == 1 for g in made)
    positive, negative = made[0].contrast_ids[0]
    assert positive != negative
    assert len(positive) > len(made[0].prompt_ids)


def test_a_bank_with_fewer_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"distil_pairs is 9 .* politeness has 6"):
        trainer(tmp_path, reward=None, distil_pairs=9, **ALONE)


@pytest.mark.parametrize("size", [1, 8])
def test_how_a_step_is_cut_changes_nothing(tmp_path: Path, size: int) -> None:
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    mixed = {**ALONE, "num_positive": 1, "num_negative": 1, "ranking_loss": "logistic"}
    found = []
    for name, tokens in (("whole", 10**6), ("cut", 60)):
        t = trainer(tmp_path / name, max_tokens_per_micro_batch=tokens, **cut, **mixed)
        t.train()
        found.append(weights(t))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_it_goes_on_exactly(tmp_path: Path) -> None:
    run = {"reward": None, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", **run, **ALONE)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", callbacks=[StopAt(5)], **run, **ALONE).train()
    second = trainer(tmp_path / "cut", **run, **ALONE)
    second.train(resume_from_checkpoint=True)
    assert_same_weights(whole, second)


def test_prompts_without_a_plain_answer_are_left_out(tmp_path: Path) -> None:
    """A model that says nothing: no group is left, and the run says why."""
    t = trainer(tmp_path, reward=None, generation_copy="never", **ALONE)
    with pytest.raises(CollapseError, match="have a plain answer left to learn from"):
        _only_ends(t)


def _only_ends(t: Any) -> None:
    end = t.parts.policies.eos_token_ids[0]
    head = t.policy.get_output_embeddings()
    head.register_forward_hook(
        lambda _, __, out: torch.full_like(out, -50.0).index_fill(-1, torch.tensor([end]), 50.0)
    )
    t.train()


def test_answers_that_nobody_judged_teach_nothing(tmp_path: Path) -> None:
    def abstains(completions: Any, **_: Any) -> list[float | None]:
        return [None for _ in completions]

    t = trainer(tmp_path, reward=abstains, distil_answers="lower_half", **ALONE)
    before = weights(t)
    t.train()
    for name, weight in weights(t).items():
        torch.testing.assert_close(weight, before[name])


def test_groups_keep_their_prompts_under_instructions(tmp_path: Path) -> None:
    with (tmp_path / "groups.parquet").open("wb") as file:
        write_groups(file, GROUPS)
    assert list(GroupFile(tmp_path / "groups.parquet")) == list(GROUPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_plain": 0, "num_positive": 2}, "plain answers are what is distilled on"),
        ({"distil_weight": 0.0, "ranking_loss": "logistic", "distil_alpha": 1.0}, "distil_weight"),
        ({"distil_alpha": 0.0}, "taught what it was at the start"),
        ({"distil_toward": "sharpened", "distil_pairs": 2}, "reads no instruction"),
        ({"distil_answers": "lower_half", "num_plain": 1}, "one answer has no lower half"),
        ({"distil_weight": 0.0}, "nothing would be learned"),
        ({"num_positive": 1}, "nothing would read these answers"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **{**ALONE, **changes})


def test_a_lower_half_needs_a_reward(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing says which half is the lower one"):
        trainer(tmp_path, reward=None, distil_answers="lower_half", **ALONE)


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 3))
def test_one_plain_answer_is_enough(num_plain: int) -> None:
    config(Path("unused"), **{**ALONE, "num_plain": num_plain})
