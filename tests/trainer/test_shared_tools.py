"""Shares of a round's calls: whole prompts, even costs, and the same result as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from neat_align.errors import RunInterrupted, SamplerError
from neat_align.prompts.rows import PromptRow
from neat_align.rewards.protocol import LeftOut, NamedReward, ScoredRows, Unscorable
from neat_align.rewards.scoring import score_answers
from neat_align.runs.ranks import Ranks
from neat_align.runs.shared_calls import Share, SharedCalls
from neat_align.runs.signals import StopRequest
from neat_align.sampling.protocol import Finished, Sample, SampleRequest, SamplingParams
from neat_align.trainer.shared_tools import (
    SharedSampler,
    _until_stopped,
    deal,
    in_order,
    merged_scores,
)

ITEMS = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 50)), max_size=40)


@given(ITEMS, st.integers(1, 6))
def test_every_item_is_dealt_once_and_equal_keys_stay_together(
    items: list[tuple[str, int]], ranks: int
) -> None:
    keys, costs = [k for k, _ in items], [c for _, c in items]
    shares = deal(keys, costs, ranks)
    assert len(shares) == ranks
    assert sorted(i for share in shares for i in share) == list(range(len(items)))
    assert all(share == sorted(share) for share in shares)
    owners = {key: {r for r, share in enumerate(shares) for i in share if keys[i] == key}
              for key in keys}  # fmt: skip
    assert all(len(ranks_of) == 1 for ranks_of in owners.values())
    # No rank has more than the least loaded one by more than its dearest prompt.
    loads = [sum(costs[i] for i in share) for share in shares]
    dearest = max((sum(c for k, c in items if k == key) for key in set(keys)), default=0)
    assert max(loads) - min(loads) <= dearest
    assert in_order(shares, [[items[i] for i in share] for share in shares]) == items


def test_ranks_without_a_prompt_have_empty_shares() -> None:
    assert deal(["a", "a", "a"], [1, 1, 1], 3) == [[0, 1, 2], [], []]
    assert in_order([[0, 1, 2], [], []], [["x", "y", "z"], None, None]) == ["x", "y", "z"]


def rows(ids: str) -> list[PromptRow]:
    return [PromptRow(i, f"Say {i}", None, None, {}, f"row {i}") for i in ids]


def measure(
    prompts: Sequence[str],
    completions: Sequence[str],
    log_metric: Any = None,
    log_extra: Any = None,
    log_total: Any = None,
    **_: Any,
) -> list[Any]:
    log_metric("letters", sum(map(len, completions)))
    log_total("tokens", sum(map(len, completions)))
    if any("b" in prompt for prompt in prompts):
        log_extra("seen", [c.upper() for c in completions])
    return [Unscorable("is a q") if c == "q" else None if not c else float(len(c))
            for c in completions]  # fmt: skip


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "q", "xx", "yyy"]))),
    st.integers(1, 4),
)
def test_scores_in_shares_are_those_of_one_call(answers: list[tuple[str, str]], ranks: int) -> None:
    given_rows = rows("".join(name for name, _ in answers))
    texts = [text for _, text in answers]
    ids = [[1] * len(text) for text in texts]
    rewards = (NamedReward("measure", measure, 2.0),)
    whole = score_answers(given_rows, texts, ids, rewards, "skip")
    shares = deal([row.id for row in given_rows], [1 + len(i) for i in ids], ranks)
    found: list[ScoredRows | None] = [
        score_answers(
            [given_rows[i] for i in share],
            [texts[i] for i in share],
            [ids[i] for i in share],
            rewards,
            "skip",
        )
        if share
        else None
        for share in shares
    ]
    merged = merged_scores(shares, found)
    assert merged.rewards == whole.rewards
    assert merged.components == whole.components
    assert merged.left_out == whole.left_out
    assert sum(merged.metrics.get("letters", ())) == sum(whole.metrics.get("letters", ()))
    assert merged.totals == whole.totals
    for place, value in enumerate(merged.extra.get("seen", ())):
        # A call that had no b logged no column.
        assert value in (None, texts[place].upper())


def test_rows_that_cannot_be_scored_keep_their_places() -> None:
    left = LeftOut(row=1, reward="r", reason="is long")
    a = ScoredRows((1.0, None), ((1.0,), (None,)), (left,), {"m": (1.0,)}, {})
    b = ScoredRows((3.0,), ((3.0,),), (), {"m": (5.0,)}, {"x": ("c",)})
    merged = merged_scores([[0, 2], [1]], [a, b])
    assert merged.rewards == (1.0, 3.0, None)
    assert merged.left_out == (LeftOut(row=2, reward="r", reason="is long"),)
    assert merged.metrics == {"m": (1.0, 5.0)}
    assert merged.extra == {"x": (None, "c", None)}


# ---- places that are filled again on every rank --------------------------------------------------

PARAMS = SamplingParams(9)
REQUESTS = [SampleRequest((i % 7, 1), seed=i) for i in range(40)]


def sample_of(request: SampleRequest) -> Sample:
    """Decided by the request alone, as a sampler's are."""
    length = 1 + (request.seed * 5) % 9
    return Sample((request.seed,) * length, "stop", -float(request.seed))


class Refilling:
    """Hands over two completions at a time, the shortest first; `at` hears how many it has."""

    def __init__(self, at: Callable[[int], None] = lambda _: None, *, hands_over: bool = True):
        self.at, self.hands_over, self.calls = at, hands_over, list[int]()

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
        finished: Finished | None = None,
    ) -> list[Sample]:
        self.calls.append(len(requests))
        drawn = [sample_of(r) for r in requests]
        order = sorted(range(len(drawn)), key=lambda i: len(drawn[i].token_ids))
        for start in range(0, len(order), 2):
            part = order[start : start + 2]
            self.at(start)
            if finished is not None:
                finished(part, [drawn[i] for i in part])
            if progress is not None:
                progress(len(part))
        return drawn


