"""What is logged of a step: the same however it is cut into micro-batches and processes, equal to
plain formulas, and read from the device once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import TrainerCallback

import slow_objective as slow
from host_syncs import HostSyncs
from neat_align import NEATTrainer
from neat_align.learning.objective import loss_terms
from neat_align.learning.step_facts import METRICS, SHARE_NEEDS, step_facts
from neat_align.learning.step_metrics import StepMetrics
from neat_align.rounds.completions import ORIGINS, Completion, CompletionGroup, Origin
from small_trainer import TOKENIZER, trainer
from small_trainer import logged as rows_of
from tiny import Family

EOS = TOKENIZER.eos_token_id
# Everything that a term of the loss may read, at once.
ALL_TERMS: dict[str, Any] = {
    "lm_weight": 0.7,
    "kl_weight": 0.1,
    "negative_penalty": "unlikelihood",
    "negative_weight": 0.3,
    "num_plain": 1,
}


def group(name: str, *members: tuple[Origin, float | None, int]) -> CompletionGroup:
    """(origin, reward, number of tokens) a completion; tokens and reference log-probabilities at
    random.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    completions = []
    for i, (origin, reward, n) in enumerate(members):
        ids = [*torch.randint(5, 300, (n - 1,), generator=generator).tolist(), EOS]
        ref = tuple((-3 * torch.rand(n, generator=generator)).tolist())
        completions.append(
            Completion(
                origin=origin,
                index=i,
                text=f"{name} {i}",
                token_ids=tuple(ids),
                finish_reason="stop",
                instruction=None,
                sampling_logprob=None,
                policy_logprobs=ref,
                ref_logprobs=ref,
                reward=reward,
                reward_components=(reward,),
            )
        )
    return CompletionGroup(
        prompt_id=name,
        prompt=name,
        prompt_ids=tuple(range(5, 5 + len(name))),
        completions=tuple(completions),
    )


# The human answers are in one group alone; one group has no pair, one no target, one abstains.
GROUPS = [
    group("first", ("positive", 2.0, 4), ("negative", -1.0, 6), ("plain", 0.5, 3)),
    group("no pair", ("positive", 1.0, 3), ("negative", 1.0, 2)),
    group("human", ("chosen", 1.0, 5), ("rejected", 3.0, 2), ("negative", 0.0, 7)),
    group("bad alone", ("negative", 0.0, 3), ("negative", 1.0, 4)),
    group("abstains", ("positive", None, 6), ("plain", 0.2, 2), ("negative", -2.0, 3)),
]


def logged(t: NEATTrainer, *ranks: list[list[CompletionGroup]]) -> dict[str, float]:
    """The metrics of one optimizer step: a list of micro-batches a rank."""
    engine = t.parts.engine
    cut = [[engine.micro_batch(groups) for groups in rank] for rank in ranks]
    counts = engine.count([m for rank in cut for m in rank])
    sums = []
    for rank in cut:
        engine.metrics = StepMetrics(METRICS, engine.device, needs=SHARE_NEEDS)
        engine.metrics.begin_step()
        for m in rank:
            engine.loss(t.policy, m, counts, autocast_dtype=None)
        sums.append(engine.metrics.copy())
    return engine.metrics.take(lambda last: last - last + torch.stack(sums).sum(0))


def of_the_cut(name: str) -> bool:
    return name.startswith("packing/")


# ---- however a step is cut -----------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["hinge", "logistic", "listwise", "dpo", "kto", "none"])
def test_the_cut_into_micro_batches_and_ranks_changes_no_metric(tmp_path: Path, loss: str) -> None:
    t = trainer(tmp_path, ranking_loss=loss, **ALL_TERMS)
    whole = logged(t, [GROUPS])
    one_by_one = logged(t, [[g] for g in GROUPS])
    # The human answers are on the second rank alone, which has more micro-batches, too.
    two_ranks = logged(t, [GROUPS[:2]], [[g] for g in GROUPS[2:]])
    a_rank_without_groups = logged(t, [GROUPS], [])
    for other in (one_by_one, two_ranks, a_rank_without_groups):
        assert list(other) == list(whole)
        for name, value in whole.items():
            if not of_the_cut(name):
                assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    shares = [whole[f"ranking/gradient_share/{o}"] for o in ORIGINS if loss != "none"]
    assert sum(shares) == pytest.approx(1 if loss != "none" else 0)


