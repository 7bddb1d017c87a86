"""A round made by two policy workers and one reward worker of Ray Data, in a process of its own.

    python ray_driver.py FOLDER

Answers are a function of their seed. FOLDER/log has a line for every batch that a worker begins:
`sample PID SEED …` or `score PID N`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import small_rounds
from neat_align.cli.expand_ray import RayOptions, connected
from neat_align.rewards.protocol import NamedReward
from neat_align.rounds.params import RoundTools
from neat_align.rounds.ray_shards import RayShards, Workers
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams

SHARDS, PROMPTS = 6, 5
DATA = small_rounds.rows(SHARDS * PROMPTS)
# A shard is 15 answers, in three batches.
BATCH, SECONDS = 5, 0.2


def log(folder: Path, *words: object) -> None:
    line = " ".join(map(str, words)) + "\n"
    with (folder / "log").open("a", encoding="utf-8") as file:
        file.write(line)


class Logged(small_rounds.Seeded):
    """Says what it is asked for before it takes its time."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        log(self.folder, "sample", os.getpid(), *(r.seed for r in requests))
        time.sleep(SECONDS)
        return super().sample(requests, params, progress=progress)


def logged_scores(completion_ids: Sequence[Sequence[int]], folder: Path, **_: Any) -> list[float]:
    log(folder, "score", os.getpid(), len(completion_ids))
    return small_rounds.scores(completion_ids)


def make_tools(folder: Path) -> RoundTools:
    scored = NamedReward("r", partial(logged_scores, folder=folder), 1.0)
    return small_rounds.tools(Logged(folder), rewards=(scored,), batch_size=BATCH)


def main(folder: Path) -> None:
    import ray_driver  # a worker imports the functions by their module's name

    make = partial(ray_driver.make_tools, folder)
    options = RayOptions(num_workers=2)
    with connected(options, has_rewards=True):
        maker = RayShards(
            Workers(2, 1, 0, make), Workers(1, 1, 0, make), small_rounds.PARAMS, ("r",), {}
        )
        small_rounds.run(
            folder / "round",
            make(),
            p=small_rounds.PARAMS,
            data=DATA,
            slice_maker=maker,
            slice_prompts=PROMPTS,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
