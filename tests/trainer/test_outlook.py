"""What is said of a run's time before it begins, and of threads that are in each other's way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neat_align.cli.progress import PrintPlan
from neat_align.runs.plan import RunPlan
from neat_align.trainer.outlook import Pace, measured_pace, seconds_at_most
from small_trainer import ROWS, config, trainer

PLAN = RunPlan(
    rows=100,
    rounds=2,
    prompts_per_round=10,
    completions_per_prompt=4,
    prompt_tokens=1000,
    max_completion_length=50,
    optimizer_steps=4,
)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        # Written: 80 completions of 50 in rounds, 20 in evaluations: 5,000. Read: prompts twice,
        # 2,000; three times what is learned from, 15,000; evaluations, 1,000.
        ({}, 5000 / 50 + 18_000 / 100),
        ({"activation_checkpointing": True}, 5000 / 50 + 23_000 / 100),
        ({"kl_weight": 1.0}, 5000 / 50 + 23_000 / 100),
        ({"num_eval_prompts": 1}, 4200 / 50 + 17_200 / 100),
    ],
)
def test_the_time_of_a_run_is_that_of_its_tokens(
    tmp_path: Path, changes: dict[str, Any], seconds: float
) -> None:
    args = config(tmp_path, num_eval_generations=2, evaluate_contrast=False, **changes)
    assert seconds_at_most(args, PLAN, Pace(100.0, 50.0, None), 5) == pytest.approx(seconds)


def test_where_another_engine_samples_only_reading_takes_time(tmp_path: Path) -> None:
    args = config(tmp_path, num_eval_generations=2, evaluate_contrast=False)
    assert seconds_at_most(args, PLAN, Pace(100.0, None, None), 5) == pytest.approx(180.0)


class Slow:
    """Policies that take longer on more threads, as on a machine whose cores others use."""

    def __init__(self, policies: Any, seconds_a_thread: float) -> None:
        self.model, self._seconds = policies.model, seconds_a_thread

    def logprobs(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Any]:
        time.sleep(self._seconds * torch.get_num_threads() ** 2)
        return []


def test_threads_that_are_in_each_others_way_are_found_and_left_as_they_were(
    tmp_path: Path,
) -> None:
    before = torch.get_num_threads()
    policies: Any = Slow(trainer(tmp_path).parts.policies, 0.03)
    torch.set_num_threads(2)
    try:
        pace = measured_pace(policies, at_once=1, sampler=None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert pace.one_thread is not None
    assert 2 < pace.one_thread < 6  # 4, and what the machine makes of it
    warning = pace.warning(2)
    assert warning is not None
    assert "times as fast here as 2" in warning
    assert "OMP_NUM_THREADS=1" in warning
    assert replace(pace, one_thread=1.2).warning(2) is None


class Disturbed:
    """Policies whose passes take what is noted; the last of it again and again."""

    def __init__(self, policies: Any, seconds: Sequence[float]) -> None:
        self.model, self._seconds, self.now, self.passes = policies.model, [*seconds], 0.0, 0

    def logprobs(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Any]:
        self.now += self._seconds[min(self.passes, len(self._seconds) - 1)]
        self.passes += 1
        return []


@pytest.mark.parametrize(
    ("seconds", "passes", "fastest"),
    [
        ([1.0, 1.05], 2, 1.0),  # they agree
        ([3.0, 1.0], 3, 1.0),  # the first one allocated
        ([1.0, 2.0, 0.5, 0.1], 3, 0.5),  # no more than three
    ],
)
def test_passes_are_timed_until_two_agree(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: list[float],
    passes: int,
    fastest: float,
) -> None:
    policies: Any = Disturbed(trainer(tmp_path).parts.policies, seconds)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("neat_align.trainer.outlook.time.perf_counter", lambda: policies.now)
    pace = measured_pace(policies, at_once=1, sampler=None)
    assert (policies.passes, pace.one_thread) == (passes, None)
    assert pace.reads == pytest.approx((64 + 4 * 48) / fastest)


@pytest.mark.parametrize(
    ("alone", "passes", "ratio"),
    [
        ([2.0], 3, 0.5),  # one thread is slower: all is well
        ([0.9, 0.5], 4, 2.0),  # faster: tried again, since a warning may come of it
        ([0.5, 0.9], 4, 2.0),
    ],
)
def test_one_thread_is_tried_again_only_where_it_is_faster(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alone: list[float],
    passes: int,
    ratio: float,
) -> None:
    policies: Any = Disturbed(trainer(tmp_path).parts.policies, [1.0, 1.0, *alone])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr("neat_align.trainer.outlook.time.perf_counter", lambda: policies.now)
    pace = measured_pace(policies, at_once=1, sampler=None)
    assert (policies.passes, pace.one_thread) == (passes, pytest.approx(ratio))


def test_a_run_says_memory_and_time_before_it_begins_and_only_where_somebody_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = trainer(tmp_path / "shown", callbacks=[PrintPlan()], eval_dataset=ROWS[:2])
    with shown.writing():
        shown.open_run(None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plan: 1 round of 8 prompts")
    assert any(line.startswith("memory: about 0.0 of ") for line in lines)
    (said,) = [line for line in lines if line.startswith("time: at most about ")]
    assert " seconds (reads " in said
    assert max(map(len, lines)) <= 80
    silent = trainer(tmp_path / "silent", eval_dataset=ROWS[:2])
    with silent.writing():
        silent.open_run(None)
    assert "time: " not in capsys.readouterr().out
