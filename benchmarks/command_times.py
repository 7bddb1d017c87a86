"""How long a command takes before it does anything: the import, the help, a dry run of the demo.

`libraries` is the part of a dry run that imports torch, transformers and what else a run needs.

    python benchmarks/command_times.py --json OUT

Each is a process of its own, after one run to warm the disk's cache; medians.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

from neat_align.cli.options import recipe_path


def commands(folder: str) -> dict[str, list[str]]:
    """What a person types, by name; a dry run writes nothing into its folder."""
    program = str(Path(sys.executable).with_name("neat-align"))
    dry = ["--config", str(recipe_path("demo")), "--output_dir", folder, "--dry-run"]
    return {
        "import": [sys.executable, "-c", "import neat_align"],
        "help": [program, "--help"],
        "libraries": [sys.executable, "-c", "import neat_align.pipeline"],
        "dry_run": [program, "train", *dry],
    }


def seconds_of(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    args = harness.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        taken: dict[str, list[float]] = {}
        for name, command in commands(folder).items():
            seconds_of(command)
            taken[name] = [seconds_of(command) for _ in range(args.repeats)]
    found = {name: harness.spread(values) for name, values in taken.items()}
    rows = [
        [name, f"{s['median']:.2f}", f"{s['min']:.2f}–{s['max']:.2f}"] for name, s in found.items()
    ]
    harness.show("seconds of a command", ["command", "seconds", "range"], rows)
    harness.save(args.json, {"seconds": found})


if __name__ == "__main__":
    main()
