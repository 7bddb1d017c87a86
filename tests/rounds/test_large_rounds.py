"""A round that is made slice by slice: the round that is made at once, in the memory of a slice."""

from __future__ import annotations

import gc
import math
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import small_rounds
from crashes import Crash, crash_at_rename
from neat_align.errors import CollapseError, RewardError
from neat_align.rounds import group_file, metrics
from neat_align.rounds import make_round as module
from neat_align.rounds.completions import Completion, CompletionGroup
from neat_align.rounds.make_round import even_slices
from neat_align.rounds.metrics import DISTINCT_TEXTS, RoundMeasures
from neat_align.rounds.params import MEASURED_PROMPTS, RoundTools, measured_prompts
from neat_align.rounds.round_files import read_round
from neat_align.rounds.text_metrics import distinct_n
from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, SamplingParams
from small_rounds import files_of, rows, scores

PARAMS = replace(small_rounds.PARAMS, num_positive=2)
OTHERS = replace(PARAMS, negative_source="other_prompts", num_plain=0)
run = partial(small_rounds.run, p=PARAMS, data=rows(17))


class Seeded:
    """Answers that are a function of the request's seed.

    Counts what it was asked for; keeps no requests, because memory is measured.
    """

    def __init__(self, length: int = 5) -> None:
        self.seeds: list[int] = []
        self.length = length
        self.asked = 0

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        self.asked += len(requests)
        self.seeds += [r.seed for r in requests] if self.length < 10 else []
        if progress is not None:
            progress(len(requests))
        return [self._sample(r.seed) for r in requests]

    def _sample(self, seed: int) -> Sample:
        ids = tuple(10 + (seed >> (3 * k)) % 400 for k in range(self.length))
        return Sample(ids, "stop", -float(seed % 97))


def tools(sampler: Sampler | None = None, **more: Any) -> RoundTools:
    return small_rounds.tools(sampler or Seeded(), **more)


