"""Tokens of a ranked pair that count by their contrast under the instructions."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slow_objective as slow
from neat_align import ConfigError, NEATTrainer
from neat_align.learning import losses
from neat_align.learning import pairs as pair_masks
from neat_align.learning.objective import objective_params, ranked_scores, score_tables
from neat_align.modeling.shared_prefix import sharing_prefixes
from neat_align.rounds.completions import Completion, CompletionGroup, Origin
from ranking_losses import BETA, GAMMA, INF, LN2, MARGIN, NAN, PAIRWISE, quick, ranking, tensor
from small_trainer import TOKENIZER, config, trainer

LN3 = math.log(3)
POWERS = (1.0, 0.0, 0.5)
EOS = TOKENIZER.eos_token_id


def padded(rows: list[list[float]], width: int, pad: float) -> torch.Tensor:
    return tensor([[*row, *[pad] * (width - len(row))] for row in rows])


# ---- weights and scores --------------------------------------------------------------------------


def test_token_weights_by_hand() -> None:
    """e = ln 2, −ln 3, 0, and ±5, kept within ln 4; the other sign turns the weights over."""
    contrasts = tensor([[LN2, -LN3, 0.0, 5.0, -5.0]])
    up = losses.token_weights(contrasts, scale=1.0, clip=math.log(4))
    assert up.tolist()[0] == pytest.approx([2, 1 / 3, 1, 4, 1 / 4], abs=1e-12)
    down = losses.token_weights(contrasts, scale=-1.0, clip=math.log(4))
    assert down.tolist()[0] == pytest.approx([1 / 2, 3, 1, 1 / 4, 4], abs=1e-12)
    half = losses.token_weights(contrasts, scale=0.5, clip=math.log(4))
    assert half.tolist()[0] == pytest.approx([2**0.5, 3**-0.5, 1, 2, 1 / 2], abs=1e-12)


@pytest.mark.parametrize(("power", "expected"), [(1.0, -2.5), (0.0, -5.0), (0.5, -2.5 * 2**0.5)])
def test_weighed_scores_by_hand(power: float, expected: float) -> None:
    """log π = −1, −3 with weights 1, 3: (−1 − 9)/4 = −2.5 a token, of 2 tokens −5.

    Gradient for the mean: a token's share of the weights, ¼ and ¾. Padding and an empty one: 0.
    """
    logps = tensor([[-1.0, -3.0, NAN], [NAN, NAN, NAN]]).requires_grad_()
    weights = tensor([[1.0, 3.0, INF], [NAN, 0.0, 1.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    scores = losses.completion_scores(logps, mask, power, weights)
    assert scores.tolist() == pytest.approx([expected, 0.0], abs=1e-12)
    (grad,) = torch.autograd.grad(scores.sum(), logps)
    of_mean = [0.25, 0.75, 0.0]
    scale = expected / -2.5
    assert grad.tolist()[0] == pytest.approx([scale * g for g in of_mean], abs=1e-12)
    assert grad.tolist()[1] == [0.0, 0.0, 0.0]


TOKENS = st.lists(
    st.tuples(st.floats(-8, -1e-3), st.floats(-6, 6), st.floats(-8, 0)), min_size=0, max_size=5
)
SIGNS = st.sampled_from([1.0, -1.0, 0.3])


@given(st.lists(TOKENS, min_size=1, max_size=4), SIGNS, st.sampled_from(POWERS), st.integers(0, 3))
@quick
def test_weighed_scores_are_the_slow_ones(
    drawn: list[list[tuple[float, float, float]]], scale: float, power: float, extra: int
) -> None:
    """However wide the table is, and whatever stands in its padding."""
    width = max(1, *map(len, drawn)) + extra
    logps = padded([[t[0] for t in c] for c in drawn], width, NAN)
    contrasts = padded([[t[1] for t in c] for c in drawn], width, INF)
    mask = torch.tensor([[t < len(c) for t in range(width)] for c in drawn])
    weights = losses.token_weights(contrasts, scale=scale, clip=2.0)
    found = losses.completion_scores(logps, mask, power, weights)
    expected = [
        slow.weighed_score([t[0] for t in c], [t[1] for t in c], scale, 2.0, power) for c in drawn
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert found.isfinite().all()


@given(st.lists(TOKENS, min_size=1, max_size=4), st.floats(0.01, 100))
@quick
def test_equal_weights_are_no_weights(
    drawn: list[list[tuple[float, float, float]]], weight: float
) -> None:
    """To the bit where they are 1 and a score is a mean."""
    width = max(1, *map(len, drawn))
    logps = padded([[t[0] for t in c] for c in drawn], width, NAN)
    mask = torch.tensor([[t < len(c) for t in range(width)] for c in drawn])
    plain = losses.completion_scores(logps, mask, 1.0)
    ones = losses.token_weights(torch.zeros_like(logps), scale=3.0, clip=1.0)
    assert torch.equal(losses.completion_scores(logps, mask, 1.0, ones), plain)
    for power in POWERS:
        torch.testing.assert_close(
            losses.completion_scores(logps, mask, power, ones * weight),
            losses.completion_scores(logps, mask, power),
        )


def test_the_strongest_weights_are_finite_in_fp32() -> None:
    """At the limits of the options: e^{±50}."""
    logps = torch.tensor([[-1.0, -3.0], [-1.0, -3.0]], requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    for contrasts in ([[10.0, -10.0], [10.0, 10.0]], [[-10.0, -10.0], [-99.0, 99.0]]):
        weights = losses.token_weights(torch.tensor(contrasts), scale=5.0, clip=10.0)
        scores = losses.completion_scores(logps, mask, 1.0, weights)
        (grad,) = torch.autograd.grad(scores.sum(), logps)
        assert scores.isfinite().all()
        assert grad.sum(-1).tolist() == pytest.approx([1.0, 1.0])


# ---- losses --------------------------------------------------------------------------------------

SCORE = st.floats(-6, 0, allow_subnormal=False)
MEMBER = st.tuples(st.none() | st.integers(-3, 3).map(float), SCORE, SCORE, SCORE, SCORE)


def ordered(rewards: list[float | None]) -> torch.Tensor:
    keys = tensor([[NAN if r is None else r for r in rewards]])
    return pair_masks.preferred_pairs(keys, ~keys.isnan(), 0.0)


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@given(drawn=st.lists(MEMBER, min_size=1, max_size=5))
@quick
def test_losses_of_two_scores_are_the_slow_ones(name: str, reduction: str, drawn: Any) -> None:
    """A completion in the middle is a winner with one score and a loser with the other."""
    rewards, own, low, ref, ref_low = (list(column) for column in zip(*drawn, strict=True))
    order = slow.pairs(rewards, 0.0)
    tables = [tensor([column]) for column in (ref, low, ref_low)]
    found = ranking(name, tensor([own]), ordered(rewards), reduction, *tables)
    gaps = {(i, j): own[i] - low[j] for i, j in order}
    if name == "dpo":
        gaps = {(i, j): own[i] - ref[i] - (low[j] - ref_low[j]) for i, j in order}
    expected = {
        "hinge": lambda: slow.hinge_of_gaps(gaps, MARGIN, reduction),
        "logistic": lambda: slow.logistic_of_gaps(gaps, BETA, GAMMA, reduction),
        "listwise": lambda: slow.listwise_of_gaps(gaps, BETA, reduction),
        "dpo": lambda: slow.logistic_of_gaps(gaps, BETA, 0.0, reduction),
    }[name]()
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", PAIRWISE)
def test_one_score_given_twice_is_the_loss_of_one_score(name: str) -> None:
    own, ref = tensor([[-1.0, -2.0, -0.5]]), tensor([[-1.1, -1.7, -0.6]])
    pairs = ordered([2.0, 1.0, 0.0])
    assert torch.equal(
        ranking(name, own, pairs, ref=ref, losers=own, ref_losers=ref),
        ranking(name, own, pairs, ref=ref),
    )


def test_a_logistic_pair_by_hand() -> None:
    """ℓ⁺ of the winner −1, ℓ⁻ of the loser −1 − ln 3: σ of the gap is ¾.

    What the winner would score as a loser, and the loser as a winner, is not read.
    """
    pairs = ordered([1.0, 0.0])
    loss = losses.logistic_loss(
        tensor([[-1.0, NAN]]),
        pairs,
        beta=1.0,
        gamma=0.0,
        reduction="mean",
        loser_scores=tensor([[NAN, -1 - LN3]]),
    )
    assert loss.item() == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("power", POWERS)
def test_gradients_are_those_of_finite_differences(name: str, power: float) -> None:
    """From log-probabilities to the loss, three answers of which one is in the middle."""
    torch.manual_seed(3)
    logps = (-2 * torch.rand(3, 4, dtype=torch.float64) - 0.1).requires_grad_()
    ref, contrasts = logps.detach() - 0.2, 2 * torch.randn(3, 4, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 2 + [False] * 2])
    pairs = ordered([2.0, 1.0, 0.0])

    def loss(x: torch.Tensor) -> torch.Tensor:
        tables = []
        for scale in (1.3, -1.3):
            weights = losses.token_weights(contrasts, scale=scale, clip=1.5)
            tables += [losses.completion_scores(v, mask, power, weights)[None] for v in (x, ref)]
        own, *others = tables
        return ranking(name, own, pairs, "mean", *others).sum()

    assert torch.autograd.gradcheck(loss, (logps,))
    (grad,) = torch.autograd.grad(loss(logps), logps)
    assert grad.abs().sum() > 1e-3


@pytest.mark.parametrize("name", [*PAIRWISE])
def test_active_pairs_are_of_the_scores_that_the_loss_compares(name: str) -> None:
    own, low = tensor([[0.0, -50.0]]), tensor([[0.0, 0.0]])
    pairs = ordered([1.0, 0.0])
    options: dict[str, Any] = {"margin": 0.1, "beta": 1.0, "gamma": 0.0}
    plain = pair_masks.active_pairs(own, pairs, ranking_loss=name, **options)
    assert not plain.any()  # a gap of 50
    weighed = pair_masks.active_pairs(own, pairs, ranking_loss=name, loser_scores=low, **options)
    assert weighed.tolist() == pairs.tolist()  # a gap of 0


# ---- the objective -------------------------------------------------------------------------------


def group(name: str, *members: tuple[Origin, float | None, int]) -> CompletionGroup:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    completions = []
    for i, (origin, reward, n) in enumerate(members):
        ids = [*torch.randint(5, 300, (n - 1,), generator=generator).tolist(), EOS]
        ref = tuple((-3 * torch.rand(n, generator=generator)).tolist())
        contrasts = tuple((2 * torch.randn(n, generator=generator)).tolist())
        completions.append(
            Completion(
                origin,
                i,
                f"{name} {i}",
                tuple(ids),
                ref_logprobs=ref,
                reward=reward,
                contrasts=contrasts,
            )
        )
    return CompletionGroup(name, name, tuple(range(5, 5 + len(name))), tuple(completions))


GROUPS = [
    group("first", ("positive", 2.0, 4), ("negative", -1.0, 6), ("plain", 0.5, 3)),
    group("second one", ("positive", 1.0, 3), ("rejected", 0.0, 2), ("negative", None, 5)),
]
WEIGHED: dict[str, Any] = {"token_weight_scale": 0.8, "token_weight_clip": 1.2, "lm_weight": 0.0}


@pytest.mark.parametrize("loss", PAIRWISE)
@pytest.mark.parametrize("power", [1.0, 0.0])
def test_the_step_is_the_slow_one(tmp_path: Path, loss: str, power: float) -> None:
    """Through a real model: its own log-probabilities, weighed and ranked by plain Python."""
    t = trainer(tmp_path, ranking_loss=loss, length_power=power, **WEIGHED)
    engine, p = t.parts.engine, t.parts.engine.objective
    micro = engine.micro_batch(GROUPS)
    found = float(engine.loss(t.policy, micro, None, autocast_dtype=None).detach())
    scored = t.parts.policies.logprobs(
        [g.prompt_ids for g in GROUPS for _ in g.completions],
        [c.token_ids for g in GROUPS for c in g.completions],
    )
    logps, total = iter(scored), 0.0
    for g in GROUPS:
        own, low = [], []
        for c in g.completions:
            lp = next(logps)
            for table, mu in ((own, 0.8), (low, -0.8)):
                score = slow.weighed_score(lp, c.contrasts, mu, 1.2, power)
                ref = slow.weighed_score(c.ref_logprobs, c.contrasts, mu, 1.2, power)
                table.append(score - ref if loss == "dpo" else score)
        order = slow.pairs([c.reward for c in g.completions], p.reward_margin)
        gaps = {(i, j): own[i] - low[j] for i, j in order}
        total += {
            "hinge": lambda: slow.hinge_of_gaps(gaps, p.hinge_margin, "mean"),  # noqa: B023
            "listwise": lambda: slow.listwise_of_gaps(gaps, p.beta, "mean"),  # noqa: B023
        }.get(
            loss,
            lambda: slow.logistic_of_gaps(gaps, p.beta, p.gamma, "mean"),  # noqa: B023
        )()
    assert found == pytest.approx(total / len(GROUPS), rel=1e-4)


def step(t: NEATTrainer, *cut: list[CompletionGroup]) -> tuple[dict[str, float], Any]:
    """The metrics and the gradient of one optimizer step, cut into these micro-batches."""
    engine = t.parts.engine
    micro_batches = [engine.micro_batch(groups) for groups in cut]
    counts = engine.count(micro_batches)
    engine.metrics.begin_step()
    t.policy.zero_grad(set_to_none=True)
    for micro in micro_batches:
        with sharing_prefixes(t.policy) if engine.layout == "packed" else nullcontext():
            engine.loss(t.policy, micro, counts, autocast_dtype=None).backward()
    grads = {n: p.grad.clone() for n, p in t.policy.named_parameters() if p.grad is not None}
    return engine.metrics.take(lambda last: last), grads


@pytest.mark.parametrize("loss", ["logistic", "dpo"])
def test_neither_the_layout_nor_the_cut_changes_a_step(tmp_path: Path, loss: str) -> None:
    changes = {**WEIGHED, "ranking_loss": loss}
    packed = trainer(tmp_path / "packed", **changes)
    padded_rows = trainer(tmp_path / "padded", **changes, prefix_sharing="off")
    assert packed.parts.engine.layout == "packed" != padded_rows.parts.engine.layout
    metrics, grads = step(packed, GROUPS)
    assert sum(float(g.abs().sum()) for g in grads.values()) > 1e-3
    for t, cut in ((packed, [[g] for g in GROUPS]), (padded_rows, [GROUPS])):
        others, other_grads = step(t, *cut)
        for name, value in metrics.items():
            if not name.startswith("packing/"):
                assert others[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        for name, grad in grads.items():
            torch.testing.assert_close(other_grads[name], grad, rtol=1e-3, atol=1e-5)


def test_a_pair_pulls_at_both_of_its_completions_alike(tmp_path: Path) -> None:
    t = trainer(tmp_path, **WEIGHED)
    metrics, _ = step(t, [group("pair", ("positive", 1.0, 4), ("negative", 0.0, 6))])
    assert metrics["ranking/gradient_share/positive"] == pytest.approx(0.5)
    assert metrics["ranking/gradient_share/negative"] == pytest.approx(0.5)


def test_nothing_waits_for_the_device() -> None:
    """On a device whose tensors hold nothing that could be read."""
    logps = torch.zeros(2, 3, device="meta")
    mask = torch.ones(2, 3, dtype=torch.bool, device="meta")
    weights = losses.token_weights(logps, scale=1.0, clip=1.0)
    scores = losses.completion_scores(logps, mask, 0.5, weights)[None]
    pairs = torch.ones(1, 2, 2, dtype=torch.bool, device="meta")
    for name in PAIRWISE:
        assert ranking(name, scores, pairs, "mean", scores, scores, scores).shape == (1,)


def test_without_a_scale_nothing_is_weighed_to_the_bit(tmp_path: Path) -> None:
    """Whatever contrasts the groups have; and without contrasts weights change nothing."""
    plain = trainer(tmp_path / "plain", lm_weight=0.0)
    bare = [
        replace(g, completions=tuple(replace(c, contrasts=()) for c in g.completions))
        for g in GROUPS
    ]
    zero = [
        replace(
            g,
            completions=tuple(
                replace(c, contrasts=(0.0,) * len(c.token_ids)) for c in g.completions
            ),
        )
        for g in GROUPS
    ]
    engine = plain.parts.engine

    def loss(t: Any, groups: Any) -> torch.Tensor:
        micro = t.parts.engine.micro_batch(groups)
        return t.parts.engine.loss(plain.policy, micro, None, autocast_dtype=None).detach()

    assert torch.equal(loss(plain, GROUPS), loss(plain, bare))
    weighed = trainer(tmp_path / "weighed", **WEIGHED)
    assert torch.equal(loss(weighed, zero), loss(plain, bare))
    assert not torch.equal(loss(weighed, GROUPS), loss(plain, bare))
    assert engine.objective.token_weight_scale == 0.0


def test_the_other_terms_and_the_accuracy_are_of_plain_scores(tmp_path: Path) -> None:
    terms: dict[str, Any] = {
        "lm_weight": 0.7,
        "kl_weight": 0.1,
        "negative_penalty": "npo",
        "negative_weight": 0.3,
    }
    seen = {}
    for scale in (0.0, 0.8):
        t = trainer(tmp_path / str(scale), token_weight_scale=scale, **terms)
        engine = t.parts.engine
        engine.metrics.begin_step()
        engine.loss(t.policy, engine.micro_batch(GROUPS), None, autocast_dtype=None)
        seen[scale] = engine.metrics.take(lambda last: last)
    for name in ("loss/lm", "loss/negative", "loss/kl", "ranking/accuracy"):
        assert seen[0.8][name] == seen[0.0][name] != 0, name
    assert seen[0.8]["loss/ranking"] != seen[0.0]["loss/ranking"]
    shares = [v for name, v in seen[0.8].items() if name.startswith("ranking/gradient_share")]
    assert sum(shares) == pytest.approx(1.0)


def test_tables_are_one_where_nothing_is_weighed(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    micro = t.parts.engine.micro_batch(GROUPS)
    logps = torch.zeros_like(micro.groups.ref_logps) - 1.0
    p = t.parts.engine.objective
    plain = score_tables(micro.groups, logps, p)
    assert ranked_scores(micro.groups, logps, p, plain).losers is None


def test_groups_without_contrasts_are_refused(tmp_path: Path) -> None:
    t = trainer(tmp_path, **WEIGHED)
    first = GROUPS[0]
    one_without = replace(
        first,
        completions=(replace(first.completions[0], contrasts=()), *first.completions[1:]),
    )
    micro = t.parts.engine.micro_batch([one_without])
    with pytest.raises(ConfigError, match="no token_contrasts, which token_weight_scale needs"):
        t.parts.engine.loss(t.policy, micro, None, autocast_dtype=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ranking_loss": "none", "token_weight_scale": 1.0},
            "token_weight_scale is set but ranking_loss is none: no pair is ranked",
        ),
        (
            {"ranking_loss": "kto", "token_weight_scale": 1.0},
            "token_weight_scale is set but ranking_loss is kto: it has no winner and loser",
        ),
        ({"token_weight_clip": 1.0}, "token_weight_scale is 0: remove it, or set"),
        ({"token_weight_pairs": 2}, "token_weight_scale is 0: remove it, or set"),
        ({"token_weight_scale": 6.0}, "token_weight_scale is 6"),
        ({"token_weight_scale": -5.5}, "token_weight_scale is -5.5"),
        ({"token_weight_scale": 1.0, "token_weight_clip": 0.0}, "token_weight_clip is 0"),
        ({"token_weight_scale": 1.0, "token_weight_clip": 11.0}, "token_weight_clip is 11"),
        ({"token_weight_scale": 1.0, "token_weight_pairs": 0}, "token_weight_pairs is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **changes)


def test_how_many_pairs_of_instructions_a_group_keeps(tmp_path: Path) -> None:
    weighed: dict[str, Any] = {"token_weight_scale": 1.0, "token_weight_pairs": 2}
    taught: dict[str, Any] = {"distil_weight": 1.0, "num_plain": 2}
    asked = [
        ({}, (0, 0, 0)),
        (weighed, (2, 2, 0)),
        (taught, (1, 0, 1)),
        ({**weighed, **taught}, (2, 2, 1)),
        ({**weighed, **taught, "distil_pairs": 3}, (3, 2, 3)),
        ({**weighed, **taught, "distil_toward": "sharpened"}, (2, 2, 0)),
    ]
    for changes, expected in asked:
        c = config(tmp_path, **changes)
        assert (c.contrast_pairs, c.weighing_pairs, c.taught_pairs) == expected
        assert objective_params(c).teach.pairs == expected[2]
