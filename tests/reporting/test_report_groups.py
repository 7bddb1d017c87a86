"""What the report makes of the groups: bands, boxes, and the contrast of each pair of instructions,
against numpy and by hand.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import fmean, median
from xml.etree import ElementTree

import numpy as np
import pytest

from neat_align.reporting import run_report as report
from neat_align.reporting.charts import box_figure, line_figure
from neat_align.reporting.round_rewards import spread_of_mean
from neat_align.reporting.run_files import RunContents, read_run
from neat_align.reporting.run_groups import distributions, instruction_rows
from neat_align.reporting.run_report import write_report
from pages import Page, corners_of, ends_of, marks_of, place_of
from run_files import PAIRS_DRAWN, build_run, contrast_group, report_round


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("run"))


def test_instructions_are_measured_pair_by_pair() -> None:
    works, idle, turned, seldom = (
        ("Be kind.", "Be rude."),
        ("Be brief.", "Be long."),
        ("Be bad.", "Be good."),
        ("Be calm.", "Be loud."),
    )
    first = [contrast_group(i, works, [0.5 + 0.01 * i, 0.7], [0.1, 0.2]) for i in range(10)]
    first += [contrast_group(i, idle, [0.3], [0.3 + (-1) ** i * 0.2]) for i in range(10)]
    last = [contrast_group(i, works, [0.5, 0.2], [0.4, 0.3]) for i in range(5)]
    last += [contrast_group(i, turned, [0.1], [0.4 + 0.01 * i]) for i in range(6)]
    last += [contrast_group(0, seldom, [0.9], [0.1])]
    rows = instruction_rows(
        RunContents("x", rounds=[report_round("00000", first), report_round("00001", last)])
    )
    assert [(r.positive, r.negative, r.prompts, r.verdict) for r in rows] == [
        (*seldom, 1, "even"),
        (*works, 15, "ahead"),
        (*idle, 10, "even"),
        (*turned, 6, "behind"),
    ]
    gaps = [(0.5 + 0.01 * i + 0.7) / 2 - 0.15 for i in range(10)] + [0.0] * 5
    assert rows[1].gap == pytest.approx(sum(gaps) / 15)
    assert rows[1].last_gap == pytest.approx(0.0)
    assert rows[1].under_positive == pytest.approx(
        (sum((0.5 + 0.01 * i + 0.7) / 2 for i in range(10)) + 5 * 0.35) / 15
    )
    assert rows[1].under_negative == pytest.approx((10 * 0.15 + 5 * 0.35) / 15)
    # Of four pairs a prompt of the last round: 0.2 is below both negatives, 0.5 above both.
    assert rows[1].inversion == pytest.approx(5 * 2 / (15 * 4))
    # The percentile bootstrap against the interval of the mean by the normal approximation.
    low, high = spread_of_mean(gaps, 1.96) or (0.0, 0.0)
    assert (rows[1].low, rows[1].high) == (
        pytest.approx(low, abs=0.04),
        pytest.approx(high, abs=0.04),
    )
    assert (rows[0].low, rows[0].last_gap, rows[2].last_gap) == (None, pytest.approx(0.8), None)


def test_the_page_shows_the_instructions_and_folds_the_negative_ones(run_dir: Path) -> None:
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    rows = instruction_rows(read_run(run_dir))
    assert [(r.positive, r.negative) for r in rows] in (list(PAIRS_DRAWN), list(PAIRS_DRAWN)[::-1])
    for row in rows:
        assert row.positive in page.shown
        assert row.negative in page.folded
        assert f"▲ +{row.gap:.2f}" in page.words
        assert f"[{row.low:.2f}, {row.high:.2f}]" in page.words.replace("\u00a0", " ")


def test_a_band_is_one_standard_error_over_prompts(run_dir: Path) -> None:
    run = read_run(run_dir)
    drawn = next(c for c in report.charts(run) if c.title == "Reward of what is sampled")
    line = next(s for s in drawn.series if s.name == "negative")
    assert len(line.band) == 3
    rewards = [
        [c.reward for c in g.completions if c.origin == "negative"] for g in run.rounds[0].groups
    ]
    means = np.array(rewards, dtype=float).mean(axis=1)
    error = means.std(ddof=1) / math.sqrt(len(means))
    assert line.band[0] == pytest.approx((0.0, means.mean() - error, means.mean() + error))
    bands = marks_of(line_figure(drawn).svg, "band")
    colours = ["positive", "negative", "chosen", "rejected"]
    assert [band.get("fill") for band in bands] == [f"var(--{name})" for name in colours]
    assert [len(corners_of(band)) for band in bands] == [6] * 4


def test_the_held_out_reward_has_an_interval_before_and_after(run_dir: Path) -> None:
    run = read_run(run_dir)
    held_out = report.charts(run)[0]
    assert held_out.title == "Held-out reward"
    bars = held_out.series[0].bars
    for bar, x, side in zip(bars, (0, 3), (run.before, run.after), strict=True):
        rewards = np.array(side["rewards"])
        half = 1.96 * rewards.std(ddof=1) / math.sqrt(len(rewards))
        assert bar == pytest.approx((x, rewards.mean() - half, rewards.mean() + half))
    svg = line_figure(held_out).svg
    dots = [place_of(dot) for dot in marks_of(svg, "dot")]
    for bar, (x, y) in zip(marks_of(svg, "bar"), (dots[0], dots[-1]), strict=True):
        (_, top), (_, bottom) = sorted(ends_of(bar), key=lambda end: end[1])
        assert ends_of(bar)[0][0] == pytest.approx(x, abs=0.2)
        assert (top + bottom) / 2 == pytest.approx(y, abs=0.5)
        assert bottom - top > 5


def test_boxes_are_the_percentiles(run_dir: Path) -> None:
    run = read_run(run_dir)
    drawn = distributions(run)
    assert [d.title for d in drawn] == ["positive", "negative", "chosen", "rejected"]
    for d in drawn:
        assert d.names == ("0", "1", "2")
        for i, box in enumerate(d.boxes):
            values = [
                c.reward for g in run.rounds[i].groups for c in g.completions if c.origin == d.title
            ]
            expected = np.percentile(np.array(values, dtype=float), [5, 25, 50, 75, 95])
            assert box.percentiles == pytest.approx(expected)
            assert (box.count, len(box.strip)) == (len(values), len(values))
    assert len({d.span for d in drawn}) == 1


def middle_of(box: ElementTree.Element) -> tuple[float, float]:
    """The middle of a rectangle, which is a path that goes right, down and back."""
    place = re.match(r"M([\d.]+),([\d.]+)h([\d.]+)v([\d.]+)h", str(box.get("d")))
    assert place is not None
    x, y, width, height = map(float, place.groups())
    return x + width / 2, y + height / 2


def test_a_box_is_drawn_around_its_strip(run_dir: Path) -> None:
    drawn = distributions(read_run(run_dir))[0]
    svg = box_figure(drawn).svg
    middles = [middle_of(mark) for mark in marks_of(svg, "median")]
    (strip,) = marks_of(svg, "strip")
    dots = corners_of(strip)
    assert len(dots) == sum(len(box.strip) for box in drawn.boxes)
    for i, (x, y) in enumerate(middles):
        own = dots[24 * i : 24 * (i + 1)]
        assert fmean(dot_x for dot_x, _ in own) == pytest.approx(x, abs=3)
        assert max(abs(dot_x - x) for dot_x, _ in own) <= 17
        assert median(dot_y for _, dot_y in own) == pytest.approx(y, abs=0.3)
    boxes = [middle_of(mark) for mark in marks_of(svg, "box")]
    assert [x for x, _ in boxes] == pytest.approx([x for x, _ in middles], abs=0.2)


def test_a_long_run_shows_its_first_and_last_round() -> None:
    groups = [contrast_group(0, ("a", "b"), [0.5], [0.1])]
    drawn = distributions(
        RunContents("x", rounds=[report_round(f"{i:05d}", groups) for i in range(31)])
    )
    names = drawn[0].names
    assert (len(names), names[0], names[-1]) == (8, "0", "30")
    assert ">30</text>" in box_figure(drawn[0]).svg
