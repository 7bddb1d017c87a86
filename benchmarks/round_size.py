"""How time and memory of a round grow with its groups: 1,000, 10,000 and 100,000 of them.

    python benchmarks/round_size.py --json benchmarks/results/round_size.json

Everything but the models: prompts become rows; a round is made of them (planned, "sampled" by a
stub, filtered, rewarded, ranked, written); its groups are taken in a shuffled order as training
takes them; the report is written. A prompt has about 100 tokens, each of its eight completions 48
to 80. Every size runs in a process of its own. Memory is the resident set at its peak in a stage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import psutil

from neat_align.learning.batches import collate_groups
from neat_align.learning.current_round import CurrentRoundDataset
from neat_align.prompts.instruction_banks import load_bank
from neat_align.prompts.row_checks import as_rows
from neat_align.reporting.run_report import write_report
from neat_align.rewards.protocol import NamedReward
from neat_align.rounds.make_round import make_round
from neat_align.rounds.params import RoundParams, RoundTools
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams

SIZES = (1_000, 10_000, 100_000)
STAGES = ("rows", "make", "take", "report")
# Groups that are taken in a shuffled order, in batches.
TAKEN, BATCH = 5_000, 8
MIB = 2**20
_NUMBERS = np.random.default_rng(0)
_TOKENS = _NUMBERS.integers(1000, 40_000, 100_000)
_LOGPROBS = _NUMBERS.normal(-1.5, 1.0, 100_000)
_WORDS = [f"{a}{b}" for a in ("stra", "mel", "ton", "vi", "qu") for b in ("per", "in", "ode", "a")]


# ---- what stands in for the models ---------------------------------------------------------------


def questions(count: int) -> Iterator[dict[str, Any]]:
    """Rows of data, one message of about 100 tokens each."""
    rng = random.Random(0)
    for i in range(count):
        text = f"Question {i}: " + " ".join(rng.choices(_WORDS, k=45))
        yield {"prompt": [{"role": "user", "content": text}]}


class StubSampler:
    """Answers of 48 to 80 tokens, a function of the request's seed."""

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """One `Sample` a request, in order."""
        samples = []
        for request in requests:
            first, length = request.seed % 99_000, 48 + request.seed % 33
            ids = tuple(_TOKENS[first : first + length].tolist())
            samples.append(Sample(ids, "stop", -1.5 * length))
        if progress is not None:
            progress(len(samples))
        return samples


def logprobs(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[tuple[float, ...]]:
    """A log-probability for each token."""
    return [tuple(_LOGPROBS[ids[0] : ids[0] + len(ids)].tolist()) for ids in completions]


def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """A number between 0 and 1 for each answer."""
    digests = (hashlib.sha256(bytes(str(ids), "ascii")).digest() for ids in completion_ids)
    return [int.from_bytes(digest[:4], "big") / 2**32 for digest in digests]


# ---- one size ------------------------------------------------------------------------------------


class Stages:
    """Seconds and memory of one stage after the other."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a stage; gives what it gives."""
        harness.reset_peak_rss()
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        self.found[name] = {
            "seconds": seconds,
            "mib_before": before / MIB,
            "mib_after": psutil.Process().memory_info().rss / MIB,
            "mib_peak": harness.peak_rss() / MIB,
        }
        return result


def one_size(groups: int) -> dict[str, dict[str, float]]:
    """All stages of a round of so many groups."""
    tokenizer, stages = harness.load_tokenizer(), Stages()
    sampler = StubSampler()
    tools = RoundTools(
        tokenizer,
        load_bank("politeness"),
        (NamedReward("hashed", reward, 1.0),),
        sampler,
        sampler,
        policy_logprobs=logprobs,
        ref_logprobs=logprobs,
        batch_size=1024,
    )
    params = RoundParams(
        seed=0,
        num_positive=4,
        num_negative=4,
        num_plain=0,
        use_human_completions=False,
        placement="user_suffix",
        sampling=SamplingParams(80),
        rank_by="reward",
        reward_margin=0.0,
        max_prompt_length=512,
    )

    def take(made: CurrentRoundDataset) -> None:
        order = list(range(len(made)))
        random.Random(0).shuffle(order)
        for start in range(0, min(TAKEN, len(made)), BATCH):
            collate_groups(
                [made[i] for i in order[start : start + BATCH]],
                pad_token_id=0,
                rank_by="reward",
                lm_on_bad_origins=False,
                layout="packed",
            )

    with tempfile.TemporaryDirectory() as run:
        folder = Path(run) / "rounds" / "00000"
        rows = stages.run("rows", lambda: as_rows(questions(groups), "the benchmark"))
        made = stages.run(
            "make",
            lambda: make_round(
                rows,
                num_groups=groups,
                position=0,
                round_index=0,
                params=params,
                tools=tools,
                folder=folder,
            ),
        )
        current = CurrentRoundDataset(groups)
        current.groups = made.groups
        stages.run("take", lambda: take(current))
        stages.run("report", lambda: write_report(Path(run)))
        stages.found["make"]["file_mib"] = (folder / "groups.parquet").stat().st_size / MIB
    return stages.found


# ---- all sizes -----------------------------------------------------------------------------------


def main() -> None:
    """Every size in a process of its own; a table, and the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the result file goes")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one_size(args.one)))
        return
    found = {n: harness.in_own_process(["--one", str(n)]) for n in args.sizes}
    rows = []
    for n, stages in found.items():
        for name in STAGES:
            s, count = stages[name], min(n, TAKEN) if name == "take" else n
            each = 1000 * s["seconds"] / count
            memory = (s["mib_before"], s["mib_peak"], s["mib_after"])
            figures = (f"{s['seconds']:.1f}", f"{each:.2f}", *(f"{m:.0f}" for m in memory))
            rows.append((f"{n:,}", name, *figures))
    columns = ("groups", "stage", "seconds", "ms a group", "MiB before", "peak", "after")
    harness.show("a round as it grows", columns, rows)
    growth = _growth(found)
    print("from the smallest to the largest:", json.dumps(growth))
    harness.save(args.json, {"sizes": {str(n): s for n, s in found.items()}, "growth": growth})


def _growth(found: dict[int, dict[str, dict[str, float]]]) -> dict[str, float]:
    """MiB that the peak grew by, with and without the rows of the data, and how the time of a group
    changed.
    """
    small, large = min(found), max(found)

    def added(stages: dict[str, dict[str, float]]) -> float:
        """The largest peak over what was there once the rows were read."""
        return max(stages[s]["mib_peak"] for s in STAGES[1:]) - stages["rows"]["mib_after"]

    def rows(stages: dict[str, dict[str, float]]) -> float:
        return stages["rows"]["mib_after"] - stages["rows"]["mib_before"]

    def each(n: int) -> float:
        return found[n]["make"]["seconds"] / n

    return {
        "groups": large / small,
        "mib_of_the_round": added(found[large]) - added(found[small]),
        "mib_of_the_rows": rows(found[large]) - rows(found[small]),
        "time_a_group": each(large) / each(small),
    }


if __name__ == "__main__":
    main()