def logprobs(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[tuple[float, ...]]:
    return [tuple(-0.25 * (t % 5) for t in ids) for ids in completions]


# ---- slices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 4, 5, 16])
def test_slices_give_the_round_that_is_made_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    whole = run(tmp_path / "whole", tools(policy_logprobs=logprobs, ref_logprobs=logprobs))
    monkeypatch.setattr(module, "SLICE_PROMPTS", most)
    sampler = Seeded()
    t = tools(sampler, policy_logprobs=logprobs, ref_logprobs=logprobs)
    assert run(tmp_path / "sliced", t) == whole
    assert files_of(tmp_path / "sliced") == files_of(tmp_path / "whole")
    assert sampler.asked == len(set(sampler.seeds)) == 17 * 4


@given(st.integers(0, 3000), st.integers(4, 50))
@settings(deadline=None)
def test_slices_are_even_and_nobody_is_alone(count: int, most: int) -> None:
    items = list(range(count))
    slices = list(even_slices(items, most))
    assert [i for _, part in slices for i in part] == items
    assert [start for start, _ in slices] == [part[0] for _, part in slices]
    sizes = [len(part) for _, part in slices]
    assert len(sizes) == -(-count // most)
    assert max(sizes, default=0) <= most
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert 1 not in sizes or count == 1


def test_no_prompt_is_left_without_another_to_take_negatives_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_PROMPTS", 16)  # 17 prompts: not 16 and one that is alone
    made = run(tmp_path, tools(), p=OTHERS)
    assert len(made.groups) == 17
    for group in made.groups:
        assert [c.origin for c in group.completions].count("negative") == 1


def test_prompts_that_replace_others_are_slices_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def every_third(completions: Sequence[Any], prompts: Sequence[str], **_: Any) -> list[float]:
        numbers = [int(p.split()[1].rstrip(":")) for p in prompts]
        return [float(i) if n % 3 else 0.0 for i, n in enumerate(numbers)]

    t = tools(reward=every_third)
    whole = run(tmp_path / "whole", t, data=rows(40), num_groups=20)
    assert whole.metrics["round/prompts"] > 20
    monkeypatch.setattr(module, "SLICE_PROMPTS", 4)
    assert run(tmp_path / "sliced", t, data=rows(40), num_groups=20) == whole


# ---- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_a_kill_beside_any_rename_costs_one_batch_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, before: bool
) -> None:
    monkeypatch.setattr(module, "SLICE_PROMPTS", 4)
    scored: list[int] = []

    def counted(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        scored.append(len(completion_ids))
        return scores(completion_ids)

    run(tmp_path / "whole", tools(), data=rows(9))
    expected, point = files_of(tmp_path / "whole"), 0
    while True:
        point += 1
        folder, sampler = tmp_path / str(point), Seeded()
        scored.clear()

        with monkeypatch.context() as patch:
            crash_at_rename(patch, point, before=before)
            try:
                run(folder, tools(sampler, reward=counted), data=rows(9))
            except Crash:
                pass
            else:
                break
        run(folder, tools(sampler, reward=counted), data=rows(9))
        assert files_of(folder) == expected
        assert sampler.asked - 9 * 4 in (0, 4, 6)
        assert sum(scored) - 9 * 4 in (0, 4)
        assert (sampler.asked - 36) * (sum(scored) - 36) == 0
    assert point > 20  # nine batches of samples, nine of scores, and what marks a slice


def test_what_a_kill_left_beside_a_finished_round_goes(tmp_path: Path) -> None:
    half = tmp_path / ".manifest.json-half"  # killed while it was written, before it had its name
    half.touch()
    made = run(tmp_path, tools())
    assert not half.exists()
    half.touch()
    (tmp_path / "work" / "000000").mkdir(parents=True)
    (tmp_path / "work" / "groups.parquet.part").write_bytes(b"half")
    assert run(tmp_path, tools(Seeded())) == made
    assert not (tmp_path / "work").exists()
    assert not half.exists()


def test_a_round_that_is_refused_leaves_no_groups(tmp_path: Path) -> None:
    with pytest.raises(CollapseError, match="0 of 17 prompts"):
        run(tmp_path, tools(reward=lambda completions, **_: [0.0] * len(completions)))
    assert not (tmp_path / "groups.parquet").exists()
    assert read_round(tmp_path) is None


def test_scores_without_the_reference_are_not_taken_up_where_it_is_needed(tmp_path: Path) -> None:
    calls = 0

    def flaky(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 30:  # past the first prompts, which have it for the metrics
            raise ConnectionError("away")
        return scores(completion_ids)

    t = tools(reward=flaky, policy_logprobs=logprobs, ref_logprobs=logprobs, ref_for_all=False)
    with pytest.raises(Exception, match="away"):
        run(tmp_path, t, data=rows(40))
    made = run(tmp_path, replace(t, ref_for_all=True), data=rows(40))
    assert all(len(c.ref_logprobs) == 5 for g in made.groups for c in g.completions)


# ---- log-probabilities for metrics ---------------------------------------------------------------


@pytest.mark.parametrize("ref_for_all", [True, False])
@pytest.mark.parametrize("one_policy", [True, False])
def test_the_policy_is_scored_on_the_first_prompts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, one_policy: bool, ref_for_all: bool
) -> None:
    monkeypatch.setattr(module, "SLICE_PROMPTS", 3)  # the first prompts are not one slice
    scored: Counter[str] = Counter()

    def counted(name: str) -> Any:
        def of(prompts: Any, completions: Any) -> list[tuple[float, ...]]:
            scored[name] += len(completions)
            return [
                tuple(v - (name == "start") for v in row) for row in logprobs(prompts, completions)
            ]

        return of

    start, policy = counted("start"), counted("policy")
    made = run(
        tmp_path,
        tools(
            policy_logprobs=start if one_policy else policy,
            ref_logprobs=start,
            ref_for_all=ref_for_all,
        ),
        data=rows(40),
    )
    measured = 5 * 4  # an eighth of the prompts
    refs = 160 if ref_for_all else measured
    assert scored == ({"start": refs} if one_policy else {"start": refs, "policy": measured})
    with_policy = [g for g in made.groups if g.completions[0].policy_logprobs]
    assert list(made.groups[: len(with_policy)]) == with_policy
    assert len(with_policy) == made.metrics["round/measured_prompts"] == 5
    for i, group in enumerate(made.groups):
        for c in group.completions:
            ref = tuple(v - 1 for v in logprobs([], [c.token_ids])[0])
            own = ref if one_policy else tuple(v + 1 for v in ref)
            assert c.policy_logprobs == (own if i < 5 else ())
            assert c.ref_logprobs == (ref if i < 5 or ref_for_all else ())
    k3 = 0.0 if one_policy else math.exp(-1) + 1 - 1
    assert made.metrics["kl/positive"] == pytest.approx(k3)
    values = [
        v
        for g in with_policy
        for c in g.completions
        if c.origin == "plain"
        for v in c.policy_logprobs
    ]
    assert made.metrics["logps/plain"] == pytest.approx(fmean(values))


@pytest.mark.parametrize(
    ("prompts", "measured"),
    [(1, 1), (4, 1), (8, 1), (9, 2), (20, 3), (40, 5), (127, 16), (10**6, 16)],
)
def test_few_prompts_of_a_small_round_are_measured(prompts: int, measured: int) -> None:
    """At most an eighth of the round, rounded up: in a small round the passes would show."""
    assert measured_prompts(prompts) == measured <= MEASURED_PROMPTS == 16


def test_a_round_that_scores_nothing_says_nothing_of_measured_prompts(tmp_path: Path) -> None:
    assert "round/measured_prompts" not in run(tmp_path, tools()).metrics


# ---- metrics -------------------------------------------------------------------------------------

REWARDS = st.none() | st.floats(-1e6, 1e6)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(REWARDS, min_size=2, max_size=2), min_size=1, max_size=12))
def test_metrics_are_those_of_all_groups_together(groups: list[list[float | None]]) -> None:
    """Against `statistics` over everything at once, to the bit (but for the square root)."""
    measures, everything = RoundMeasures(["r", "r"]), list[Completion]()
    for i, (good, bad) in enumerate(groups):
        completions = (
            Completion("positive", 0, f"a b {i}", (1, 2), reward=good, reward_components=(good, 1)),
            Completion(
                "negative", 0, "c d", (1,) * i, "length", reward=bad, reward_components=(bad, 2)
            ),
        )
        everything += completions
        measures.add(CompletionGroup(f"{i}", "Q", (1,), completions))
    found = measures.metrics(1, Counter())
    rewards = [c.reward for c in everything if c.reward is not None]
    gaps = [g - b for g, b in groups if g is not None and b is not None]
    assert found.get("reward") == (fmean(rewards) if rewards else None)
    assert found.get("contrast/reward_gap") == (fmean(gaps) if gaps else None)
    if len(rewards) > 1:
        assert found["reward_std"] == pytest.approx(pstdev(rewards), rel=1e-14)
    assert found["completions/mean_length"] == fmean(len(c.token_ids) for c in everything)
    assert found["completions/clipped_ratio"] == 0.5
    assert found["rewards/r/mean"] == 1.5  # the later of two with one name, as their order says
    assert found["rewards/abstained"] == sum(c.reward is None for c in everything) / len(everything)
    assert found["contrast/distinct2"] == distinct_n(
        c.text for c in everything if c.origin == "positive"
    )


