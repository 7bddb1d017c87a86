"""The slices of a round made by workers of Ray Data, in two stages that scale apart.

    shards ──► policy workers: sample, filter, log-probabilities ──► reward workers ──► this process

A worker is an actor that loads its model once. It writes what it makes into the run directory,
under the shard's key, and sends nothing back but that it is done. What is finished is told by these
files alone (`shards`), never by Ray: a worker that dies is replaced and its shard goes on from the
last finished batch; a round that is taken up makes the missing shards only, on any number of
workers.
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from neat_align.errors import NEATError
from neat_align.files.atomic import read_json, write_json
from neat_align.rounds.params import RoundParams, RoundProgress, RoundTools
from neat_align.rounds.shard_stages import Shard, not_shared, reward_shard, sample_shard
from neat_align.rounds.shards import RolledOut, Slice, read_shard, shard_key

Stage: TypeAlias = Literal["policy", "rewards"]
# What each stage does with a shard.
_WORK: Mapping[Stage, Callable[[Shard, RoundTools], None]] = {
    "policy": sample_shard,
    "rewards": reward_shard,
}
# How often a shard is begun in one run of this process. Ray replaces dead workers for ever; a shard
# that kills each of them (memory that does not suffice) has to end.
MOST_TRIES = 4
# How long the main thread waits before it looks whether it is to stop.
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Workers:
    """The workers of a stage: how many, and the CPUs and GPUs of each.

    `make_tools` is called once in each of them, and has to be something that can be pickled. It is
    where a policy is loaded: whatever keeps the `Sampler` protocol samples.
    """

    count: int
    cpus: int
    gpus: float
    make_tools: Callable[[], RoundTools]


@dataclass(frozen=True)
class RayShards:
    """A `SliceMaker` whose slices are made by Ray's workers; Ray has to be connected.

    `rewards` is None where there is no reward. `made_by` is JSON that tells this run's model and
    options from others (`shard_key`). `check_stop` is called while it waits: what it raises ends
    the workers, and loses no finished batch.
    """

    policy: Workers
    rewards: Workers | None
    params: RoundParams
    reward_names: tuple[str, ...]
    made_by: Mapping[str, Any]
    round_index: int = 0
    check_stop: Callable[[], None] = lambda: None

    def __call__(self, slices: Iterable[Slice], progress: RoundProgress) -> Iterator[RolledOut]:
        """The slices' groups in order, each as soon as it and all before it are finished.

        Raises what a worker's stage has raised, if that is a NEATError; finished shards stay.
        """
        shards = [self._shard(number, part) for number, part in enumerate(slices)]
        # None: it was finished since, and is read when it is its turn.
        found: dict[int, RolledOut | None] = {
            s.number: made for s in shards if (made := _finished(s)) is not None
        }
        for number in found:
            self._tell(shards[number], progress)
        arriving = self._arrivals([s for s in shards if s.number not in found], progress)
        for shard in shards:
            while shard.number not in found:
                found[next(arriving)] = None
            made = found.pop(shard.number) or _finished(shard)
            if made is None:
                raise not_shared(shard.folder)
            yield made

    def _shard(self, number: int, part: Slice) -> Shard:
        key = shard_key(part, self.made_by)
        return Shard(number, key, part, self.round_index, self.params, self.reward_names)

    def _tell(self, shard: Shard, progress: RoundProgress) -> None:
        progress.sampled(self.params.sampled_for(len(shard.part.rows)))
        progress.scored(len(shard.part.rows))

    def _arrivals(self, shards: Sequence[Shard], progress: RoundProgress) -> Iterator[int]:
        """Make these shards; their numbers, as they are finished."""
        if not shards:
            return
        ray_data: Any = importlib.import_module("ray.data")  # an extra: not everybody has it
        _quieten(ray_data.DataContext.get_current())
        # A block a shard: a worker is given one at a time.
        rows: Any = [{"job": _Job(shard)} for shard in shards]
        data = ray_data.from_items(rows, override_num_blocks=len(shards))
        data = _stage(data, "policy", self.policy, len(shards))
        if self.rewards is not None:
            data = _stage(data, "rewards", self.rewards, len(shards))
        for row in _watched(data.iter_rows, self.check_stop):
            job: _Job = row["job"]
            if job.error is not None:
                raise job.error
            self._tell(job.shard, progress)
            yield job.shard.number
        raise NEATError("Ray ended before all shards were made: start it again to go on")


def _quieten(context: Any) -> None:
    """Ray Data tells of each execution, and draws bars; this run tells how far it is itself."""
    context.enable_progress_bars = context.print_on_execution_start = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)


def _finished(shard: Shard) -> RolledOut | None:
    return read_shard(shard.folder, "finished", shard.key)


def _stage(data: Any, stage: Stage, workers: Workers, shards: int) -> Any:
    """The data set with a stage of workers after it."""
    strategy: Any = importlib.import_module("ray.data").ActorPoolStrategy
    # Of a long shard, the next one must not wait behind it while another worker has none.
    size = min(workers.count, shards)
    pool = strategy(size=size, max_tasks_in_flight_per_actor=1)
    return data.map_batches(
        _Worker,
        fn_constructor_args=(stage, workers.make_tools, uuid.uuid4().hex),
        batch_size=1,
        batch_format="numpy",
        compute=pool,
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
    )


@dataclass(frozen=True)
class _Job:
    """A shard on its way through the stages, and what one of them has raised."""

    shard: Shard
    error: NEATError | None = None


class _Worker:
    """An actor of one stage: its tools, made once, and one shard after the other."""

    def __init__(self, stage: Stage, make_tools: Callable[[], RoundTools], run: str) -> None:
        self.stage = stage
        self.make_tools = make_tools
        self.run = run
        self.tools: RoundTools | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Do this stage's work on the batch's one shard; an error of ours is passed on."""
        job: _Job = batch["job"][0]
        if job.error is None:
            try:
                self._work(job.shard)
            except NEATError as error:
                job = replace(job, error=error)
        return {"job": [job]}

    def _work(self, shard: Shard) -> None:
        _count_try(shard.folder / f"{self.stage}-tries.json", self.run)
        if self.tools is None:  # here, so that what is wrong is told as any other error
            self.tools = self.make_tools()
        _WORK[self.stage](shard, self.tools)


def _count_try(path: Path, run: str) -> None:
    """Note that work on a shard begins. Raises NEATError where that was too often in this run."""
    tries = read_json(path) if path.is_file() else {}
    count = tries["count"] if tries.get("run") == run else 0
    if count >= MOST_TRIES:
        raise NEATError(
            f"{count} workers have died one after the other while they made the prompts of "
            f"{path.parent}: most often memory does not suffice (fewer workers on a machine, a "
            "smaller generation_batch_size); finished shards are kept"
        )
    write_json(path, {"run": run, "count": count + 1})


def _watched(
    rows: Callable[[], Iterable[Mapping[str, Any]]], check_stop: Callable[[], None]
) -> Iterator[Mapping[str, Any]]:
    """The rows, read in a thread of their own, so that a request to stop need not wait for one."""
    arrived: queue.Queue[tuple[Mapping[str, Any] | None, BaseException | None]] = queue.Queue()

    def read() -> None:
        try:
            for row in rows():
                arrived.put((row, None))
        except BaseException as error:  # noqa: BLE001 — raised again by who reads the queue
            arrived.put((None, error))
        else:
            arrived.put((None, None))

    threading.Thread(target=read, daemon=True).start()
    while True:
        check_stop()
        try:
            row, error = arrived.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            continue
        if error is not None:
            raise error
        if row is None:
            return
        yield row
