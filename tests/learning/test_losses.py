"""The losses against hand-derived numbers, a slow reference, finite differences, and what must hold
for any input.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import slow_objective as slow
from neat_align.learning import losses
from neat_align.learning import pairs as pair_masks
from neat_align.rounds import ranking as group_ranking
from ranking_losses import BETA, GAMMA, INF, LN2, MARGIN, NAN, PAIRWISE, quick, ranking, tensor

RANKING = (*PAIRWISE, "kto")
REDUCTIONS = ("mean", "sum")


def slow_ranking(name, scores, ref, order, reduction):
    if name == "hinge":
        return slow.hinge(scores, order, MARGIN, reduction)
    if name == "logistic":
        return slow.logistic(scores, order, BETA, GAMMA, reduction)
    if name == "listwise":
        return slow.plackett_luce(scores, order, BETA, reduction)
    if name == "kto":
        return slow.kto(scores, ref, order, BETA, reduction)
    return slow.dpo(scores, ref, order, BETA, reduction)


def ordered(*rewards, margin=0.0):
    """Pairs of one group of these rewards; None abstains."""
    keys = tensor([[NAN if r is None else r for r in rewards]])
    return pair_masks.preferred_pairs(keys, ~keys.isnan(), margin)


def gradient(fn, x):
    x = x.clone().requires_grad_()
    value = fn(x)
    (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), grad


def rows(*completions, pad=NAN):
    """Token log-probabilities of several completions as one padded matrix and its mask; padding is
    NaN.
    """
    width = max(1, *(len(c) for c in completions)) + 1
    logps = tensor([list(c) + [pad] * (width - len(c)) for c in completions])
    return logps, torch.tensor([[t < len(c) for t in range(width)] for c in completions])


# ---- what hypothesis draws -----------------------------------------------------------------------

reward = st.one_of(st.none(), st.integers(-3, 3).map(float))
score = st.floats(-6, 0, allow_subnormal=False)
completion = st.tuples(
    reward, score, score, st.booleans()
)  # reward, score, reference score, of negative origin
group = st.lists(completion, min_size=1, max_size=5)
token_logps = st.lists(st.floats(-8, -1e-3), max_size=6)


def unpack(drawn):
    rewards, scores, refs, negative = (list(column) for column in zip(*drawn, strict=True))
    return rewards, tensor([scores]), tensor([refs]), torch.tensor([negative])


# ---- scores and pairs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("power", "expected"),
    [(1.0, [-2.0, -5.0, 0.0]), (0.0, [-8.0, -5.0, 0.0]), (0.5, [-4.0, -5.0, 0.0])],
)
def test_completion_scores_by_hand(power, expected):
    """Sums −1−2−2−3 = −8 of 4 tokens and −5 of 1. α=1: −8/4, −5/1. α=0: the sums. α=½: −8/2, −5/1.

    Empty: 0.
    """
    logps, mask = rows([-1.0, -2.0, -2.0, -3.0], [-5.0], [])
    assert losses.completion_scores(logps, mask, power).tolist() == expected


def test_completion_scores_gradient_is_one_over_length_and_zero_at_padding():
    logps, mask = rows([-1.0, -2.0], [])
    _, grad = gradient(lambda x: losses.completion_scores(x, mask, 1.0), logps)
    assert grad.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_completion_scores_keep_their_precision(dtype):
    scores = losses.completion_scores(
        torch.full((1, 3), -1.0, dtype=dtype), torch.ones(1, 3, dtype=torch.bool), 0.5
    )
    assert scores.dtype == dtype
    torch.testing.assert_close(scores, torch.tensor([-math.sqrt(3)], dtype=dtype))


def test_preferred_pairs_by_hand():
    """Rewards 3, 1, 1, none, margin 0: 3 above each 1, the tie and the abstained make no pair.

    Margin 2: 3 − 1 is not above 2.
    """
    assert ordered(3.0, 1.0, 1.0, None).nonzero().tolist() == [[0, 0, 1], [0, 0, 2]]
    assert not ordered(3.0, 1.0, 1.0, None, margin=2.0).any()


@given(st.lists(reward, min_size=1, max_size=6), st.sampled_from([0.0, 0.5, 1.0, 2.5]))
@quick
def test_preferred_pairs_are_those_of_the_group_file(rewards, margin):
    expected = group_ranking.ordered_pairs(rewards, margin)
    assert expected == slow.pairs(rewards, margin)
    assert [(i, j) for _, i, j in ordered(*rewards, margin=margin).nonzero().tolist()] == expected


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_absent_keys_never_pair(garbage):
    keys, present = tensor([[1.0, garbage, 0.0]]), torch.tensor([[True, False, True]])
    assert pair_masks.preferred_pairs(keys, present, 0.0).nonzero().tolist() == [[0, 0, 2]]


def test_best_against_worst_by_hand():
    """5, 1, 5, 1, none: the first 5 above the first 1, and nothing else.

    A gap of 4 is a near-tie at margin 4.
    """
    keys = tensor([[5.0, 1.0, 5.0, 1.0, NAN]])
    assert pair_masks.best_against_worst(keys, ~keys.isnan(), 3.9).nonzero().tolist() == [[0, 0, 1]]
    assert not pair_masks.best_against_worst(keys, ~keys.isnan(), 4.0).any()


@given(
    st.lists(
        st.lists(st.tuples(reward, st.booleans()), min_size=1, max_size=6), min_size=1, max_size=4
    ),
    st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    st.sampled_from([NAN, INF, -INF, 1e30]),
)
@example([[(None, True)], [(1.0, False), (2.0, True)]], 0.0, INF)
@quick
def test_best_against_worst_is_that_of_the_group_file(drawn, margin, garbage):
    """A batch of unlike groups: absent slots hold garbage, abstentions NaN; at most one pair a
    group, and one of `preferred_pairs`.
    """
    width = max(len(g) for g in drawn)
    keys, present = (
        torch.full((len(drawn), width), garbage, dtype=torch.float64),
        torch.zeros(len(drawn), width, dtype=torch.bool),
    )
    wanted = []
    for g, members in enumerate(drawn):
        # A slot that is not there does not count, whatever its key says.
        given_keys = [r if there else None for r, there in members]
        for k, (r, there) in enumerate(members):
            present[g, k] = there and r is not None
            if there:
                keys[g, k] = NAN if r is None else r
        ends = group_ranking.extremes(given_keys, margin)
        wanted += [] if ends is None else [[g, *ends]]
    found = pair_masks.best_against_worst(keys, present, margin)
    assert found.nonzero().tolist() == wanted
    assert not (found & ~pair_masks.preferred_pairs(keys, present, margin)).any()
    assert bool(
        (
            found.flatten(1).sum(-1)
            == pair_masks.preferred_pairs(keys, present, margin).flatten(1).any(-1)
        ).all()
    )


# ---- ranking losses: by hand ---------------------------------------------------------------------


def test_hinge_by_hand():
    """Rewards 2 > 1 > 0, scores −2, −1, −3, m = ½.

    Pairs: (0,1) ½+1 = 1.5; (0,2) ½−1 → 0; (1,2) ½−2 → 0. Sum 1.5, mean 0.5.
    """
    scores, pairs = tensor([[-2.0, -1.0, -3.0]]), ordered(2.0, 1.0, 0.0)
    assert losses.hinge_loss(scores, pairs, margin=0.5, reduction="sum").item() == 1.5
    assert losses.hinge_loss(scores, pairs, margin=0.5, reduction="mean").item() == 0.5


def test_hinge_exactly_at_its_margin_has_no_gradient():
    """Equal scores, m = 0: RRHF counts p_i < p_j strictly, so the pair teaches nothing, and
    `active_pairs` says so too.
    """
    scores, pairs = tensor([[-1.0, -1.0]]), ordered(1.0, 0.0)
    _, grad = gradient(lambda s: losses.hinge_loss(s, pairs, margin=0.0, reduction="sum"), scores)
    assert grad.tolist() == [[0.0, 0.0]]
    assert not pair_masks.active_pairs(
        scores, pairs, ranking_loss="hinge", margin=0.0, beta=1.0, gamma=0.0
    ).any()


def test_logistic_by_hand():
    """One pair, β = 2, ℓ_i − ℓ_j = ln 2, γ = ln 4: z = 2 ln 2 − ln 4 = 0, loss ln 2. γ = 0: σ(ln 4)
    = 4/5, loss ln 5/4.
    """
    scores, pairs = tensor([[-1.0, -1.0 - LN2]]), ordered(1.0, 0.0)
    for gamma, expected in ((math.log(4), LN2), (0.0, math.log(5 / 4))):
        loss = losses.logistic_loss(scores, pairs, beta=2.0, gamma=gamma, reduction="mean")
        assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_listwise_by_hand():
    """β = 1, e^ℓ = 4, 2, 1, rewards 2 > 1 > 0. Winner 0: 4/(4+2+1); winner 1: 2/(2+1). Sum ln(7/4)
    + ln(3/2), mean half. With rewards 2 > 0 = 0 only winner 0 is left, and the tied do not compete:
    ln(7/4).
    """
    scores = tensor([[math.log(4), math.log(2), 0.0]])
    three = ordered(2.0, 1.0, 0.0)
    total = math.log(7 / 4) + math.log(3 / 2)
    assert losses.listwise_loss(scores, three, beta=1.0, reduction="sum").item() == pytest.approx(
        total, abs=1e-12
    )
    assert losses.listwise_loss(scores, three, beta=1.0, reduction="mean").item() == pytest.approx(
        total / 2, abs=1e-12
    )
    tied = losses.listwise_loss(scores, ordered(2.0, 0.0, 0.0), beta=1.0, reduction="mean")
    assert tied.item() == pytest.approx(math.log(7 / 4), abs=1e-12)


def test_listwise_tied_winners_do_not_compete():
    """β = 1, e^ℓ = 4, 2, 1, rewards 1 = 1 > 0.

    Winner 0 meets only the last: 4/(4+1); winner 1: 2/(2+1). No index decides.
    """
    scores = tensor([[math.log(4), math.log(2), 0.0]])
    loss = losses.listwise_loss(scores, ordered(1.0, 1.0, 0.0), beta=1.0, reduction="sum")
    assert loss.item() == pytest.approx(math.log(5 / 4) + math.log(3 / 2), abs=1e-12)


def test_dpo_by_hand():
    """β = ½; log-ratios −1 − (−3) = 2 and −1 − (−1) = 0: z = ½ · 2 = 1, loss ln(1 + e⁻¹).

    The other way round ln(1 + e).
    """
    scores, ref = tensor([[-1.0, -1.0]]), tensor([[-3.0, -1.0]])
    for rewards, expected in (
        ((1.0, 0.0), math.log(1 + math.exp(-1))),
        ((0.0, 1.0), math.log(1 + math.e)),
    ):
        loss = losses.dpo_loss(scores, ref, ordered(*rewards), beta=0.5, reduction="mean")
        assert loss.item() == pytest.approx(expected, abs=1e-12)


# ---- ranking losses: for any input ---------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", RANKING)
@given(drawn=group)
@quick
def test_ranking_losses_are_the_slow_ones(name, reduction, drawn):
    rewards, scores, ref, _ = unpack(drawn)
    loss = ranking(name, scores, ordered(*rewards), reduction, ref)
    expected = slow_ranking(
        name, scores[0].tolist(), ref[0].tolist(), slow.pairs(rewards, 0.0), reduction
    )
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(drawn=group)
@quick
def test_hinge_sum_is_rrhf(drawn):
    rewards, scores, _, _ = unpack(drawn)
    loss = losses.hinge_loss(scores, ordered(*rewards), margin=0.0, reduction="sum")
    assert loss.item() == pytest.approx(slow.rrhf(scores[0].tolist(), rewards), abs=1e-9)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", RANKING)
@given(drawn=group, data=st.data())
@quick
def test_order_of_completions_does_not_matter(name, reduction, drawn, data):
    rewards, scores, ref, _ = unpack(drawn)
    order = data.draw(st.permutations(range(len(rewards))))
    value, grad = gradient(lambda s: ranking(name, s, ordered(*rewards), reduction, ref), scores)
    shuffled = ordered(*(rewards[i] for i in order))
    value2, grad2 = gradient(
        lambda s: ranking(name, s, shuffled, reduction, ref[:, order]), scores[:, order]
    )
    torch.testing.assert_close(value2, value)
    torch.testing.assert_close(grad2, grad[:, order])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", RANKING)
@given(drawn=group, garbage=st.sampled_from([NAN, INF, -INF, 1e30, 0.0]), extra=st.integers(1, 3))
@quick
def test_padding_changes_nothing(name, reduction, drawn, garbage, extra):
    rewards, scores, ref, negative = unpack(drawn)
    k = len(rewards)
    keys = tensor([[NAN if r is None else r for r in rewards]])
    more = torch.full((1, extra), garbage, dtype=torch.float64)
    present = torch.cat([~keys.isnan(), torch.zeros(1, extra, dtype=torch.bool)], 1)
    padded = pair_masks.preferred_pairs(torch.cat([keys, more], 1), present, 0.0)
    value, grad = gradient(lambda s: ranking(name, s, ordered(*rewards), reduction, ref), scores)
    value2, grad2 = gradient(
        lambda s: ranking(name, s, padded, reduction, torch.cat([ref, more], 1)),
        torch.cat([scores, more], 1),
    )
    torch.testing.assert_close(value2, value)
    torch.testing.assert_close(grad2[:, :k], grad)
    assert (grad2[:, k:] == 0).all()
    bad = torch.cat([negative, torch.ones(1, extra, dtype=torch.bool)], 1)
    chosen = pair_masks.penalised(torch.cat([keys, more], 1), present, bad)
    assert chosen.tolist() == [slow.below_median(rewards, negative[0].tolist()) + [False] * extra]


@pytest.mark.parametrize(
    "transform",
    [lambda r: 2 * r + 7, lambda r: r**3, math.exp, math.atan, lambda r: 10.0**r],
    ids=["affine", "cube", "exp", "atan", "10^r"],
)
@given(drawn=group)
@quick
def test_only_the_order_of_rewards_counts(transform, drawn):
    rewards, _, _, negative = unpack(drawn)
    keys = tensor([[NAN if r is None else r for r in rewards]])
    moved = tensor([[NAN if r is None else transform(r) for r in rewards]])
    present = ~keys.isnan()
    assert pair_masks.preferred_pairs(moved, present, 0.0).equal(
        pair_masks.preferred_pairs(keys, present, 0.0)
    )
    assert pair_masks.penalised(moved, present, negative).equal(
        pair_masks.penalised(keys, present, negative)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("rewards", [(1.0, 1.0, 1.0), (None, None), (2.0,), (None, 1.0)])
def test_groups_without_a_pair_are_zero(name, reduction, rewards):
    value, grad = gradient(
        lambda s: ranking(name, s, ordered(*rewards), reduction),
        tensor([[-1.0, -9.0, -2.0]])[:, : len(rewards)],
    )
    assert value.item() == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", RANKING)
@given(drawn=st.lists(st.lists(completion, min_size=3, max_size=3), min_size=1, max_size=4))
@quick
def test_a_group_does_not_see_its_neighbours(name, reduction, drawn):
    parts = [unpack(g) for g in drawn]
    pairs = torch.cat([ordered(*p[0]) for p in parts])
    ref = torch.cat([p[2] for p in parts])
    value, grad = gradient(
        lambda s: ranking(name, s, pairs, reduction, ref), torch.cat([p[1] for p in parts])
    )
    for g, (rewards, scores, own_ref, _) in enumerate(parts):
        alone, own_grad = gradient(
            lambda s, r=rewards, f=own_ref: ranking(name, s, ordered(*r), reduction, f), scores
        )
        torch.testing.assert_close(value[g : g + 1], alone)
        torch.testing.assert_close(grad[g : g + 1], own_grad)


@given(score, score, st.sampled_from(REDUCTIONS))
@quick
def test_listwise_of_two_is_logistic(a, b, reduction):
    scores, pairs = tensor([[a, b]]), ordered(0.0, 1.0)
    one = losses.listwise_loss(scores, pairs, beta=BETA, reduction=reduction)
    other = losses.logistic_loss(scores, pairs, beta=BETA, gamma=0.0, reduction=reduction)
    torch.testing.assert_close(one, other)


@given(group)
@quick
def test_dpo_at_the_reference_is_log_two(drawn):
    rewards, scores, _, _ = unpack(drawn)
    pairs = ordered(*rewards)
    loss = losses.dpo_loss(scores, scores, pairs, beta=0.1, reduction="mean")
    assert loss.item() == pytest.approx(LN2 if pairs.any() else 0.0, abs=1e-12)


@given(group, score)
@quick
def test_a_shift_common_to_the_group_changes_no_ranking_loss(drawn, shift):
    rewards, scores, ref, _ = unpack(drawn)
    for name in PAIRWISE:
        moved = ranking(name, scores + shift, ordered(*rewards), ref=ref)
        torch.testing.assert_close(moved, ranking(name, scores, ordered(*rewards), ref=ref))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", RANKING)
def test_a_worse_completion_is_pushed_down_and_a_better_one_up(name, reduction):
    """The loser is the likelier one, so that every loss is active; descent moves against the
    gradient.
    """
    _, grad = gradient(
        lambda s: ranking(name, s, ordered(1.0, 0.0, 0.5), reduction), tensor([[-3.0, -1.0, -2.0]])
    )
    assert grad[0, 1] > 0
    assert grad[0, 0] < 0
    if name in PAIRWISE:
        assert grad.sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("name", PAIRWISE)
def test_huge_gaps_stay_finite(name, gap, dtype):
    """When the order is wrong by 1e4, the loss is β·1e4 (or 1e4 + m) and the gradient of the pair
    is β (or 1), not less.
    """
    value, grad = gradient(
        lambda s: ranking(name, s, ordered(1.0, 0.0)), torch.tensor([[gap, 0.0]], dtype=dtype)
    )
    scale = 1.0 if name == "hinge" else BETA
    wrong = gap < 0
    assert value.item() == pytest.approx(scale * 1e4 if wrong else 0.0, rel=1e-3, abs=1e-6)
    assert grad[0].tolist() == pytest.approx([-scale, scale] if wrong else [0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", PAIRWISE)
def test_ranking_gradients_are_those_of_finite_differences(name, reduction):
    scores = tensor([[-1.0, -2.3, -0.4, -1.7], [-0.2, -0.9, -3.0, -1.1]]).requires_grad_()
    ref = tensor([[-1.5, -2.0, -0.7, -1.0], [-0.6, -0.8, -2.0, -1.4]]).requires_grad_()
    pairs = torch.cat([ordered(1.0, 2.0, 0.0, 1.0), ordered(0.0, None, 3.0, 1.0)])
    assert torch.autograd.gradcheck(
        lambda s, r: ranking(name, s, pairs, reduction, r), (scores, ref)
    )


# ---- KTO -----------------------------------------------------------------------------------------


def test_kto_by_hand():
    """β = 1, ref 0, ratios 3, 1, 0 with rewards 2 > 1 > 0: the middle one has no label, and
    z₀ = 4/3. 1 − σ(3 − 4/3) = σ(−5/3), 1 − σ(4/3 − 0) = σ(−4/3); half of each, `sum` twice that.

    Gradient of the first: −½ σ(5/3) σ(−5/3); of the last +½ σ(4/3) σ(−4/3); z₀ has none.
    """
    scores, ref, pairs = tensor([[3.0, 1.0, 0.0]]), tensor([[0.0] * 3]), ordered(2.0, 1.0, 0.0)
    good, bad = slow.sigmoid(-5 / 3), slow.sigmoid(-4 / 3)

    def loss(s, reduction="mean"):
        return losses.kto_loss(s, ref, pairs, beta=1.0, reduction=reduction)

    value, grad = gradient(loss, scores)
    assert value.item() == pytest.approx((good + bad) / 2)
    assert loss(scores, "sum").item() == pytest.approx(good + bad)
    slopes = [-good * (1 - good) / 2, 0.0, bad * (1 - bad) / 2]
    assert grad[0].tolist() == pytest.approx(slopes)


def test_kto_weighs_both_sides_alike_by_hand():
    """One desirable against three undesirable ones, all at the reference: every loss is ½, and the
    single one has half of the gradient. β = 2: ½ · 2 · ¼ = ¼ for it, a twelfth for each other.
    """
    scores, pairs = tensor([[-1.0, -2.0, -3.0, -4.0]]), ordered(1.0, 0.0, 0.0, 0.0)
    value, grad = gradient(
        lambda s: losses.kto_loss(s, scores, pairs, beta=2.0, reduction="mean"), scores
    )
    assert value.item() == pytest.approx(0.5)
    assert grad[0].tolist() == pytest.approx([-1 / 4, 1 / 12, 1 / 12, 1 / 12])


def test_the_sides_of_a_group_by_hand():
    """Above 3, 1, 1, 0 and below 0, 1, 1, 3 of the others; two tied in the middle are neither."""
    good, bad = pair_masks.sides(ordered(3.0, 1.0, 1.0, 0.0))
    assert good.tolist() == [[True, False, False, False]]
    assert bad.tolist() == [[False, False, False, True]]
    good, bad = pair_masks.sides(ordered(1.0, None, 0.0, 0.0))
    assert (good.tolist(), bad.tolist()) == (
        [[True, False, False, False]],
        [[False, False, True, True]],
    )


@given(drawn=group, margin=st.sampled_from([0.0, 1.0, 2.5]))
@quick
def test_a_group_with_a_pair_has_both_sides(drawn, margin):
    rewards, _, _, _ = unpack(drawn)
    pairs = ordered(*rewards, margin=margin)
    good, bad = pair_masks.sides(pairs)
    assert bool(good.any()) == bool(bad.any()) == bool(pairs.any())
    assert not (good & bad).any()


def test_ktos_reference_point_by_hand():
    """The mean of those that are in a pair, 0 where that is negative, and for no pair."""
    ratios = tensor([[3.0, 99.0, 1.0], [-3.0, 99.0, 1.0], [3.0, 2.0, 1.0]]).requires_grad_()
    pairs = torch.cat([ordered(1.0, None, 0.0), ordered(1.0, None, 0.0), ordered(1.0, 1.0, 1.0)])
    point = pair_masks.reference_point(ratios, pairs)
    assert point.tolist() == [2.0, 0.0, 0.0]
    assert not point.requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kto_gradients_are_those_of_finite_differences(reduction):
    """Below the reference on average, where z₀ is 0 on both sides of each difference."""
    scores = tensor([[-1.0, -2.3, -0.4, -1.7], [-0.2, -0.9, -3.0, -1.1]]).requires_grad_()
    ref = tensor([[-0.5, -2.0, -0.7, -1.0], [-0.6, -0.8, -2.0, -0.4]]).requires_grad_()
    pairs = torch.cat([ordered(1.0, 2.0, 0.0, 1.0), ordered(0.0, None, 3.0, 1.0)])
    assert torch.autograd.gradcheck(
        lambda s, r: losses.kto_loss(s, r, pairs, beta=BETA, reduction=reduction), (scores, ref)
    )


@given(drawn=group, reduction=st.sampled_from(REDUCTIONS))
@quick
def test_kto_holds_its_reference_point_fixed(drawn, reduction):
    """Its gradient is that of the slow loss with z₀ as a number, by central differences."""
    rewards, scores, ref, _ = unpack(drawn)
    order = slow.pairs(rewards, 0.0)
    _, grad = gradient(lambda s: ranking("kto", s, ordered(*rewards), reduction, ref), scores)
    mine, refs, step = scores[0].tolist(), ref[0].tolist(), 1e-5
    point = slow.kto_point(mine, refs, order)
    for i in range(len(mine)):
        up, down = (
            slow.kto(
                [v + d * (i == k) for k, v in enumerate(mine)], refs, order, BETA, reduction, point
            )
            for d in (step, -step)
        )
        assert grad[0, i].item() == pytest.approx((up - down) / (2 * step), abs=1e-6)


@given(drawn=group, shift=st.floats(0, 5))
@quick
def test_a_shift_above_the_reference_moves_ktos_reference_point_along(drawn, shift):
    """So that only the differences count there; below it, it stays where it is."""
    rewards, scores, ref, _ = unpack(drawn)
    above, pairs = scores.clamp(min=ref), ordered(*rewards)
    moved = ranking("kto", above + shift, pairs, ref=ref)
    torch.testing.assert_close(moved, ranking("kto", above, pairs, ref=ref))


@given(drawn=group)
@quick
def test_kto_at_the_reference_is_a_half_and_never_beyond_one(drawn):
    rewards, scores, ref, _ = unpack(drawn)
    pairs = ordered(*rewards)
    assert ranking("kto", scores, pairs, ref=scores).item() == pytest.approx(0.5 * pairs.any())
    assert 0 <= ranking("kto", scores, pairs, ref=ref).item() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_kto_lets_go_of_what_is_far_on_either_side(gap, dtype):
    value, grad = gradient(
        lambda s: ranking("kto", s, ordered(1.0, 0.0)), torch.tensor([[gap, 0.0]], dtype=dtype)
    )
    # Wrong by 1e4, z₀ is 0: the first one is lost, the second is 1 above its reference.
    assert value.item() == pytest.approx(0.0 if gap > 0 else (1 + slow.sigmoid(BETA)) / 2)
    assert grad.abs()[0, 0].item() == 0


# ---- language modelling and penalties ------------------------------------------------------------


def test_lm_loss_by_hand():
    """(1 + 2 + 3) / 3 = 2 nats per token; an empty row is 0; gradient −1/3 a token."""
    logps, mask = rows([-1.0, -2.0, -3.0], [])
    value, grad = gradient(lambda x: losses.lm_loss(x, mask), logps)
    assert value.tolist() == [2.0, 0.0]
    torch.testing.assert_close(grad, tensor([[-1 / 3, -1 / 3, -1 / 3, 0.0], [0.0] * 4]))


def test_unlikelihood_by_hand():
    """p = ½, ¾: −ln ½ = ln 2, −ln ¼ = 2 ln 2, mean 1.5 ln 2, to within the ε.

    Gradient p/(1−p) over 2 tokens: ½, 3/2.
    """
    logps, mask = rows([math.log(0.5), math.log(0.75)], [])
    value, grad = gradient(lambda x: losses.unlikelihood_penalty(x, mask), logps)
    assert value.tolist() == pytest.approx([1.5 * LN2, 0.0], abs=1e-4)
    assert grad[0].tolist() == pytest.approx([0.5, 1.5, 0.0], abs=1e-4)


def test_npo_by_hand():
    """β = ½. At the reference (2/β) ln 2 = 4 ln 2, gradient 2σ(0) = 1.

    With ℓ − ref = 2 ln 3, (π/π_ref)^β = 3: 4 ln 4, 2 · ¾.
    """
    scores, ref = tensor([-1.0, -1.0]), tensor([-1.0, -1.0 - 2 * math.log(3)])
    value, grad = gradient(lambda s: losses.npo_penalty(s, ref, beta=0.5), scores)
    assert value.tolist() == pytest.approx([4 * LN2, 4 * math.log(4)], abs=1e-12)
    assert grad.tolist() == pytest.approx([1.0, 1.5], abs=1e-12)


def test_kl_k3_by_hand():
    """π_ref/π = 2 and ½: 2 − ln 2 − 1 and ½ + ln 2 − 1, sum ½, mean ¼ nat per token.

    Gradient in log π: (1 − ratio)/2.
    """
    logps, mask = rows([-1.0, -1.0], [])
    ref, _ = rows([-1.0 + LN2, -1.0 - LN2], [])
    value, grad = gradient(lambda x: losses.kl_k3(x, ref, mask), logps)
    assert value.tolist() == pytest.approx([0.25, 0.0], abs=1e-12)
    assert grad[0].tolist() == pytest.approx([-0.5, 0.25, 0.0], abs=1e-12)


PAIRS = torch.tensor([[[False, True, True], [False, False, True], [False, False, False]]])
SCORE_LOSSES = {
    "hinge": lambda x: losses.hinge_loss(x, PAIRS, margin=1.0, reduction="mean"),
    "logistic": lambda x: losses.logistic_loss(x, PAIRS, beta=2.0, gamma=0.5, reduction="mean"),
    "listwise": lambda x: losses.listwise_loss(x, PAIRS, beta=1.0, reduction="mean"),
    "dpo": lambda x: losses.dpo_loss(x, x.detach() - 0.1, PAIRS, beta=2.0, reduction="mean"),
    "kto": lambda x: losses.kto_loss(x, x.detach() - 0.1, PAIRS, beta=2.0, reduction="mean"),
    "npo": lambda x: losses.npo_penalty(x[0], x[0].detach() - 0.1, beta=1.0),
}
TOKEN_LOSSES = {
    "score": lambda x: losses.completion_scores(x, x < 1, 0.7),
    "lm": lambda x: losses.lm_loss(x, x < 1),
    "unlikelihood": lambda x: losses.unlikelihood_penalty(x, x < 1),
    "k3": lambda x: losses.kl_k3(x, torch.full_like(x, -1.0), x < 1),
}


@pytest.mark.parametrize("name", [*SCORE_LOSSES, *TOKEN_LOSSES])
def test_gradients_in_fp32_are_those_in_fp64(name):
    """Training runs in fp32: a form whose gradient cancels there is wrong, whatever finite
    differences in fp64 say.
    """
    losses = SCORE_LOSSES | TOKEN_LOSSES
    x = torch.tensor([[-0.9, -1.2, -1.0]], dtype=torch.float64)
    (exact,) = torch.autograd.grad(losses[name](x64 := x.clone().requires_grad_()).sum(), x64)
    (found,) = torch.autograd.grad(losses[name](x32 := x.float().requires_grad_()).sum(), x32)
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-6)


@given(st.lists(token_logps, min_size=1, max_size=4), st.data())
@quick
def test_row_losses_are_the_slow_ones(completions, data):
    refs = [
        data.draw(st.lists(st.floats(-8, 0), min_size=len(c), max_size=len(c))) for c in completions
    ]
    (logps, mask), (ref_logps, _) = rows(*completions), rows(*refs)
    found = {
        "score": losses.completion_scores(logps, mask, 0.7),
        "lm": losses.lm_loss(logps, mask),
        "unlikelihood": losses.unlikelihood_penalty(logps, mask),
        "k3": losses.kl_k3(logps, ref_logps, mask),
    }
    expected = {
        "score": [slow.score(c, 0.7) for c in completions],
        "lm": [slow.nll(c) for c in completions],
        "unlikelihood": [slow.unlikelihood(c, losses.UNLIKELIHOOD_EPSILON) for c in completions],
        "k3": [slow.k3(c, r) for c, r in zip(completions, refs, strict=True)],
    }
    for name, values in found.items():
        assert values.tolist() == pytest.approx(expected[name], rel=1e-8, abs=1e-8), name


@given(score, score, st.sampled_from([0.1, 1.0, 2.0]))
@quick
def test_npo_is_the_slow_one(s, ref, beta):
    penalty = losses.npo_penalty(tensor([s]), tensor([ref]), beta=beta)
    assert penalty.item() == pytest.approx(slow.npo(s, ref, beta), rel=1e-9)


ROW_LOSSES = {
    "score": lambda x, mask: losses.completion_scores(x, mask, 0.5),
    "lm": losses.lm_loss,
    "unlikelihood": losses.unlikelihood_penalty,
    "kl": lambda x, mask: losses.kl_k3(x, torch.where(mask, x.detach() - 0.5, NAN), mask),
}


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 5.0])
@pytest.mark.parametrize("name", ROW_LOSSES)
def test_masked_tokens_change_nothing(name, garbage):
    clean, mask = rows([-1.0, -2.0], [-0.5], [], pad=-3.0)
    dirty = torch.where(mask, clean, garbage)
    value, grad = gradient(lambda x: ROW_LOSSES[name](x, mask), clean)
    value2, grad2 = gradient(lambda x: ROW_LOSSES[name](x, mask), dirty)
    assert value2.equal(value)
    assert grad2.equal(grad)
    assert (grad2[~mask] == 0).all()
    assert value2[2] == 0


@pytest.mark.parametrize("name", ["unlikelihood", "kl"])
def test_row_gradients_are_those_of_finite_differences(name):
    logps, mask = rows([-1.0, -2.0, -0.1], [-0.5], [], pad=-3.0)
    ref = tensor(logps.tolist()) + torch.linspace(
        -1, 1, logps.numel(), dtype=torch.float64
    ).view_as(logps)
    fn = (
        losses.unlikelihood_penalty
        if name == "unlikelihood"
        else lambda x, m: losses.kl_k3(x, ref, m)
    )
    assert torch.autograd.gradcheck(lambda x: fn(x, mask), logps.requires_grad_())


def test_kl_k3_goes_on_along_its_tangent():
    """With L the limit, slope e^L − 1: at d = L + 2 the value is e^L − L − 1 + 2(e^L − 1), the
    gradient in log π is −(e^L − 1).
    """
    limit = losses.K3_LIMIT
    ref, mask = tensor([[0.0], [0.0]]), torch.ones(2, 1, dtype=torch.bool)
    value, grad = gradient(
        lambda x: losses.kl_k3(x, ref, mask), tensor([[-limit - 2], [-limit + 1]])
    )
    slope = math.exp(limit) - 1
    assert value.tolist() == pytest.approx(
        [slope - limit + 2 * slope, math.exp(limit - 1) - limit], rel=1e-12
    )
    assert grad[:, 0].tolist() == pytest.approx([-slope, 1 - math.exp(limit - 1)], rel=1e-12)


def test_npo_gradient_is_that_of_finite_differences():
    inputs = tensor([-1.0, -3.0]).requires_grad_(), tensor([-2.0, -0.5]).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, r: losses.npo_penalty(s, r, beta=0.7), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    st.lists(
        st.one_of(st.floats(-30, 0), st.just(0.0), st.just(-1e-9), st.just(-1e4)),
        min_size=1,
        max_size=5,
    )
)
@example([1e-3])  # a rounding of the log-softmax, above 0
@quick
def test_penalties_are_bounded_below_and_finite(dtype, values):
    logps = torch.tensor([values], dtype=dtype)
    mask = torch.ones_like(logps, dtype=torch.bool)
    found = {
        "unlikelihood": gradient(lambda x: losses.unlikelihood_penalty(x, mask), logps),
        "npo": gradient(lambda x: losses.npo_penalty(x[0], x[0].detach().flip(0), beta=0.1), logps),
        "kl": gradient(lambda x: losses.kl_k3(x, x.detach().flip(1), mask), logps),
    }
    for name, (value, grad) in found.items():
        assert (value >= 0).all(), name
        assert value.isfinite().all(), name
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("p", [0.01, 0.5, 0.999, 1.0])
def test_penalties_push_a_negative_completion_down(p):
    """Also a token that the policy is sure of, which a clamped 1 − p would leave alone."""
    logps, mask = torch.tensor([[math.log(p), math.log(p)]]), torch.tensor([[True, True]])
    _, grad = gradient(lambda x: losses.unlikelihood_penalty(x, mask), logps)
    assert (grad > 0).all()
    _, grad = gradient(
        lambda x: losses.npo_penalty(
            losses.completion_scores(x, mask, 1.0), torch.tensor([-2.0]), beta=0.1
        ),
        logps,
    )
    assert (grad > 0).all()


def test_lm_pushes_its_target_up_and_kl_pulls_towards_the_reference():
    logps, mask = tensor([[-1.0, -1.0]]), torch.tensor([[True, True]])
    assert (gradient(lambda x: losses.lm_loss(x, mask), logps)[1] < 0).all()
    grad = gradient(lambda x: losses.kl_k3(x, tensor([[-0.5, -2.0]]), mask), logps)[1]
    assert grad[0, 0] < 0 < grad[0, 1]


def test_penalised_by_hand():
    """2, 2, 0, 0: the median is 1, both zeros are below it. 3, 1, 0: the median 1 is not below
    itself. Ties at the median: none.
    """

    def chosen(rewards, negative):
        keys = tensor([[NAN if r is None else r for r in rewards]])
        return (
            pair_masks.penalised(keys, ~keys.isnan(), torch.tensor([negative]))
            .nonzero()[:, 1]
            .tolist()
        )

    assert chosen([2.0, 2.0, 0.0, 0.0], [False, False, True, True]) == [2, 3]
    assert chosen([3.0, 1.0, 0.0], [False, True, True]) == [2]
    assert chosen([1.0, 0.0, 0.0], [False, True, True]) == []
    assert chosen([2.0, 2.0, 0.0, 0.0], [False, False, False, True]) == [
        3
    ]  # of negative origin only
    assert chosen([2.0, None, 0.0, None], [False, True, True, True]) == [2]
    assert chosen([0.0], [True]) == []
    assert chosen([None], [True]) == []


# ---- the sum and the diagnostics -----------------------------------------------------------------


def test_total_loss_by_hand():
    """1 + 2·3 + ½·4 + 0.1·10 + 3·2 = 16; a term of weight 0 may be infinite without a trace."""

    def total(terms, lm_weight, negative_weight, kl_weight, distil_weight):
        return losses.total_loss(
            terms,
            lm_weight=lm_weight,
            negative_weight=negative_weight,
            kl_weight=kl_weight,
            distil_weight=distil_weight,
        ).item()

    terms = losses.LossTerms(
        ranking=tensor(1.0),
        lm=tensor(3.0),
        negative=tensor(4.0),
        kl=tensor(10.0),
        distil=tensor(2.0),
    )
    assert total(terms, 2.0, 0.5, 0.1, 3.0) == 16.0
    broken = losses.LossTerms(
        ranking=tensor(1.0),
        lm=tensor(3.0),
        negative=tensor(INF),
        kl=tensor(NAN),
        distil=tensor(NAN),
    )
    assert total(broken, 1.0, 0.0, 0.0, 0.0) == 4.0
    assert total(broken, 1.0, 1.0, 0.0, 0.0) == INF


def test_active_pairs_by_hand():
    """Gaps 1, 3, 2 of the pairs (0,1), (0,2), (1,2). Hinge, m = 2: below 2 only (0,1); at 2 it is
    0, so not active. Logistic, β = 1: σ(−1) = 0.27, σ(−2) = 0.12, σ(−3) = 0.05; γ = 1 adds one:
    σ(−2) for gap 3. Others ignore γ.
    """
    scores, pairs = tensor([[-1.0, -2.0, -4.0]]), ordered(2.0, 1.0, 0.0)

    def active(name, gamma=0.0):
        found = pair_masks.active_pairs(
            scores, pairs, ranking_loss=name, margin=2.0, beta=1.0, gamma=gamma
        )
        return [(i, j) for _, i, j in found.nonzero().tolist()]

    assert active("hinge") == [(0, 1)]
    assert active("logistic") == [(0, 1), (1, 2)]
    assert active("logistic", gamma=1.0) == [(0, 1), (0, 2), (1, 2)]
    assert active("listwise", gamma=1.0) == active("dpo", gamma=1.0) == [(0, 1), (1, 2)]
    # z₀ = 0: 4σ(1 − σ) is 0.79 at −1 and 0.07 at −4, and the middle one has no label.
    assert active("kto") == [(0, 1), (0, 2)]
    assert active("none") == []
    with pytest.raises(ValueError, match="ranking_loss is 'pairwise'"):
        active("pairwise")


@given(drawn=group)
@quick
def test_active_hinge_pairs_are_those_with_a_gradient(drawn):
    rewards, scores, _, _ = unpack(drawn)
    pairs = ordered(*rewards)
    active = pair_masks.active_pairs(
        scores, pairs, ranking_loss="hinge", margin=MARGIN, beta=1.0, gamma=0.0
    )
    assert not (active & ~pairs).any()
    _, grad = gradient(lambda s: ranking("hinge", s, pairs, "sum"), scores)
    won, lost = active.sum(2).double(), active.sum(1).double()
    torch.testing.assert_close(grad, lost - won)


def test_unpaired_garbage_is_neither_active_nor_counted():
    scores, pairs = tensor([[-1.0, NAN, -2.0]]), ordered(1.0, None, 0.0)
    for name in RANKING:
        active = pair_masks.active_pairs(
            scores, pairs, ranking_loss=name, margin=2.0, beta=1.0, gamma=0.0
        )
        assert active.nonzero().tolist() == [[0, 0, 2]]
    assert [x.item() for x in pair_masks.ranking_accuracy(scores, pairs)] == [1.0, 1]


def test_ranking_accuracy_by_hand():
    """Rewards 2 > 1 > 0, scores −1, −2, −1: (0,1) right, (0,2) tied, (1,2) wrong: 1.5 of 3. No
    pair: 0 of 0.
    """
    scores = tensor([[-1.0, -2.0, -1.0]]).requires_grad_()
    correct, count = pair_masks.ranking_accuracy(scores, ordered(2.0, 1.0, 0.0))
    assert (correct.item(), count.item()) == (1.5, 3)
    assert not correct.requires_grad
    assert [x.item() for x in pair_masks.ranking_accuracy(scores, ordered(1.0, 1.0, 1.0))] == [
        0.0,
        0,
    ]


@given(drawn=group)
@quick
def test_ranking_accuracy_is_the_slow_one(drawn):
    rewards, scores, _, _ = unpack(drawn)
    correct, count = pair_masks.ranking_accuracy(scores, ordered(*rewards))
    assert (correct.item(), count.item()) == slow.accuracy(
        scores[0].tolist(), slow.pairs(rewards, 0.0)
    )


# ---- the module as a whole -----------------------------------------------------------------------


def test_nothing_waits_for_the_device():
    """The meta device has shapes and no values: a function that reads one, or makes a tensor
    elsewhere, raises here.
    """
    scores, logps = torch.empty(2, 3, device="meta"), torch.empty(6, 5, device="meta")
    yes, mask = (
        torch.empty(2, 3, dtype=torch.bool, device="meta"),
        torch.empty(6, 5, dtype=torch.bool, device="meta"),
    )
    pairs = pair_masks.preferred_pairs(scores, yes, 0.0)
    found = [
        ranking(name, scores, pairs, reduction) for name in RANKING for reduction in REDUCTIONS
    ]
    assert all(loss.shape == (2,) and loss.device.type == "meta" for loss in found)
    found = [
        losses.completion_scores(logps, mask, 1.0),
        losses.lm_loss(logps, mask),
        losses.kl_k3(logps, logps, mask),
    ]
    found += [
        losses.unlikelihood_penalty(logps, mask),
        losses.npo_penalty(found[0], found[0], beta=0.1),
    ]
    assert all(loss.shape == (6,) and loss.device.type == "meta" for loss in found)
    assert pair_masks.best_against_worst(scores, yes, 0.0).shape == (2, 3, 3)
    assert pair_masks.penalised(scores, yes, yes).shape == (2, 3)
    assert pair_masks.active_pairs(
        scores, pairs, ranking_loss="hinge", margin=0.0, beta=1.0, gamma=0.0
    ).shape == (2, 3, 3)
    assert all(x.shape == () for x in pair_masks.ranking_accuracy(scores, pairs))


def test_shapes_and_names_are_checked_in_tests():
    scores, pairs = tensor([[-1.0, -2.0]]), ordered(2.0, 1.0, 0.0)
    with pytest.raises(TypeError):
        losses.hinge_loss(scores, pairs, margin=0.0, reduction="sum")
    with pytest.raises(TypeError):
        losses.hinge_loss(scores, ordered(1.0, 0.0), margin=0.0, reduction="median")
    assert (
        losses.hinge_loss(scores, ordered(1.0, 0.0), margin=0, reduction="sum").item() == 0
    )  # an int is a number
