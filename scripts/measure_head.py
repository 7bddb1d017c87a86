"""What a non-contiguous slice costs the language-model head without gradients.

    python scripts/measure_head.py --out FILE

A model that keeps only some logits hands its head a slice of the hidden states. Each side runs in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROWS, TOKENS, WIDTH, VOCABULARY = 64, 54, 576, 49152


def one(kind: str) -> None:
    """Time five heads after a warm-up and print seconds and peak memory added, as JSON."""
    import torch

    states = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.bfloat16)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.bfloat16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            last = states[:, -1:]
            torch.nn.functional.linear(last if kind == "slice" else last.contiguous(), weight)
            seconds.append(time.perf_counter() - start)
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        json.dumps(
            {
                "seconds_first": seconds[0],
                "seconds_median": statistics.median(seconds[1:]),
                "peak_bytes_added": added,
            }
        )
    )


def main() -> None:
    """Run both sides and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=["slice", "contiguous"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.kind:
        one(args.kind)
        return
    import torch

    result: dict[str, object] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": torch.get_num_threads(),
    }
    for kind in ("slice", "contiguous"):
        done = subprocess.run(  # noqa: S603
            [sys.executable, __file__, "--kind", kind], capture_output=True, text=True, check=True
        )
        result[kind] = json.loads(done.stdout)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
