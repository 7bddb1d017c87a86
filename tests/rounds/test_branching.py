"""Answers that branch: a plain answer kept up to its highest contrast, continued under + and −."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import small_rounds
from crashes import Crash, crash_at_rename
from neat_align.errors import CollapseError
from neat_align.prompts.row_prompts import instructed_ids, row_prompt_ids
from neat_align.prompts.seeds import completion_seed
from neat_align.rounds.branching import answer_to_branch, branch
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.params import RoundParams, RoundTools
from neat_align.rounds.rollout_store import RolloutStore
from neat_align.sampling.protocol import Sample, Sampler, SampleRequest
from small_rounds import BANK, EOS, TOKENIZER, Seeded, files_of, letters, rows

(PAIR,) = BANK.pairs
PARAMS = replace(small_rounds.PARAMS, num_plain=2, contrast_from="branch")
run = partial(small_rounds.run, p=PARAMS, data=rows(9))


def positive_prompt(prompt: Sequence[int]) -> bool:
    return "kind" in TOKENIZER.decode(prompt)


def logprobs(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[tuple[float, ...]]:
    """Under the positive instruction a token t has -(t % 7)/8 nats, otherwise -(t % 5)/8."""
    return [
        tuple(-(t % (7 if positive_prompt(prompt) else 5)) / 8 for t in ids)
        for prompt, ids in zip(prompts, completions, strict=True)
    ]


def slow_branch_point(answer: Sequence[int]) -> int:
    """The definition, read aloud."""
    best, at = -1.0, 0
    for t, token in enumerate(answer):
        contrast = abs((token % 7) - (token % 5)) / 8
        if contrast > best:
            best, at = contrast, t
    return at


def tools(sampler: Sampler | None = None, **more: Any) -> RoundTools:
    return small_rounds.tools(sampler or Seeded(), **{"policy_logprobs": logprobs, **more})


def sampled(folder: Path, t: RoundTools, p: RoundParams = PARAMS, count: int = 9) -> list[Any]:
    """The groups before anything is filtered."""
    from neat_align.rounds.sampling_stage import sample_groups

    return sample_groups(rows(count), 0, p, t, RolloutStore(folder), lambda _: None)


def of(group: CompletionGroup, origin: str) -> list[Completion]:
    return [c for c in group.completions if c.origin == origin]


# ---- the point -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positive", "negative", "kept"),
    [
        ([-1.0, -2.0, -1.0], [-1.5, -1.0, -1.0], 1),
        ([-1.0, -3.0, -1.0], [-1.0, -1.0, -4.0], 2),
        ([-3.0, -1.0], [-1.0, -3.0], 0),  # equal: the first
        ([-1.0, -1.0], [-1.0, -1.0], 0),
        ([-1.0, -1.0, -9.0], [-1.0, -1.0, -1.0], 2),  # the last, which may be the end of turn
        ([-5.0], [-1.0], 0),
        ([], [], 0),
    ],
)
def test_the_branch_point_by_hand(positive: list[float], negative: list[float], kept: int) -> None:
    answer = list(range(10, 10 + len(positive)))
    found = branch(answer, positive, negative)
    assert (found.kept, found.prefix) == (kept, tuple(answer[:kept]))
    assert found.logprob("positive") == pytest.approx(sum(positive[:kept]))
    assert found.logprob("negative") == pytest.approx(sum(negative[:kept]))


NATS = st.floats(-50, 0)


@given(st.lists(st.tuples(NATS, NATS), min_size=1, max_size=30))
def test_something_can_always_follow_and_no_earlier_token_has_as_much_contrast(
    pairs: list[tuple[float, float]],
) -> None:
    positive, negative = zip(*pairs, strict=True)
    kept = branch(range(len(pairs)), positive, negative).kept
    contrast = [abs(p - n) for p, n in pairs]
    assert kept < len(pairs)
    assert contrast[kept] == max(contrast)
    assert all(c < contrast[kept] for c in contrast[:kept])
    # The two instructions have no order: exchanged, they branch at the same token.
    assert branch(range(len(pairs)), negative, positive).kept == kept


def test_a_positive_and_a_negative_of_one_index_branch_from_one_answer() -> None:
    assert [answer_to_branch(k, 2) for k in range(5)] == [0, 1, 0, 1, 0]


# ---- a round -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_plain", "num_positive", "num_negative"),
    [(2, 1, 1), (1, 2, 2), (2, 3, 1), (3, 0, 2), (1, 1, 0)],
)
def test_branches_are_a_plain_answer_up_to_its_point_and_then_their_own(
    tmp_path: Path, num_plain: int, num_positive: int, num_negative: int
) -> None:
    sampler = Seeded()
    p = replace(PARAMS, num_plain=num_plain, num_positive=num_positive, num_negative=num_negative)
    groups = sampled(tmp_path, tools(sampler), p)
    asked = {r.seed: r for r in sampler.requests}
    assert len(asked) == len(sampler.requests) == 9 * p.sampled_for(1)
    for row, group in zip(rows(9), groups, strict=True):
        plain = of(group, "plain")
        assert [c.branch_at for c in plain] == [None] * num_plain
        for polarity, count in (("positive", num_positive), ("negative", num_negative)):
            instruction = getattr(PAIR, polarity)
            prompt = tuple(instructed_ids(TOKENIZER, row, instruction, "user_suffix"))
            assert len(of(group, polarity)) == count
            for k, c in enumerate(of(group, polarity)):
                begun = plain[k % num_plain].token_ids
                kept = slow_branch_point(begun)
                assert (c.index, c.branch_at, c.instruction) == (k, kept, instruction)
                assert c.token_ids[:kept] == begun[:kept]
                assert c.seed == completion_seed(3, 0, row.id, polarity, k)
                request = asked[c.seed]
                assert request.prompt_ids == prompt + begun[:kept]
                assert request.max_new_tokens == 8 - kept
                drawn = sampler.answer(request, 8 - kept)
                assert c.token_ids[kept:] == drawn.token_ids
                assert len(c.token_ids) <= 8
                assert (EOS in c.token_ids) == (c.finish_reason == "stop")
                assert EOS not in c.token_ids[:-1]
                assert c.text == TOKENIZER.decode(c.token_ids, skip_special_tokens=True).strip()
                (own,) = logprobs([prompt], [begun[:kept]])
                assert c.sampling_logprob == pytest.approx(sum(own) + drawn.logprob)


def test_plain_answers_are_those_of_a_round_without_branches(tmp_path: Path) -> None:
    branched = sampled(tmp_path / "branched", tools())
    whole = sampled(tmp_path / "whole", tools(), replace(PARAMS, contrast_from="prompt"))
    assert [of(g, "plain") for g in branched] == [of(g, "plain") for g in whole]
    assert [[c.seed for c in g.completions] for g in branched] == [
        [c.seed for c in g.completions] for g in whole
    ]
    assert {c.branch_at for g in whole for c in g.completions} == {None}


def test_only_answers_from_which_something_branches_are_scored(tmp_path: Path) -> None:
    scored: list[Sequence[int]] = []

    def counted(prompts: Any, completions: Any) -> list[tuple[float, ...]]:
        scored.extend(completions)
        return logprobs(prompts, completions)

    groups = sampled(tmp_path, tools(policy_logprobs=counted), replace(PARAMS, num_plain=4))
    first = [of(g, "plain")[0].token_ids for g in groups]
    assert sorted(scored) == sorted([*first, *first])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_batch_size_changes_nothing(tmp_path: Path, batch_size: int) -> None:
    expected = run(tmp_path / "a", tools())
    assert run(tmp_path / "b", tools(batch_size=batch_size)) == expected
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_negatives_of_another_policy_continue_the_current_ones_answers(tmp_path: Path) -> None:
    current, start = Seeded(), Seeded()
    groups = sampled(tmp_path, tools(current, negative_sampler=start))
    assert groups == sampled(tmp_path / "one", tools())
    assert len(start.requests) == 9
    assert {r.seed for r in start.requests} == {of(g, "negative")[0].seed for g in groups}
    assert len(current.requests) == 27


def test_how_far_answers_are_kept_is_among_the_metrics(tmp_path: Path) -> None:
    made = run(tmp_path / "branched", tools())
    branched = [c for g in made.groups for c in g.completions if c.branch_at is not None]
    assert made.metrics["round/groups"] == made.metrics["round/prompts"]  # nothing else counts
    kept = sum(c.branch_at or 0 for c in branched)
    assert kept > 0
    assert made.metrics["sampling/branch_position"] == pytest.approx(kept / len(branched))
    tokens = sum(len(c.token_ids) for c in branched)
    assert made.metrics["sampling/branch_shared"] == pytest.approx(kept / tokens)
    whole = run(tmp_path / "whole", tools(), p=replace(PARAMS, contrast_from="prompt"))
    assert not [name for name in whole.metrics if "branch" in name]


# ---- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_a_kill_beside_any_rename_costs_one_batch_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, before: bool
) -> None:
    scored: list[int] = []

    def counted(prompts: Any, completions: Any) -> list[tuple[float, ...]]:
        if any(positive_prompt(prompt) for prompt in prompts):
            scored.append(len(completions))
        return logprobs(prompts, completions)

    run(tmp_path / "whole", tools(policy_logprobs=counted), data=rows(5))
    expected, batches, point = files_of(tmp_path / "whole"), list(scored), 0
    assert batches == [5]
    while True:
        point += 1
        folder, sampler = tmp_path / str(point), Seeded()
        scored.clear()

        with monkeypatch.context() as patch:
            crash_at_rename(patch, point, before=before)
            try:
                run(folder, tools(sampler, policy_logprobs=counted), data=rows(5))
            except Crash:
                pass
            else:
                break
        run(folder, tools(sampler, policy_logprobs=counted), data=rows(5))
        assert files_of(folder) == expected
        assert sum(scored) - sum(batches) in (0, *batches)
        assert 0 <= len(sampler.requests) - 20 <= 6
        assert (len(sampler.requests) - 20) * (sum(scored) - sum(batches)) == 0
    assert point > 8  # four batches of samples, one of branches, those of scores


def test_samples_and_branches_of_other_plain_answers_are_not_used(tmp_path: Path) -> None:
    """A damaged batch of plain answers that, drawn again, says something else."""

    class Other(Seeded):
        def answer(self, request: SampleRequest, limit: int) -> Sample:
            flipped = SampleRequest(request.prompt_ids, request.seed ^ 0b11111, limit)
            return super().answer(flipped, limit)

    sampled(tmp_path, tools())
    of_plain = [
        path
        for path in sorted(tmp_path.glob("samples-*.parquet"))
        if all(n % 4 in (1, 2) for n in pq.read_table(path)["request"].to_pylist())
    ]
    assert len(of_plain) == 3
    for path in of_plain:
        path.write_bytes(b"damaged")
    for g in sampled(tmp_path, tools(Other())):
        plain = of(g, "plain")[0]
        kept = slow_branch_point(plain.token_ids)
        for c in (*of(g, "positive"), *of(g, "negative")):
            assert c.branch_at == kept
            assert c.token_ids[:kept] == plain.token_ids[:kept]
            assert len(c.token_ids) > kept


def test_a_round_in_work_is_not_mixed_with_one_that_branches(tmp_path: Path) -> None:
    def away(**_: Any) -> list[float]:
        raise ConnectionError("away")

    whole = run(tmp_path / "whole", tools())
    with pytest.raises(Exception, match="away"):
        run(tmp_path / "cut", tools(reward=away), p=replace(PARAMS, contrast_from="prompt"))
    assert run(tmp_path / "cut", tools()) == whole


def test_rounds_without_branches_are_decided_by_what_always_decided_them() -> None:
    """Else a round of an earlier version that was interrupted would be sampled again."""
    whole = replace(PARAMS, contrast_from="prompt").deciding()
    assert "contrast_from" not in whole
    assert PARAMS.deciding() == {**whole, "contrast_from": "branch"}
    assert whole["sampling"]["max_new_tokens"] == 8


# ---- what cannot work ----------------------------------------------------------------------------


def test_a_contrast_that_is_no_number_stops_the_round(tmp_path: Path) -> None:
    def broken(prompts: Any, completions: Any) -> list[tuple[float, ...]]:
        return [tuple(math.nan for _ in ids) for ids in completions]

    with pytest.raises(
        CollapseError, match="log-probability under the positive instruction of 5 completions"
    ):
        run(tmp_path, tools(policy_logprobs=broken))


def test_branches_need_somebody_who_scores(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="answers that branch need policy_logprobs"):
        run(tmp_path, tools(policy_logprobs=None))


def test_a_sampler_that_goes_over_a_requests_own_limit_is_refused(tmp_path: Path) -> None:
    class Endless(Seeded):
        def answer(self, request: SampleRequest, limit: int) -> Sample:
            return Sample(letters(request.seed, 8), "length", -8.0)

    with pytest.raises(ValueError, match=r"drew 8 tokens for a request whose max_new_tokens is \d"):
        run(tmp_path, tools(Endless()))


def test_a_continuation_that_says_what_the_plain_answer_said_is_a_repeat(tmp_path: Path) -> None:
    class Echo(Seeded):
        """Continues as the plain answer went on, whoever asks."""

        def answer(self, request: SampleRequest, limit: int) -> Sample:
            answer = letters(12345678901, 8)
            return Sample(answer[8 - limit :], "length", -1.0)

    made_of = {c.text for g in sampled(tmp_path, tools(Echo())) for c in g.completions}
    assert len(made_of) == 1
    with pytest.raises(CollapseError, match="0 of 9 prompts"):
        run(tmp_path, tools(Echo()))


def test_plain_prompts_are_what_groups_are_trained_on(tmp_path: Path) -> None:
    for row, group in zip(rows(9), sampled(tmp_path, tools()), strict=True):
        assert group.prompt_ids == tuple(row_prompt_ids(TOKENIZER, row))
