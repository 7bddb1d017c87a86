"""Slices that other processes make, stage by stage, are the slices that one process makes."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import small_rounds
from crashes import Crash, crash_at_rename
from neat_align.errors import NEATError, RewardError
from neat_align.rewards.protocol import Unscorable
from neat_align.rounds import make_round as module
from neat_align.rounds import ray_shards
from neat_align.rounds.params import RoundParams, RoundProgress, RoundTools
from neat_align.rounds.ray_shards import MOST_TRIES, RayShards, Workers
from neat_align.rounds.round_files import FinishedRound
from neat_align.rounds.shard_stages import Shard, reward_shard, sample_shard
from neat_align.rounds.shards import RolledOut, Slice, read_shard, shard_key
from small_rounds import PARAMS, Seeded, files_of, rows, scores

DATA = rows(17, chosen="a good one", rejected="a bad one")
TWO = replace(PARAMS, num_positive=2, use_human_completions=True)
MADE_BY = {"model": "small"}


def logprobs(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[tuple[float, ...]]:
    return [tuple(-0.25 * (t % 5) for t in ids) for ids in completions]


def less(*args: Any) -> list[tuple[float, ...]]:
    return [tuple(v - 1 for v in row) for row in logprobs(*args)]


def instructed(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[tuple[float, ...]]:
    """Answers are likelier under some prompts than under others, from a token on."""
    return [
        tuple(-0.125 - (len(p) % 3) * (i % 4) for i, _ in enumerate(c))
        for p, c in zip(prompts, completions, strict=True)
    ]


class InTurn:
    """A `SliceMaker` that hands every shard to both stages, as other processes would get it."""

    def __init__(self, t: RoundTools, p: RoundParams, made_by: Any = MADE_BY) -> None:
        self.t, self.p, self.made_by = t, p, made_by
        names = tuple(reward.name for reward in t.rewards)
        self.names = names
        self.sampling, self.rewarding = 0, 0
        # Neither stage has what only the other one needs.
        self.policy = replace(t, rewards=())
        self.judge = RoundTools(None, t.bank, t.rewards, None, None, batch_size=t.batch_size)  # type: ignore[arg-type]
        self.judge = replace(self.judge, on_bad_row=t.on_bad_row)

    def shards(self, slices: Iterable[Slice]) -> list[Shard]:
        found = [
            Shard(n, shard_key(part, self.made_by), part, 0, self.p, self.names)
            for n, part in enumerate(slices)
        ]
        return [pickle.loads(pickle.dumps(shard)) for shard in found]

    def __call__(self, slices: Iterable[Slice], progress: RoundProgress) -> Iterator[RolledOut]:
        shards = self.shards(slices)
        for shard in reversed(shards):  # nobody finishes in order
            sample_shard(shard, self.policy)
            if self.names:
                reward_shard(shard, self.judge)
        for shard in shards:
            made = read_shard(shard.folder, "finished", shard.key)
            assert made is not None
            yield made


def both(
    folder: Path, t: Callable[[], RoundTools], p: RoundParams = TWO, **changes: Any
) -> tuple[FinishedRound, FinishedRound]:
    """The round made here, and made in shards; the same files."""
    options = {"p": p, "data": DATA, "slice_prompts": 5, **changes}
    own = small_rounds.run(folder / "own", t(), **options)
    sharded = small_rounds.run(folder / "sharded", t(), slice_maker=InTurn(t(), p), **options)
    assert files_of(folder / "sharded") == files_of(folder / "own")
    return own, sharded


def tools(**changes: Any) -> RoundTools:
    return small_rounds.tools(
        Seeded(), **{"policy_logprobs": logprobs, "ref_logprobs": less, **changes}
    )


# ---- the same round ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ref_for_all": False},
        {"ref_logprobs": logprobs},
        {"rewards": ()},
        {"batch_size": 1000},
        {"batch_size": 3},
        {"policy_logprobs": None, "ref_logprobs": None},
    ],
    ids=[
        "as usual",
        "few references",
        "one function",
        "no reward",
        "one batch",
        "small batches",
        "no scores",
    ],
)
def test_shards_give_the_round_of_one_process(tmp_path: Path, changes: dict[str, Any]) -> None:
    by_origin = changes.get("rewards") == ()
    p = replace(TWO, rank_by="origin" if by_origin else "reward")
    own, sharded = both(tmp_path, partial(tools, **changes), p)
    assert sharded == own
    assert len(own.groups) == 17


def test_negatives_from_other_prompts_come_from_the_same_neighbours(tmp_path: Path) -> None:
    p = replace(TWO, negative_source="other_prompts", rank_by="origin_then_reward")
    own, _ = both(tmp_path, tools, p)
    assert {c.origin for g in own.groups for c in g.completions} >= {"negative"}


def test_answers_that_branch_and_tokens_that_are_weighed(tmp_path: Path) -> None:
    p = replace(TWO, contrast_from="branch", contrast_pairs=1, weighing_pairs=1)
    t = partial(tools, policy_logprobs=instructed, start_logprobs=instructed)
    own, _ = both(tmp_path, t, p)
    completions = [c for g in own.groups for c in g.completions]
    assert any(c.branch_at for c in completions)
    assert all(len(c.contrasts) == len(c.token_ids) for c in completions)


def test_prompts_that_replace_others_are_shards_too(tmp_path: Path) -> None:
    def every_third(completions: Sequence[Any], prompts: Sequence[str], **_: Any) -> list[float]:
        numbers = [int(p.split()[1].rstrip(":")) for p in prompts]
        return [float(i) if n % 3 else 0.0 for i, n in enumerate(numbers)]

    own, _ = both(tmp_path, partial(tools, reward=every_third), num_groups=8)
    assert own.metrics["round/prompts"] > 8


def test_what_scoring_notes_is_kept_in_the_same_order(tmp_path: Path) -> None:
    def noting(completion_ids: Sequence[Any], log_extra: Any, log_metric: Any, **_: Any) -> Any:
        log_extra("length", [len(ids) for ids in completion_ids])
        log_metric("share", len(completion_ids) / 10)
        found: list[Any] = list(scores(completion_ids))
        return [
            Unscorable("is odd") if len(ids) == 3 else s
            for ids, s in zip(completion_ids, found, strict=True)
        ]

    _, sharded = both(tmp_path, partial(tools, reward=noting, on_bad_row="skip"))
    assert sharded.metrics["removed/unscorable"] > 0
    assert set(files_of(tmp_path / "sharded")) == {
        "groups.parquet", "manifest.json", "left-out.jsonl", "reward-extra.jsonl",
    }  # fmt: skip


# ---- keys ----------------------------------------------------------------------------------------


def slices_of(p: RoundParams = TWO, t: RoundTools | None = None, **changes: Any) -> list[Slice]:
    """The slices that a round would make."""
    found: list[Slice] = []

    class Enough(Exception):
        pass

    def keep(slices: Iterable[Slice], _: RoundProgress) -> Iterator[RolledOut]:
        found.extend(slices)
        raise Enough

    options = {"data": DATA, "slice_prompts": 5, **changes}
    with pytest.raises(Enough), tempfile.TemporaryDirectory() as folder:
        small_rounds.run(Path(folder), t or tools(), p=p, slice_maker=keep, **options)
    return found


def test_a_key_is_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = [shard_key(part, MADE_BY) for part in slices_of()]
    assert len(set(keys)) == len(keys) == 4
    assert keys == [shard_key(part, MADE_BY) for part in slices_of()]
    moved = [replace(part, folder=Path("/elsewhere")) for part in slices_of()]
    assert [shard_key(part, MADE_BY) for part in moved] == keys
    others = {
        "model": [shard_key(part, {"model": "other"}) for part in slices_of()],
        "seed": [shard_key(part, MADE_BY) for part in slices_of(replace(TWO, seed=4))],
        "counts": [shard_key(part, MADE_BY) for part in slices_of(replace(TWO, num_plain=2))],
        "rewards": [shard_key(p, MADE_BY) for p in slices_of(t=tools(rewards=()))],
        "texts": [
            shard_key(part, MADE_BY)
            for part in slices_of(data=[replace(row, prompt=row.prompt + " ") for row in DATA])
        ],
    }
    for name, found in others.items():
        assert not set(found) & set(keys), name


# ---- interruptions -------------------------------------------------------------------------------


def test_a_reward_that_fails_costs_no_sample_and_no_paid_score(tmp_path: Path) -> None:
    paid: list[int] = []

    def flaky(completion_ids: Sequence[Any], **_: Any) -> list[float]:
        if len(paid) == 7:  # in the middle of a shard
            paid.append(0)
            raise ConnectionError("away")
        paid.append(len(completion_ids))
        return scores(completion_ids)

    sampler = Seeded()
    t = replace(tools(reward=flaky), sampler=sampler, negative_sampler=sampler)
    run = partial(small_rounds.run, p=TWO, data=DATA, slice_prompts=5)
    with pytest.raises(RewardError, match="away"):
        run(tmp_path / "cut", t, slice_maker=InTurn(t, TWO))
    made = run(tmp_path / "cut", t, slice_maker=InTurn(t, TWO))
    assert made == run(tmp_path / "whole", tools())
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    seeds = [r.seed for r in sampler.requests]
    assert len(seeds) == len(set(seeds))
    assert sum(paid) == sum(len(g.completions) for g in made.groups)


def test_either_engine_goes_on_with_what_the_other_has_left(tmp_path: Path) -> None:
    def flaky(completion_ids: Sequence[Any], fails: list[int], **_: Any) -> list[float]:
        fails[0] -= 1
        if fails[0] == 0:
            raise ConnectionError("away")
        return scores(completion_ids)

    whole = small_rounds.run(tmp_path / "whole", tools(), p=TWO, data=DATA, slice_prompts=5)
    for first in ("own", "sharded"):
        sampler, fails = Seeded(), [8]
        t = replace(
            tools(reward=partial(flaky, fails=fails)), sampler=sampler, negative_sampler=sampler
        )
        makers = {"own": None, "sharded": InTurn(t, TWO)}
        order = [makers.pop(first), *makers.values()]
        run = partial(small_rounds.run, tmp_path / first, t, p=TWO, data=DATA, slice_prompts=5)
        with pytest.raises(RewardError, match="away"):
            run(slice_maker=order[0])
        assert run(slice_maker=order[1]) == whole
        assert files_of(tmp_path / first) == files_of(tmp_path / "whole")
        seeds = [r.seed for r in sampler.requests]
        assert len(seeds) == len(set(seeds))


@pytest.mark.parametrize("before", [True, False])
def test_a_kill_beside_any_rename_costs_one_batch_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, before: bool
) -> None:
    """Whichever process it was: a worker in one of its stages, or the one that leads."""
    scored: list[int] = []

    def counted(completion_ids: Sequence[Any], **_: Any) -> list[float]:
        scored.append(len(completion_ids))
        return scores(completion_ids)

    def run(folder: Path, sampler: Seeded) -> None:
        t = small_rounds.tools(sampler, reward=counted, batch_size=3)
        options = {"p": PARAMS, "data": rows(4), "slice_prompts": 2}
        small_rounds.run(folder, t, slice_maker=InTurn(t, PARAMS), **options)

    run(tmp_path / "whole", Seeded())
    expected, point = files_of(tmp_path / "whole"), 0
    answers, rewarded, batches = 4 * 3, sum(scored), {0, *scored}
    while True:
        point += 1
        folder, sampler = tmp_path / str(point), Seeded()
        scored.clear()
        with monkeypatch.context() as patch:
            crash_at_rename(patch, point, before=before)
            try:
                run(folder, sampler)
            except Crash:
                pass
            else:
                break
        run(folder, sampler)
        assert files_of(folder) == expected
        twice = len(sampler.requests) - answers, sum(scored) - rewarded
        assert twice[0] in (0, 3)
        assert twice[1] in batches
        assert twice[0] * twice[1] == 0
    assert point > 15


@pytest.fixture
def made_shards(tmp_path: Path) -> tuple[InTurn, list[Shard]]:
    """Finished shards, and who has made them; their round is not finished."""
    sampler = Seeded()
    t = replace(tools(), sampler=sampler, negative_sampler=sampler)
    turn, kept = InTurn(t, TWO), list[Shard]()

    class Cut(Exception):
        pass

    def until(slices: Iterable[Slice], progress: RoundProgress) -> Iterator[RolledOut]:
        kept.extend(turn.shards(list(slices)))
        list(turn([shard.part for shard in kept], progress))
        raise Cut

    with pytest.raises(Cut):
        small_rounds.run(tmp_path / "r", t, p=TWO, data=DATA, slice_prompts=5, slice_maker=until)
    return turn, kept


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "mark", "mark cut"])
def test_a_damaged_shard_is_made_again(
    made_shards: tuple[InTurn, list[Shard]], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    turn, shards = made_shards
    before = read_shard(shards[1].folder, "finished", shards[1].key)
    assert before is not None
    groups = list(before.groups)
    file, mark = (shards[1].folder / f"finished.{kind}" for kind in ("parquet", "json"))
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-7])
    elif damage == "bit":
        file.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    elif damage == "gone":
        file.unlink()
    elif damage == "mark":
        mark.write_text(json.dumps({"key": shards[1].key}))
    else:
        mark.write_text(mark.read_text()[:20])
    assert read_shard(shards[1].folder, "finished", shards[1].key) is None
    assert ("is made again" in caplog.text) == (damage != "gone")
    drawn = len(turn.t.sampler.requests)  # type: ignore[attr-defined]
    sample_shard(shards[1], turn.policy)
    reward_shard(shards[1], turn.judge)
    again = read_shard(shards[1].folder, "finished", shards[1].key)
    assert again is not None
    assert list(again.groups) == groups
    assert len(turn.t.sampler.requests) == drawn  # type: ignore[attr-defined]


def test_scores_of_other_rewards_are_not_taken_up(made_shards: tuple[InTurn, list[Shard]]) -> None:
    """A, then B, then A again: B's scores lie beside what A's policy stage has left."""
    turn, shards = made_shards
    first = shards[0]
    heavier = (replace(turn.t.rewards[0], weight=2.0),)
    plan = {**first.part.plan, "rewards": [["r", 2.0]]}
    part = replace(first.part, plan=plan)
    other = replace(first, part=part, key=shard_key(part, MADE_BY))
    before = read_shard(first.folder, "finished", first.key)
    assert before is not None
    rewards = [c.reward for g in list(before.groups) for c in g.completions]
    sample_shard(other, turn.policy)
    reward_shard(other, replace(turn.judge, rewards=heavier))
    for shard, judge, factor in (
        (other, heavier, 2.0),
        (first, turn.t.rewards, 1.0),
        (other, heavier, 2.0),
    ):
        sample_shard(shard, turn.policy)
        reward_shard(shard, replace(turn.judge, rewards=judge))
        made = read_shard(shard.folder, "finished", shard.key)
        assert made is not None
        assert [c.reward for g in made.groups for c in g.completions] == [
            None if r is None else factor * r for r in rewards
        ]


def test_a_disk_that_is_not_shared_is_named(tmp_path: Path) -> None:
    part = slices_of()[0]
    shard = Shard(0, "k", replace(part, folder=tmp_path / "work"), 0, TWO, ("r",))
    with pytest.raises(
        NEATError, match=r"has not what another worker .* on a disk that they share"
    ):
        reward_shard(shard, tools())


# ---- the workers, without Ray --------------------------------------------------------------------


def worker(make: Callable[[], RoundTools], run: str = "one") -> Any:
    return ray_shards._Worker("policy", make, run)


def job_of(shard: Shard) -> dict[str, list[Any]]:
    return {"job": [pickle.loads(pickle.dumps(ray_shards._Job(shard)))]}


def error_of(batch: dict[str, Any]) -> Any:
    return batch["job"][0].error


def test_a_shard_that_kills_its_workers_ends(tmp_path: Path) -> None:
    shard = Shard(0, "k", replace(slices_of()[0], folder=tmp_path), 0, TWO, ("r",))

    def dies() -> RoundTools:
        raise Crash

    for _ in range(MOST_TRIES):
        with pytest.raises(Crash):
            worker(dies)(job_of(shard))
    said = error_of(worker(dies)(job_of(shard)))
    assert isinstance(said, NEATError)
    assert "4 workers have died one after the other" in str(said)
    with pytest.raises(Crash):  # another run begins to count again
        worker(dies, "two")(job_of(shard))


def test_an_error_is_passed_on_and_its_shard_let_through(tmp_path: Path) -> None:
    shard = Shard(0, "k", replace(slices_of()[0], folder=tmp_path), 0, TWO, ("r",))

    def refuses() -> RoundTools:
        raise RewardError("no such reward")

    failed = worker(refuses)(job_of(shard))
    assert isinstance(error_of(failed), RewardError)

    def never() -> RoundTools:
        raise AssertionError

    passed = ray_shards._Worker("rewards", never, "one")(failed)
    assert str(error_of(passed)) == "no such reward"


def test_finished_shards_need_no_ray(
    made_shards: tuple[InTurn, list[Shard]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is missing is the round's own file."""
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    turn, _ = made_shards
    nobody = Workers(1, 1, 0, tools)
    maker = RayShards(nobody, nobody, TWO, ("r",), MADE_BY)
    said: list[tuple[str, int, int]] = []
    run = partial(small_rounds.run, t=turn.t, p=TWO, data=DATA, slice_prompts=5)
    made = run(tmp_path / "r", slice_maker=maker, progress=lambda *now: said.append(now))
    assert made == run(tmp_path / "whole", t=tools())
    assert ("sample", 17 * 4, 17 * 4) in said
    assert said[-1] == ("score", 17, 17)
    other = replace(maker, made_by={"model": "other"})
    (tmp_path / "r" / "manifest.json").unlink()
    with pytest.raises(ImportError):  # another model's shards are not these
        run(tmp_path / "r", slice_maker=other)


def test_a_request_to_stop_is_heard_while_nothing_arrives() -> None:
    class Asked(Exception):
        pass

    def never() -> Iterator[Any]:
        import threading

        threading.Event().wait(30)
        yield {}

    def stop() -> None:
        raise Asked

    with pytest.raises(Asked):
        next(ray_shards._watched(never, stop))


def test_slices_of_both_makers_are_of_the_default_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE_PROMPTS", 4)
    assert [len(part.rows) for part in slices_of(slice_prompts=None)] == [3, 3, 4, 3, 4]
