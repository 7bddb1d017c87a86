"""Samples that a sampler hands over before its call has ended: stored as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import small_rounds
from crashes import Crash, crash_at_rename
from neat_align.errors import CollapseError, SamplerUnavailableError
from neat_align.rounds.kept_samples import STORED_AT
from neat_align.rounds.params import RoundTools
from neat_align.rounds.rollout_store import RolloutStore
from neat_align.rounds.sampling_stage import BATCHES_A_CALL
from neat_align.sampling.protocol import Finished, Sample, SampleRequest, SamplingParams
from small_rounds import Seeded, files_of, rows

BATCH = 8
run = partial(small_rounds.run, p=small_rounds.PARAMS, data=rows(30))


class Refilling(Seeded):
    """Hands over a few answers at a time, the shortest ones of a call first.

    `at` is called with how many of all calls have been handed over.
    """

    def __init__(self, few: int = 3, at: Callable[[int], None] = lambda _: None) -> None:
        super().__init__()
        self.few, self.at, self.handed, self.calls = few, at, 0, list[int]()

    @property
    def hands_over(self) -> bool:
        return self.few > 0

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
        finished: Finished | None = None,
    ) -> list[Sample]:
        self.calls.append(len(requests))
        drawn = super().sample(requests, params)
        order = sorted(range(len(drawn)), key=lambda i: len(drawn[i].token_ids))
        for start in range(0, len(order), self.few or len(order)):
            part = order[start : start + (self.few or len(order))]
            if finished is not None:
                finished(part, [drawn[i] for i in part])
            if progress is not None:
                progress(len(part))
            self.handed += len(part)
            self.at(self.handed)
        return drawn


def tools(sampler: Refilling | Seeded, **more: object) -> RoundTools:
    return small_rounds.tools(sampler, **{"batch_size": BATCH, **more})


def test_the_round_is_the_one_that_is_sampled_batch_by_batch(tmp_path: Path) -> None:
    plain, refilling = Seeded(), Refilling()
    expected = run(tmp_path / "plain", tools(plain))
    assert run(tmp_path / "refilling", tools(refilling)) == expected
    assert files_of(tmp_path / "refilling") == files_of(tmp_path / "plain")
    assert sum(refilling.calls) == len(plain.requests) == 90
    assert refilling.calls == [45, 45]  # of at most 64
    assert max(refilling.calls) <= BATCH * BATCHES_A_CALL


def test_one_that_does_not_do_so_now_is_asked_for_a_batch_at_a_time(tmp_path: Path) -> None:
    wrapper = Refilling(few=0)
    run(tmp_path, tools(wrapper))
    assert max(wrapper.calls) <= BATCH


def test_a_kill_beside_any_rename_costs_a_batch_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of completions that had ended. What was being drawn is lost, too."""
    few = partial(small_rounds.run, p=small_rounds.PARAMS, data=rows(9))
    few(tmp_path / "whole", tools(Refilling()))
    expected, point = files_of(tmp_path / "whole"), 0
    while True:
        point += 3
        folder, first = tmp_path / str(point), Refilling()
        with monkeypatch.context() as patch:
            crash_at_rename(patch, point, before=point % 2 == 0)
            try:
                few(folder, tools(first))
            except Crash:
                pass
            else:
                break
        again = Refilling()
        few(folder, tools(again))
        assert files_of(folder) == expected
        handed_twice = first.handed + again.handed - 27
        assert -3 <= handed_twice <= STORED_AT * BATCH + 3
    assert point > 15


def test_a_signal_between_two_calls_is_not_waited_for(tmp_path: Path) -> None:
    """It ends the call once the next part is stored, and costs none that was handed over."""

    class Stop(Exception):
        pass

    asked_to_stop = False

    def signal(handed: int) -> None:
        nonlocal asked_to_stop
        asked_to_stop |= handed >= 18

    def between() -> None:
        if asked_to_stop:
            raise Stop

    sampler = Refilling(at=signal)
    with pytest.raises(Stop):
        run(tmp_path, tools(sampler, between_batches=between))
    assert sampler.calls == [45]
    assert sampler.handed == 18  # and three more were just being handed over, and are stored
    stored = RolloutStore(tmp_path / "work" / "000000").read_samples(set(range(90)))
    assert len(stored) == 21
    again = Refilling()
    run(tmp_path, tools(again))
    assert sum(again.calls) == 90 - 21


def test_a_server_that_dies_costs_nothing_that_it_had_given(tmp_path: Path) -> None:
    def dies(handed: int) -> None:
        if handed == 12:
            raise SamplerUnavailableError("the server is down")

    with pytest.raises(SamplerUnavailableError, match="the server is down"):
        run(tmp_path, tools(Refilling(few=1, at=dies), batch_size=20))
    stored = RolloutStore(tmp_path / "work" / "000000").read_samples(set(range(90)))
    assert len(stored) == 12  # of which ten when they were half of a batch


def test_what_is_no_number_is_not_stored_and_names_its_prompts(tmp_path: Path) -> None:
    class Broken(Refilling):
        def answer(self, request: SampleRequest, limit: int) -> Sample:
            sample = super().answer(request, limit)
            last = request.seed == self.requests[20].seed
            return replace(sample, logprob=float("-inf")) if last else sample

    with pytest.raises(CollapseError, match=r"log-probability.*id-\d+"):
        run(tmp_path, tools(Broken()))
    stored = RolloutStore(tmp_path / "work" / "000000").read_samples(set(range(90)))
    assert len(stored) > 30
    assert all(s.logprob > -100 for s in stored.values())