def test_the_spread_of_rewards_does_not_drown_in_their_size() -> None:
    measures = RoundMeasures([])
    rewards = [1e9 + x for x in (0.0, 0.25, 0.5, 0.75)]
    for i, reward in enumerate(rewards):
        completions = (Completion("plain", 0, "a", (1,), reward=reward),)
        measures.add(CompletionGroup(f"{i}", "Q", (1,), completions))
    # In floating point, mean of squares − square of the mean is 0 or negative here.
    assert measures.metrics(0, Counter())["reward_std"] == pytest.approx(0.2795084971874737)


def test_distinct2_is_over_the_first_texts() -> None:
    measures = RoundMeasures([])
    texts = [f"word {i}" if i < DISTINCT_TEXTS else "one and the same" for i in range(3000)]
    for i, text in enumerate(texts):
        completions = (
            Completion("negative", 0, f"not counted {i}", (1,)),
            Completion("positive", 0, text, (1,)),
        )
        measures.add(CompletionGroup(f"{i}", "Q", (1,), completions))
    assert measures.metrics(0, Counter())["contrast/distinct2"] == 1.0 > distinct_n(texts)


# ---- progress ------------------------------------------------------------------------------------


def stages(said: list[tuple[str, int, int]]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    for name in ("sample", "score"):
        yield name, [(finished, total) for stage, finished, total in said if stage == name]


def test_progress_counts_over_the_whole_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_PROMPTS", 4)
    for p, completions in ((PARAMS, 17 * 4), (OTHERS, 17 * 3)):
        said: list[tuple[str, int, int]] = []
        folder = tmp_path / str(p.num_plain)
        run(folder, tools(), p=p, progress=lambda *now, said=said: said.append(now))
        for name, steps in stages(said):
            whole = completions if name == "sample" else 17
            assert {total for _, total in steps} == {whole}
            assert [f for f, _ in steps] == sorted(f for f, _ in steps)
            assert steps[-1] == (whole, whole)


def test_progress_after_an_interruption_and_with_prompts_that_replace_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_PROMPTS", 4)
    calls = 0

    def flaky(prompts: Sequence[str], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ConnectionError("away")
        numbers = [int(p.split()[1].rstrip(":")) for p in prompts]
        return [float(i) if n % 3 else 0.0 for i, n in enumerate(numbers)]

    said: list[tuple[str, int, int]] = []
    t = tools(reward=flaky)
    with pytest.raises(RewardError, match="away"):
        run(tmp_path, t, data=rows(40), num_groups=20, progress=lambda *now: said.append(now))
    said.clear()
    made = run(tmp_path, t, data=rows(40), num_groups=20, progress=lambda *now: said.append(now))
    for name, steps in stages(said):
        prompts = int(made.metrics["round/prompts"])
        whole = prompts * (4 if name == "sample" else 1)
        assert steps[-1] == (whole, whole)
        assert steps[0][1] < whole  # prompts that replace others were added
        assert [f for f, _ in steps] == sorted(f for f, _ in steps)


# ---- growth --------------------------------------------------------------------------------------


def test_choosing_the_prompts_of_a_large_round_takes_no_time(tmp_path: Path) -> None:
    """A round of the whole data: repeats are looked for in a set."""

    class Reached(Exception):
        pass

    class Stopping(Seeded):
        def sample(self, *_: Any, **__: Any) -> list[Sample]:
            raise Reached

    start = time.process_time()
    with pytest.raises(Reached):
        run(tmp_path, tools(Stopping()), data=rows(20_000))
    assert time.process_time() - start < 1.5  # of which most is the first slice's planning


def peak_of(folder: Path, count: int) -> int:
    """The most bytes that Python held beyond the prompts while it made and read a round."""
    data = rows(count)
    t = tools(Seeded(64), batch_size=80, policy_logprobs=logprobs, ref_logprobs=logprobs)
    run(folder / "first", t, data=rows(4))  # what is imported and cached once does not count
    gc.collect()
    tracemalloc.start()
    try:
        made = run(folder / "round", t, data=data)
        tokens = sum(len(c.token_ids) for g in made.groups for c in g.completions)
        assert tokens == count * 4 * 64
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_PROMPTS", 20)
    monkeypatch.setattr(group_file, "ROW_GROUP", 16)
    monkeypatch.setattr(metrics, "DISTINCT_TEXTS", 20)
    small, large = peak_of(tmp_path / "small", 60), peak_of(tmp_path / "large", 180)
    # Held as objects, 120 groups more are 3 MB more; what grows is a few words a prompt.
    assert 500_000 < small < 10_000_000
    assert large - small < 120 * 1000
