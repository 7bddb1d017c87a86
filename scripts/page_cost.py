"""Size of the two HTML pages and the time to write them: python scripts/page_cost.py [--run DIR]
[--comparison DIR]

Without folders the pages are of the run and the comparison that the tests make up. The first time
is a new process's, with imports; the others are medians of pages written after it.
"""

from __future__ import annotations

import argparse
import gzip
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"


def main() -> None:
    """Print one line a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a run directory")
    parser.add_argument("--comparison", type=Path, help="a folder that `neat-align compare` wrote")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    start = time.perf_counter()
    from neat_align.reporting.comparison_report import write_comparison_report
    from neat_align.reporting.run_report import write_report

    print(f"imports of both pages: {time.perf_counter() - start:.2f} s")
    with tempfile.TemporaryDirectory() as scratch:
        run, comparison = arguments.run, arguments.comparison
        if run is None or comparison is None:
            made_run, made_comparison = made_up(Path(scratch))
            run, comparison = run or made_run, comparison or made_comparison
        for write, folder in ((write_report, run), (write_comparison_report, comparison)):
            print(cost(write, folder, arguments.repeats))


def made_up(folder: Path) -> tuple[Path, Path]:
    """The run and the comparison that the tests of the pages use."""
    sys.path.insert(0, str(TESTS))
    from comparison_files import write_comparison
    from run_files import build_run

    (folder / "run").mkdir()
    (folder / "comparison").mkdir()
    return build_run(folder / "run"), write_comparison(folder / "comparison")


def cost(write: Callable[[Path], Path], folder: Path, repeats: int) -> str:
    """One page in words: its size, the part of it that is charts, and seconds to write it."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        page = write(folder)
        seconds.append(time.perf_counter() - start)
    html = page.read_text(encoding="utf-8")
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    return (
        f"{page.name}: {len(html.encode()) / 1000:.1f} kB "
        f"({len(gzip.compress(html.encode())) / 1000:.1f} kB gzipped), of which "
        f"{sum(len(chart.encode()) for chart in charts) / 1000:.1f} kB in {len(charts)} <svg>; "
        f"first {seconds[0]:.3f} s, then {statistics.median(seconds[1:]):.3f} s"
    )


if __name__ == "__main__":
    main()