class RanksInTurn(SharedCalls):
    """The calls of ranks whose shares are done in turn, in this process; `ask` is the real one."""

    def __init__(self, folder: Path, samplers: Sequence[Refilling]) -> None:
        accelerator = Accelerator(cpu=True)
        self.others = [
            SharedCalls(ranks, {"sample": _until_stopped(sampler, ranks)})
            for sampler in samplers[1:]
            for ranks in [Ranks(accelerator, StopRequest(), timeout=9, folder=folder)]
        ]
        ranks = Ranks(accelerator, StopRequest(), timeout=9, folder=folder)
        super().__init__(ranks, {})
        ranks.count = len(samplers)
        ranks.scatter = self.hand_out  # type: ignore[method-assign, assignment]
        ranks.gather = self.collect  # type: ignore[method-assign, assignment]

    def hand_out(self, requests: Sequence[Any]) -> None:
        self.requests = requests

    def collect(self, own: Any) -> list[Any]:
        asked = zip(self.others, self.requests[1:], strict=True)
        return [own, *(self.done(other, request.share) for other, request in asked)]

    @staticmethod
    def done(other: SharedCalls, share: Share) -> Any:
        return other._done(other.functions["sample"], share)[0]


def drawn_by(
    folder: Path, samplers: Sequence[Refilling], handed: dict[int, Sample] | None
) -> list[Sample]:
    """What all of them draw; `handed` is given what is handed over, by place."""
    calls, counted = RanksInTurn(folder, samplers), list[int]()
    shared = SharedSampler(calls, "sample", samplers[0])

    def finished(places: Sequence[int], samples: Sequence[Sample]) -> None:
        assert handed is not None
        assert not handed.keys() & set(places)
        handed.update(zip(places, samples, strict=True))

    told = None if handed is None else finished
    samples = shared.sample(REQUESTS, PARAMS, progress=counted.append, finished=told)
    assert sum(counted) == len(REQUESTS)
    return samples


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_shares_that_are_filled_again_give_the_same_completions(tmp_path: Path, ranks: int) -> None:
    """However many ranks there are, each of them is called once, and all is handed over once."""
    samplers = [Refilling() for _ in range(ranks)]
    handed: dict[int, Sample] = {}
    expected = [sample_of(r) for r in REQUESTS]
    assert drawn_by(tmp_path, samplers, handed) == expected
    assert [handed[i] for i in range(len(REQUESTS))] == expected
    assert sum(n for s in samplers for n in s.calls) == len(REQUESTS)
    assert all(len(s.calls) <= 1 for s in samplers)
    assert drawn_by(tmp_path, samplers, None) == expected


def test_ranks_that_hand_nothing_over_are_asked_for_a_batch_at_a_time(tmp_path: Path) -> None:
    samplers = [Refilling(hands_over=False) for _ in range(3)]
    assert drawn_by(tmp_path, samplers, None) == [sample_of(r) for r in REQUESTS]
    shared = SharedSampler(RanksInTurn(tmp_path, samplers), "sample", samplers[0])
    assert not shared.hands_over
    assert SharedSampler(RanksInTurn(tmp_path, samplers), "sample", Refilling()).hands_over


def test_a_rank_that_is_asked_to_stop_hands_over_what_it_has(tmp_path: Path) -> None:
    calls: list[RanksInTurn] = []

    def stop(start: int) -> None:
        if start == 4:
            calls[0].others[0].ranks.stop.signal_number = 15

    samplers = [Refilling(), Refilling(stop)]
    calls.append(RanksInTurn(tmp_path, samplers))
    handed: dict[int, Sample] = {}
    with pytest.raises(RunInterrupted, match="stopped by SIGTERM while completions were drawn"):
        SharedSampler(calls[0], "sample", samplers[0]).sample(
            REQUESTS, PARAMS, finished=lambda at, s: handed.update(zip(at, s, strict=True))
        )
    assert len(handed) == samplers[0].calls[0] + 6
    assert all(handed[i] == sample_of(REQUESTS[i]) for i in handed)


def test_a_stop_that_is_seen_while_answers_are_stored_costs_no_rank_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who stores looks for a stop after each rank's: the next rank's are stored all the same."""
    samplers = [Refilling(), Refilling(), Refilling()]
    calls = RanksInTurn(tmp_path, samplers)
    handed: dict[int, Sample] = {}

    def finished(places: Sequence[int], samples: Sequence[Sample]) -> None:
        handed.update(zip(places, samples, strict=True))
        calls.ranks.stop.signal_number = 15 if len(handed) > 6 else 0
        calls.ranks.raise_if_this_rank_must_stop("in a test")

    with pytest.raises(RunInterrupted, match="stopped by SIGTERM in a test"):
        SharedSampler(calls, "sample", samplers[0]).sample(REQUESTS, PARAMS, finished=finished)
    assert len(handed) == 8 + sum(n for s in samplers[1:] for n in s.calls)
    assert capsys.readouterr().err.count("stopped by SIGTERM") == 1


def test_an_error_on_one_rank_costs_the_others_nothing(tmp_path: Path) -> None:
    def fail(start: int) -> None:
        raise SamplerError("the server is gone")

    for failing in (0, 1):
        samplers = [Refilling(), Refilling(), Refilling()]
        samplers[failing].at = fail
        handed: dict[int, Sample] = {}
        with pytest.raises(SamplerError, match="the server is gone"):
            drawn_by(tmp_path, samplers, handed)
        others = sum(n for i, s in enumerate(samplers) for n in s.calls if i != failing)
        assert len(handed) == others > 0
