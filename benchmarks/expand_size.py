"""How `neat-align expand` grows with its prompts: 1,000, 10,000 and 100,000 of them.

    python benchmarks/expand_size.py --json benchmarks/results/expand_size.json

The command itself: a file of conversations (130 words a row) is read and checked with the demo
model's tokenizer and chat template, a round of all prompts is planned, sampled, filtered, rewarded,
ranked and written, and the data set is written from it. A stub stands in for the sampler (two
answers a prompt of 48 to 80 tokens, a function of the seed): the pipeline is what is measured, and
a sampler's work is the same for every prompt. The model that the checks look at has hardly any
weights.

Each size runs in a process of its own, and so does the empty start that is taken off (512 prompts,
one slice). CPU seconds, since wall seconds say as much about the machine's other work.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness
from round_size import StubSampler, reward
from startup import tiny_model, write_prompts

from neat_align import NEATConfig
from neat_align.cli.expand import write_expansion
from neat_align.errors import ConfigError
from neat_align.sampling.policies import Policies
from neat_align.script_arguments import ScriptArguments

SIZES = (1_000, 10_000, 100_000)
EMPTY = 512
MIB = 2**20


def hashed(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The reward: a number of each answer's own."""
    return reward(completion_ids)


def expand(folder: Path, count: int) -> dict[str, float]:
    """Seconds and memory of the command over so many prompts."""
    tokenizer = harness.load_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_prompts(folder / "data.jsonl", count)
    script = ScriptArguments(
        model_name_or_path=str(folder / "model"),
        dataset_name=str(folder / "data.jsonl"),
        reward_funcs=["expand_size:hashed"],
    )
    config = NEATConfig(
        output_dir=str(folder / "run"),
        num_positive=1,
        num_negative=1,
        num_plain=0,
        use_human_completions=False,
        kl_weight=0.0,  # no log-probabilities of the start policy: those are the model's work
        prompts_per_round=count,
        generation_batch_size=1024,
        max_completion_length=80,
        instruction_bank="politeness",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    harness.reset_peak_rss()
    wall, cpu = time.perf_counter(), time.process_time()
    write_expansion(script, config, folder / "out.parquet", "ranked")
    return {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": harness.peak_rss() / MIB,
    }


def measure(count: int) -> dict[str, float]:
    """One size, in this process."""
    import pyarrow.parquet as pq

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name, stub_sampler():
        found = expand(Path(name), count)
        written = pq.read_metadata(Path(name) / "out.parquet").num_rows
    if written != count:
        raise ConfigError(f"{count} prompts were given, and {written} rows were written")
    return found


def stub_sampler() -> Any:
    """Policies that draw from the stub."""
    stub = StubSampler()
    return patch.multiple(Policies, sampler=lambda _: stub, start_sampler=lambda _: stub)


def growth(runs: dict[int, dict[str, float]]) -> dict[str, Any]:
    """What a prompt costs at each size, without the empty start, and how that grows."""
    empty, sizes = runs[EMPTY], sorted(n for n in runs if n != EMPTY)

    def each(size: int, name: str) -> float:
        return 1e3 * (runs[size][name] - empty[name]) / (size - EMPTY)

    small, middle, large = sizes[0], sizes[-2], sizes[-1]
    return {
        "milliseconds_a_prompt": {str(n): each(n, "cpu_seconds") for n in sizes},
        "time_ratio": each(large, "cpu_seconds") / each(middle, "cpu_seconds"),
        "mib_added": runs[large]["peak_mib"] - runs[small]["peak_mib"],
    }


def main() -> None:
    """Measure every size, print a table, write the result file."""
    made = harness.parser(__doc__)
    made.add_argument("--one", type=int, help="measure this many prompts in this process")
    made.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    args = made.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one)))
        return
    sizes = (EMPTY, *args.sizes)
    runs = {size: harness.in_own_process(["--one", str(size)]) for size in sizes}
    grown = growth(runs)
    rows = [
        [
            f"{size:,}",
            f"{runs[size]['wall_seconds']:.1f}",
            f"{runs[size]['cpu_seconds']:.1f}",
            f"{grown['milliseconds_a_prompt'][str(size)]:.3f}",
            f"{runs[size]['peak_mib']:.0f}",
        ]
        for size in args.sizes
    ]
    columns = ["prompts", "wall s", "CPU s", "CPU ms a prompt", "peak MiB"]
    harness.show("expand as it grows", columns, rows)
    print(
        f"largest against the one before, a prompt: CPU x{grown['time_ratio']:.3f} (1 is linear); "
        f"largest against smallest: {grown['mib_added']:.0f} MiB more at the peak"
    )
    result = {"runs": {str(size): run for size, run in runs.items()}, "growth": grown}
    harness.save(args.json, {"benchmark": "expand_size", "command": " ".join(sys.argv), **result})


if __name__ == "__main__":
    main()
