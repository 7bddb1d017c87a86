"""Of several rewards each one is shown wherever their sum is: report, browsing, console."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from neat_align.cli.tables import print_result, result_table
from neat_align.evaluation.before_after import before_after
from neat_align.files.atomic import read_json, write_json
from neat_align.reporting.run_files import read_run
from neat_align.reporting.run_report import write_report
from neat_align.reporting.run_tables import before_after_rows, single_reward_rows
from neat_align.reporting.terminal import browse
from pages import Page
from run_files import build_run, change_json, fake_evaluation, fake_group, write_round

NAMES = ["tone", "brevity"]


def two_rewards(value: float) -> tuple[float, float]:
    return (value + 1, value - 1)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two rewards, whose sum is the reward: tone is 1 above it, brevity 1 below."""
    folder = build_run(tmp_path_factory.mktemp("several"), rounds=1)
    rng, groups = random.Random(3), []
    for i in range(6):
        group = fake_group(i, 0, rng)
        completions = tuple(
            replace(c, reward_components=two_rewards(c.reward or 0.0)) for c in group.completions
        )
        groups.append(replace(group, completions=completions))
    write_round(folder / "rounds" / "00000", 0, groups, NAMES)
    sides = []
    for level, seed in ((0.31, 1), (0.52, 2)):
        made = fake_evaluation(40, level, seed, kl=0.1)
        scores: dict[str, list[float | None]] = {
            name: [(r or 0.0) + shift for r in made.rewards]
            for name, shift in (("tone", 1.0), ("brevity", -1.0))
        }
        third: list[float | None] = [0.25 * seed] * 40
        sides.append(replace(made, by_reward=scores, judges=made.judges | {"third": third}))
    result = read_json(folder / "result.json") | before_after(*sides)
    write_json(folder / "result.json", result | {"dataset": "mine.jsonl"})
    return folder


def printed(what: Any) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_before_and_after_of_each(run_dir: Path) -> None:
    result = read_json(run_dir / "result.json")
    of_sum = result["reward_delta"]
    for name, shift in (("tone", 1.0), ("brevity", -1.0)):
        found = result["by_reward"][name]
        assert found["before"] == pytest.approx(result["reward_before"] + shift)
        assert found["delta"] == pytest.approx(of_sum)
        assert found["delta_ci95"] == pytest.approx(result["reward_delta_ci95"])
    third = result["by_judge"]["third"]
    assert third == {"before": 0.25, "after": 0.5, "delta": 0.25, "delta_ci95": [0.25, 0.25]}


def test_the_report_has_each_and_the_name_of_the_data(run_dir: Path) -> None:
    labels = [row[0] for row in before_after_rows(read_run(run_dir))]
    assert labels[:5] == [
        "Reward, weighted sum of 2",
        "Reward: tone",
        "Reward: brevity",
        "Second judge: vader",
        "Judge: third",
    ]
    names, rows = single_reward_rows(read_run(run_dir))
    metrics = read_run(run_dir).rounds[0].metrics
    assert names == NAMES
    assert rows == [("00000", [metrics[f"rewards/{name}/mean"] for name in NAMES])]
    words = Page(write_report(run_dir).read_text(encoding="utf-8")).words
    assert "Each reward" in words
    assert "Data mine.jsonl" in words


def test_the_console_has_each_within_80_columns(run_dir: Path) -> None:
    shown = printed(result_table(read_json(run_dir / "result.json")))
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    assert any(line.startswith("reward, weighted sum of 2 0.") for line in lines)
    assert any(line.startswith("tone 1.") for line in lines)
    assert any(line.startswith("brevity -0.") for line in lines)
    assert any(line.startswith("judge (third) 0.25 0.5 +0.250") for line in lines)
    assert max(map(len, shown.splitlines())) <= 80


def test_browsing_has_each(run_dir: Path) -> None:
    console = Console(width=80, file=io.StringIO())
    browse(run_dir, limit=1, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    best = max(
        (c for g in read_run(run_dir).rounds[0].groups[:1] for c in g.completions),
        key=lambda c: c.reward or 0.0,
    )
    tone, brevity = two_rewards(best.reward or 0.0)
    assert f"tone {tone:.3f} · brevity {brevity:.3f}" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith("00000")]
    of_sum = [float(v) for v in rows[0][3:-1]]
    assert [row[1] for row in rows[1:]] == NAMES
    for row, shift in zip(rows[1:], (1, -1), strict=True):
        assert [float(v) for v in row[2:]] == pytest.approx([v + shift for v in of_sum], abs=2e-3)
    assert max(map(len, shown.splitlines())) <= 80


def test_one_reward_is_not_said_twice(tmp_path: Path) -> None:
    folder = build_run(tmp_path, rounds=1)
    assert next(iter(before_after_rows(read_run(folder))))[0] == "Reward"
    assert single_reward_rows(read_run(folder)) == ([], [])
    console = Console(width=80, file=io.StringIO())
    browse(folder, limit=1, console=console)
    assert "tone" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_reports_warnings_end_the_console_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = build_run(tmp_path, rounds=1)
    result = read_json(folder / "result.json") | {"steps": 8}
    print_result(result, folder)
    assert "read with care" not in capsys.readouterr().out
    change_json(folder / "result.json", held_out_prompts=12, clipped_after=1.0)
    print_result(result, folder)
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert "read with care - Everything here is measured on 12 held-out prompts: of fewer" in words
    assert "- All answers are cut at the length limit: rewards judge unfinished texts" in words
    assert shown.index("read with care") < shown.index("1 round, 8 steps")
    assert "\u00a0" not in shown
    told = [line for line in shown.splitlines() if str(folder) not in line]
    assert max(map(len, told)) <= 80
