"""The numbers that people read are the numbers in the result files, and they keep the promise that
the README makes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks" / "results"
SEEDS = sorted((ROOT / "docs" / "results").glob("demo-seed*.json"))


def table(script: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return (
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        .stdout.strip()
        .splitlines()
    )


def lines_of(*document: str) -> list[str]:
    return ROOT.joinpath(*document).read_text(encoding="utf-8").splitlines()


def test_the_results_show_the_committed_demo_runs() -> None:
    shown = lines_of("docs", "results.md")
    for line in table("demo_table.py", *map(str, SEEDS)):
        assert line in shown


def test_the_results_show_the_committed_benchmarks() -> None:
    shown = lines_of("docs", "results.md")
    for line in table("bench_table.py", str(BENCHMARKS)):
        assert line in shown


def test_the_results_show_what_the_speed_goals_were_held_against() -> None:
    shown = lines_of("docs", "results.md")
    for line in table("speed_goals.py"):
        assert line in shown


def test_the_readme_shows_committed_numbers_only() -> None:
    shown = lines_of("README.md")
    tables = [
        *table("bench_table.py", str(BENCHMARKS), "--readme"),
        *table("compare_table.py", "docs/results/compare-frontier.json", "--readme"),
    ]
    for line in tables:
        assert line in shown
    # No other table of the README holds a number.
    others = [line for line in shown if line.startswith("|") and line not in tables]
    assert not [line for line in others if re.search(r"\d", line)]


def test_the_experiments_show_the_committed_grid() -> None:
    shown = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").splitlines()
    for line in table("bench_table.py", str(BENCHMARKS), "--grid"):
        assert line in shown


def test_the_results_show_the_committed_comparison() -> None:
    shown = lines_of("docs", "results.md")
    for line in table("compare_table.py", "docs/results/compare-frontier.json", "--short"):
        assert line in shown


def test_the_experiments_show_the_committed_comparisons() -> None:
    shown = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").splitlines()
    for path in sorted((ROOT / "docs" / "results").glob("compare-*.json")):
        for line in table("compare_table.py", str(path)):
            assert line in shown, path.name
        commit = json.loads(path.read_text(encoding="utf-8"))["commit"]
        assert re.fullmatch(r"[0-9a-f]{12}", commit), "a result must come from a clean commit"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.json")), ids=lambda p: p.stem)
def test_every_benchmark_says_where_it_comes_from(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch(r"[0-9a-f]{12}", result["commit"]), "a result must come from a clean commit"
    assert {"torch", "transformers", "python"} <= result["versions"].keys()
    assert result["machine"]["threads"] >= 1


@pytest.mark.parametrize("path", SEEDS, ids=lambda p: p.stem)
def test_every_committed_demo_run_gained_without_collapse(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["reward_delta_ci95"][0] > 0
    assert result["distinct2_after"] >= 0.9 * result["distinct2_before"]
    assert result["perplexity_after"] <= 1.05 * result["perplexity_before"]
    assert abs(result["mean_length_after"] / result["mean_length_before"] - 1) <= 0.15
    assert result["second_judge_delta"] >= 0
    assert result["wall_seconds"] < 360
    assert result["peak_rss_bytes"] < 6 * 2**30
    assert re.fullmatch(r"[0-9a-f]{12}", result["commit"]), "a result must come from a clean commit"


def test_three_seeds_are_committed() -> None:
    assert {json.loads(p.read_text(encoding="utf-8"))["seed"] for p in SEEDS} >= {0, 1, 2}


def test_the_documents_name_files_that_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        text = document.read_text(encoding="utf-8")
        assert "@@" not in text, document
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
        for name in re.findall(r"`((?:docs|scripts|tests|src)/[\w./-]+\.\w+)`", text):
            assert (ROOT / name).exists(), f"{document.name} names {name}"