def test_an_origin_without_a_completion_is_not_logged(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    found = logged(t, [GROUPS[:2]])
    assert {name.rsplit("/", 1)[-1] for name in found} & set(ORIGINS) == {
        "positive",
        "negative",
        "plain",
    }


def test_a_term_that_no_group_has_is_logged_as_zero(tmp_path: Path) -> None:
    found = logged(trainer(tmp_path), [GROUPS[:1]])
    assert found["loss/negative"] == 0.0


# ---- by plain formulas ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["hinge", "logistic", "dpo", "kto"])
def test_facts_are_those_of_plain_lists(tmp_path: Path, loss: str) -> None:
    t = trainer(tmp_path, ranking_loss=loss, **ALL_TERMS)
    engine = t.parts.engine
    m, p = engine.micro_batch(GROUPS), engine.objective
    generator = torch.Generator().manual_seed(3)
    logps = torch.where(
        m.rows.completion_mask, -4 * torch.rand(m.rows.completion_ids.shape, generator=generator), 0
    )
    terms = loss_terms(m, logps, engine.count([m]), p)
    rows = step_facts(m, logps, terms, p).tolist()
    facts = dict(zip(METRICS, rows, strict=True))
    expected = {f"logps/{o}": [0.0, 0.0] for o in ORIGINS}
    expected |= {f"ranking/active_pair_fraction/{o}": [0.0, 0.0] for o in ORIGINS}
    correct = active = total = 0.0
    row = iter(logps.tolist())
    for g in GROUPS:
        own = [next(row)[: len(c.token_ids)] for c in g.completions]
        scores = [sum(values) / len(values) for values in own]
        refs = [sum(c.ref_logprobs) / len(c.token_ids) for c in g.completions]
        for values, c in zip(own, g.completions, strict=True):
            entry = expected[f"logps/{c.origin}"]
            entry[0], entry[1] = entry[0] + sum(values), entry[1] + len(values)
        order = slow.pairs([c.reward for c in g.completions], p.reward_margin)
        point = slow.kto_point(scores, refs, order)
        for i, j in order:
            gap = scores[i] - scores[j]
            correct += 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
            total += 1
            if loss == "hinge":
                is_active = p.hinge_margin - gap > 0
            elif loss == "kto":
                labelled = {k for k in (i, j) if slow.balance(order, k)}
                share = [slow.sigmoid(p.beta * (scores[k] - refs[k] - point)) for k in labelled]
                is_active = any(4 * s * (1 - s) > 0.1 for s in share)
            else:
                if loss == "dpo":
                    gap -= refs[i] - refs[j]
                gamma = p.gamma if loss == "logistic" else 0.0
                is_active = slow.sigmoid(gamma - p.beta * gap) > 0.1
            active += is_active
            entry = expected[f"ranking/active_pair_fraction/{g.completions[j].origin}"]
            entry[0], entry[1] = entry[0] + is_active, entry[1] + 1
    assert facts["ranking/accuracy"] == pytest.approx([correct, total])
    assert facts["ranking/active_pair_fraction"] == pytest.approx([active, total])
    for name, values in expected.items():
        assert facts[name] == pytest.approx(values, rel=1e-5), name
    assert facts["packing/tokens_per_micro_batch"] == [m.rows.input_ids.numel(), 1]
    assert facts["loss/ranking"] == pytest.approx([float(terms.ranking), 0])


def test_a_number_that_is_none_stays_with_its_origin(tmp_path: Path) -> None:
    """What is not finite in one origin's completions is not spread over all."""
    t = trainer(tmp_path, ranking_loss="none", **ALL_TERMS)
    m, p = t.parts.engine.micro_batch(GROUPS[:1]), t.parts.engine.objective
    logps = torch.where(m.rows.completion_mask, -1.0, 0.0)
    logps[1, 0] = math.nan
    terms = loss_terms(m, logps, t.parts.engine.count([m]), p)
    facts = dict(zip(METRICS, step_facts(m, logps, terms, p).tolist(), strict=True))
    assert math.isnan(facts["logps/negative"][0])
    assert facts["logps/positive"] == [-4.0, 4.0]
    assert facts["logps/plain"] == [-3.0, 3.0]


# ---- sums between two lines ----------------------------------------------------------------------


def test_sums_by_hand() -> None:
    """Shares of a loss add up over 2 micro-batches and 2 ranks and are divided by the 2 steps; all
    else is a ratio of sums: (1 + 5) / (1 + 2) and (6 + 0) / (4 + 0).
    """
    names = ("loss/lm", "ranking/accuracy", "logps/best", "share", "count")
    here, there = (
        StepMetrics(names, torch.device("cpu"), needs={"share": "count"}) for _ in range(2)
    )
    for metrics in (here, there):
        metrics.begin_step()
        metrics.begin_step()
    here.add(torch.tensor([[0.5, 0.0], [1.0, 1.0], [6.0, 4.0], [1.0, 2.0], [0.0, 0.0]]))
    there.add(torch.tensor([[0.25, 0.0], [5.0, 2.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]))
    found = here.take(lambda mine: mine + there.copy())
    assert found == {"loss/lm": 0.375, "ranking/accuracy": 2.0, "logps/best": 1.5}
    assert here.take(lambda mine: mine) == {}  # counting begins anew


def test_no_step_asks_nothing_of_other_ranks() -> None:
    """A log line that another rank does not write must not wait for it."""

    def collective(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the other ranks are not here")

    assert StepMetrics(("loss/lm",), torch.device("cpu")).take(collective) == {}


def test_sums_go_on_from_a_checkpoint_of_fewer_metrics() -> None:
    metrics = StepMetrics(("loss/lm", "new"), torch.device("cpu"))
    metrics.go_on({"loss/lm": [3.0, 0.0], "gone": [1.0, 1.0]}, 2)
    assert metrics.sums == {"loss/lm": [3.0, 0.0], "new": [0.0, 0.0]}
    assert metrics.take(lambda mine: mine) == {"loss/lm": 1.5}


# ---- nothing is read from the device -------------------------------------------------------------

LOSSES: list[dict[str, Any]] = [
    {"ranking_loss": "hinge"},
    {"ranking_loss": "logistic", "negative_penalty": "unlikelihood", "negative_weight": 0.1},
    {"ranking_loss": "listwise", "negative_penalty": "npo", "negative_weight": 0.1},
    {"ranking_loss": "dpo", "kl_weight": 0.1, "pair_reduction": "sum"},
    {"ranking_loss": "kto"},
    {"ranking_loss": "none"},
    {"ranking_loss": "logistic", "pair_selection": "best_worst"},
    {"rank_by": "origin"},
]


def waits(t: NEATTrainer, groups: list[CompletionGroup]) -> tuple[HostSyncs, HostSyncs]:
    engine = t.parts.engine
    m = engine.micro_batch(groups)
    with HostSyncs() as forward:
        loss = engine.loss(t.policy, m, engine.count([m]), autocast_dtype=None)
    with HostSyncs() as backward:
        loss.backward()
    return forward, backward


@pytest.mark.parametrize("sharing", ["auto", "off"], ids=["packed", "padded"])
@pytest.mark.parametrize("changes", LOSSES, ids=str)
def test_a_micro_batch_makes_nobody_wait(
    tmp_path: Path, changes: dict[str, Any], sharing: str
) -> None:
    settings = {"reward": None} if changes.get("rank_by") == "origin" else {}
    t = trainer(tmp_path, prefix_sharing=sharing, **{**changes, **settings})
    waits(t, GROUPS)  # what is made once in a process
    forward, backward = waits(t, GROUPS)
    # Rows that are given without a mask, transformers asks whether they are several in one.
    own = {"outputs.py _local_scalar_dense": 1} if sharing == "off" else {}
    assert (without_line_numbers(forward.by_line), dict(backward.by_line)) == (own, {})


def without_line_numbers(by_line: Counter[str]) -> dict[str, int]:
    return {re.sub(r":\d+", "", line): count for line, count in by_line.items()}


@pytest.mark.parametrize(
    ("family", "sharing", "own"),
    # GPT-2 itself looks for padding where it is given no mask, transformers for rows of several.
    [("qwen2", "auto", 0), ("qwen2", "off", 1), ("gpt2", "auto", 1), ("gpt2", "off", 2)],
)
def test_other_families_wait_for_themselves_alone(
    tmp_path: Path, family: Family, sharing: str, own: int
) -> None:
    t = trainer(tmp_path, family, prefix_sharing=sharing)
    waits(t, GROUPS)
    forward, backward = waits(t, GROUPS)
    assert (forward.total, backward.total) == (own, 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_padding_nobody_waits_either(tmp_path: Path, checkpointing: bool) -> None:
    t = trainer(tmp_path, prefix_sharing="off", gradient_checkpointing=checkpointing)
    alike = [group("alike", ("positive", 1.0, 4), ("negative", 0.0, 4))]
    waits(t, alike)
    forward, backward = waits(t, alike)
    assert (forward.total, backward.total) == (1, 0)  # transformers' own, as above


class CountOverSteps(TrainerCallback):
    """Counts from a step's begin to the check before the optimizer's step."""

    def __init__(self) -> None:
        self.steps: list[HostSyncs] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(HostSyncs())
        self.steps[-1].__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1].__exit__(None, None, None)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("tokens", [100_000, 1])
def test_a_step_is_read_once(tmp_path: Path, tokens: int, accumulation: int) -> None:
    """Whatever it is cut into, a step waits for the device once: are its numbers finite?"""
    counts = CountOverSteps()
    t = trainer(
        tmp_path,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_tokens_per_micro_batch=tokens,
        logging_steps=100,
        callbacks=[counts],
    )
    t.train()
    assert len(counts.steps) == 2
    for step in counts.steps:
        assert [line.split(" ", 1)[1] for line in step.by_line] == ["tolist"], step.by_line
        assert step.total == 1


def test_the_counter_counts() -> None:
    """By every way that the code before had."""
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    ways = [
        lambda: float(x.sum()),
        lambda: bool(mask.any()),
        lambda: x[mask],
        lambda: x.index_put((mask,), torch.tensor(0.0)),
        mask.nonzero,
        x.tolist,
        lambda: torch.isin(x, x),
        lambda: x.repeat_interleave(torch.tensor([1, 2, 1, 1])),
        lambda: torch.tensor([1.0]),
    ]
    for way in ways:
        with HostSyncs() as seen:
            way()
        assert seen.total >= 1
    with HostSyncs() as seen:
        torch.where(mask, x, 0.0).sum() + x[torch.arange(2)].sum()
    assert seen.total == 0
    assert list(itertools.chain(seen.by_line)) == []


# ---- who logs ------------------------------------------------------------------------------------


class LogsItself(TrainerCallback):
    """A user's callback that logs a loss of its own, as one process alone may."""

    trainer: NEATTrainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.log({"loss": -1.0})
        self.trainer.log({"train_loss": -1.0})


def test_a_loss_that_a_callback_logs_takes_nothing_from_the_next_line(tmp_path: Path) -> None:
    """And asks nothing of other processes, which may not log."""
    runs = []
    for name, callbacks in (("plain", []), ("logs", [LogsItself()])):
        t = trainer(tmp_path / name, callbacks=callbacks, logging_steps=2)
        for callback in callbacks:
            callback.trainer = t
        t.train()
        runs.append([line for line in rows_of(tmp_path / name) if line.get("loss", -1.0) != -1.0])
    assert [set(line) for line in runs[0]] == [set(line) for line in runs[1]]
    assert [line["loss/lm"] for line in runs[0]] == [line["loss/lm"] for line in runs[1]]
    alien = [line for line in rows_of(tmp_path / "logs") if line.get("loss") == -1.0]
    assert len(alien) == 4
    assert not any("loss/lm" in line for line in alien)
    own = [line["train_loss"] for line in rows_of(tmp_path / "logs") if "train_loss" in line]
    assert own[:-1] == [-1.0] * 4


def test_what_training_gives_back_is_what_it_logs(tmp_path: Path) -> None:
    """The mean over all steps, also those after the last log line."""
    t = trainer(tmp_path, logging_steps=3)
    output = t.train()
    every = trainer(tmp_path / "every", logging_steps=1)
    every.train()
    losses = [line["loss"] for line in rows_of(tmp_path / "every") if "loss" in line]
    assert output.training_loss == pytest.approx(sum(losses) / 4)
    assert output.metrics["train_loss"] == output.training_loss
    assert rows_of(tmp_path)[-1]["train_loss"] == output.training_loss


# ---- on the way to the device --------------------------------------------------------------------


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if not dataclasses.is_dataclass(value):
        return []
    return [t for f in dataclasses.fields(value) for t in tensors_in(getattr(value, f.name))]


@pytest.mark.parametrize("sharing", ["auto", "off"], ids=["packed", "padded"])
def test_a_batch_is_pinned_and_copied_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharing: str
) -> None:
    """DataLoader pins what has `pin_memory`. (There is no GPU here: pinning is a copy, and a copy
    to a device is looked at.)
    """
    engine = trainer(tmp_path, prefix_sharing=sharing).parts.engine
    pinned: set[int] = set()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copied = tensor.clone()
        pinned.add(id(copied))
        return copied

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda t: id(t) in pinned)
    batch = engine.collate(GROUPS)
    waiting: list[bool] = []
    loaded = pin_memory(batch)
    assert loaded["groups"] == batch["groups"]
    (given,), (micro_batch,) = batch["micro_batches"], loaded["micro_batches"]
    assert all(id(t) in pinned for t in tensors_in(micro_batch))
    for a, b in zip(tensors_in(given), tensors_in(micro_batch), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    to = torch.Tensor.to

    def copied(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        waiting.append(not kwargs["non_blocking"])
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", copied)
    micro_batch.to("cpu")
    assert waiting == [False] * len(tensors_in(micro_batch))
    given.to("cpu")
    assert all(waiting[len(tensors_in(micro_batch)) :])
