"""The comparison page: its numbers are the file's, a collapsed method never wins, what is missing
is a sentence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comparison_files import METHODS, comparison, estimate, examples, write_comparison
from neat_align.errors import ConfigError, DataError
from neat_align.reporting.comparison_charts import (
    css_of,
    frontier,
    frontier_figure,
    gain_charts,
    gain_figure,
    gain_span,
    shape_of,
)
from neat_align.reporting.comparison_files import Estimate, Wins, read_comparison
from neat_align.reporting.comparison_report import verdict, write_comparison_report
from neat_align.reporting.comparison_tables import (
    gain_table,
    leaders,
    win_bars,
    win_matrix,
    wins_between,
)
from neat_align.reporting.comparison_warnings import warnings_of
from pages import (
    BREAKOUT,
    HOSTILE,
    Page,
    assert_escaped,
    assert_sealed,
    corners_of,
    ends_of,
    marks_of,
    place_of,
)

pytestmark = pytest.mark.usefixtures("drawn_once")

Facts = dict[str, Any]


def row_of(facts: Facts, method: str) -> Facts:
    found: Facts = next(r for r in facts["table"] if r["method"] == method)
    return found


def page_of(
    folder: Path, facts: Facts | None = None, answered: list[Facts] | None = None
) -> tuple[str, Page]:
    html = write_comparison_report(write_comparison(folder, facts, answered)).read_text(
        encoding="utf-8"
    )
    return html, Page(html)


def read(folder: Path, facts: Facts) -> Any:
    return read_comparison(write_comparison(folder, facts, []))


def test_a_whole_comparison(tmp_path: Path) -> None:
    html, page = page_of(tmp_path)
    facts, shown = comparison(), page.words
    for r in facts["table"][1:]:
        for side in ("at_budget", "at_equal_kl"):
            for e in ((r[side] or {}).get("reward"), (r[side] or {}).get("judges/minilm_tone")):
                digits = 3 if e and "judges" in str(e) else 2
                if e:
                    assert f"{e['mean']:.{digits}f}" in shown
        assert f"{round(100 * r['wins']['base']['win'])} % won" in shown.replace("\u00a0", " ")
    reward = row_of(facts, "neat")["at_budget"]["reward"]
    assert f"+{reward['delta']:.2f} [{reward['low']:.2f}, {reward['high']:.2f}]" in shown.replace(
        "\u00a0", " "
    )
    assert "× 1.03" in shown.replace("\u00a0", " ")
    assert "SmolLM2-135M-Instruct" in shown
    assert "0123abc" in page.folded
    assert "learning_rate=2e-4, seed 2" in page.folded
    assert html.count('class="case"') == 24
    assert [o for o in ("base", *METHODS) if html.count(f'data-side="{o}"') != 24] == []
    assert_sealed(html)


def test_the_page_is_the_same_twice_and_replaces_the_old_one_whole(tmp_path: Path) -> None:
    first = page_of(tmp_path)[0]
    assert page_of(tmp_path)[0] == first
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "comparison.html",
        "comparison.json",
        "examples.json",
    ]


# ---- the verdict ---------------------------------------------------------------------------------


def test_the_headline_at_equal_kl(tmp_path: Path) -> None:
    outcome = verdict(read(tmp_path, comparison()))
    assert outcome.best == "neat"
    assert (
        outcome.sentence.replace("\u00a0", " ")
        == "neat has the largest gain at equal KL, +0.12 [0.09, 0.15]"
    )
    assert len(outcome.sentence.split()) <= 12
    notes = " ".join(outcome.notes).replace("\u00a0", " ")
    assert "The gain is over base, in reward (vader). Equal KL is where" in notes
    assert "as far from base, 0.015 nats per token." in notes
    # dpo's [0.04, 0.10] reaches 0.09.
    assert "This comparison does not put neat-pp and dpo behind it." in notes
    assert "minilm_tone, which training never saw, agrees: +0.035 [0.015, 0.055]" in notes
    assert "At equal budget it gains +0.17 [0.13, 0.21]" in notes


def test_few_prompts_stand_in_the_headline(tmp_path: Path) -> None:
    facts = comparison()
    for prompts, sentence in (
        (29, "neat has the largest gain, +0.12 on 29 prompts"),
        (30, "neat has the largest gain at equal KL, +0.12 [0.09, 0.15]"),
    ):
        facts["budget"]["held_out_prompts"] = prompts
        assert verdict(read(tmp_path, facts)).sentence.replace("\u00a0", " ") == sentence


def test_a_method_clearly_ahead_is_said_to_be(tmp_path: Path) -> None:
    facts = comparison()
    row_of(facts, "neat")["at_equal_kl"]["reward"] = estimate(0.8, 0.5, 0.05)
    outcome = verdict(read(tmp_path, facts))
    assert "neat gains most at equal KL" in outcome.sentence
    assert "It is ahead of every other method beyond the intervals." in outcome.notes


def test_a_rival_that_gains_nothing_for_sure_is_not_beaten_by_that(tmp_path: Path) -> None:
    """Its interval includes 0 and the winner's does not: that alone does not put it behind."""
    facts = comparison()
    row_of(facts, "neat")["at_equal_kl"]["reward"] = estimate(0.8, 0.10, 0.05)
    for name in METHODS:
        if name != "neat" and row_of(facts, name)["at_equal_kl"] is not None:
            row_of(facts, name)["at_equal_kl"]["reward"] = estimate(0.8, 0.04, 0.09)
    c = read(tmp_path, facts)
    assert leaders(c, "at_equal_kl", "reward") == ["neat"]
    outcome = verdict(c)
    assert "neat has the largest gain at equal KL" in outcome.sentence
    assert "It is ahead of every other method beyond the intervals." not in outcome.notes
    assert any(
        note.startswith("This comparison does not put") and note.endswith("behind it.")
        for note in outcome.notes
    )


def test_the_paired_difference_decides_where_it_is_known(tmp_path: Path) -> None:
    facts = comparison()
    # neat-pp's interval meets neat's, and the difference prompt by prompt is clear; with dpo it is
    # not.
    row_of(facts, "neat")["against"] = {
        "neat-pp": {
            "at_budget": None,
            "at_equal_kl": {"reward": {"delta": 0.03, "low": 0.01, "high": 0.05}},
        },
        "dpo": {
            "at_budget": None,
            "at_equal_kl": {"reward": {"delta": 0.05, "low": -0.01, "high": 0.11}},
        },
    }
    c = read(tmp_path, facts)
    assert leaders(c, "at_equal_kl", "reward") == ["neat", "dpo"]
    assert leaders(c, "at_budget", "reward") == ["neat", "neat-pp", "dpo"]
    assert "This comparison does not put dpo behind it." in verdict(c).notes


def test_a_gain_without_a_mean_is_shown(tmp_path: Path) -> None:
    facts = comparison()
    del row_of(facts, "neat")["at_budget"]["length_controlled_reward"]["mean"]
    cells = {t.name: line for t, line in gain_table(read(tmp_path, facts))["lines"]}["neat"]
    assert cells[3].text.replace("\u00a0", " ") == "+0.15 [0.10, 0.20]"


def test_a_collapsed_method_never_wins(tmp_path: Path) -> None:
    facts = comparison()
    row_of(facts, "neat")["collapsed"] = 1
    _, page = page_of(tmp_path, facts)
    c = read_comparison(tmp_path)
    assert verdict(c).best == "neat-pp"
    gains = {t.name: cells for t, cells in gain_table(c)["lines"]}
    assert not any(cell.lead for name in ("neat", "raft-hot") for cell in gains[name])
    assert gains["neat-pp"][1].lead
    cells = [
        (t.name, other, cell)
        for t, line in win_matrix(c)
        for other, cell in zip(c.methods, line, strict=True)
    ]
    sides = {cell["css"] for method, other, cell in cells if cell and "neat" in (method, other)}
    assert sides == {"fallen"}
    assert page.shown.count("collapsed") >= 2 * 4
    for r in facts["table"]:
        r["collapsed"] = 1
    assert (
        verdict(read(tmp_path, facts)).sentence
        == "This comparison has no winner: every method collapsed"
    )


NOBODY = "No method is shown to beat base at equal budget"
LARGEST = "The largest gain in reward (vader), neat’s "


@pytest.mark.parametrize(
    ("changed", "sentence", "note"),
    [
        ({"low": -0.01}, NOBODY, f"{LARGEST}+0.17 [−0.01, 0.21], has an interval that includes 0."),
        ({"low": None}, NOBODY, f"{LARGEST}+0.17, has no interval."),
        (
            {},
            "neat has the largest gain at equal budget, +0.17 [0.13, 0.21]",
            "The gain is over base, in reward (vader).",
        ),
    ],
)
def test_without_a_common_kl_the_budget_decides(
    tmp_path: Path, changed: Facts, sentence: str, note: str
) -> None:
    facts = comparison() | {"kl_target": None}
    for r in facts["table"]:
        r["at_equal_kl"] = None
    row_of(facts, "neat")["at_budget"]["reward"] |= changed
    _, page = page_of(tmp_path, facts)
    outcome = verdict(read_comparison(tmp_path))
    assert outcome.sentence.replace("\u00a0", " ") == sentence
    assert outcome.notes[0].replace("\u00a0", " ") == note
    assert "No KL was reached by all methods" in page.words


# ---- warnings ------------------------------------------------------------------------------------

Change = Callable[[Facts], object]


def in_budget(method: str, metric: str, **values: Any) -> Change:
    return lambda facts: row_of(facts, method)["at_budget"][metric].update(values)


def calm() -> Facts:
    """A comparison without anything to warn of: neat alone, on three seeds."""
    facts = comparison()
    for part in ("runs", "table", "frontier"):
        facts[part] = [x for x in facts[part] if x["method"] in ("base", "neat", "neat-pp")]
    facts["methods"] = [m for m in facts["methods"] if m["name"] in ("base", "neat", "neat-pp")]
    return facts


def run_of(facts: Facts, seed: int) -> Facts:
    found: Facts = next(r for r in facts["runs"] if r["method"] == "neat" and r["seed"] == seed)
    return found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda facts: None, []),
        (lambda facts: run_of(facts, 1).update(collapsed="one answer"), ["collapsed"]),
        (lambda facts: row_of(facts, "neat").update(collapsed=1), ["collapsed"]),
        (lambda facts: facts.update(seeds=[0, 1]), ["seeds"]),
        (lambda facts: facts["runs"].remove(run_of(facts, 2)), ["budget"]),
        (lambda facts: run_of(facts, 2)["points"].pop(), ["budget"]),
        (
            lambda facts: [
                r.update(trained_tokens=99_999) for r in facts["runs"] if r["method"] == "neat"
            ],
            ["budget"],
        ),
        (lambda facts: facts.update(kl_target=None), ["kl"]),
        (in_budget("neat", "mean_length", ratio=1.16), ["length"]),
        (in_budget("neat", "mean_length", ratio=0.84), ["length"]),
        (in_budget("neat", "mean_length", ratio=1.14), []),
        (in_budget("neat", "perplexity", ratio=1.06), ["perplexity"]),
        (in_budget("neat", "perplexity", ratio=1.04), []),
        (in_budget("neat", "distinct2", ratio=0.89), ["distinct2"]),
        (in_budget("neat", "reward", low=-0.01), ["interval"]),
        (in_budget("neat", "reward", low=0.0), ["interval"]),
        (in_budget("neat", "reward", delta=-0.2, low=-0.3, high=-0.1), ["reward"]),
        (in_budget("neat", "judges/minilm_tone", delta=-0.02), ["judge"]),
    ],
)
def test_warnings_when_and_only_when_they_hold(
    tmp_path: Path, change: Change, expected: list[str]
) -> None:
    facts = calm()
    change(facts)
    _, page = page_of(tmp_path, facts)
    assert [key for key, _ in warnings_of(read_comparison(tmp_path))] == expected
    assert [value for _, name, value in page.attributes if name == "data-warning"] == expected
    assert ("Read with care" in page.shown) == bool(expected)


def test_collapses_are_told_with_their_seeds_and_reason(tmp_path: Path) -> None:
    told = [text for key, text in warnings_of(read(tmp_path, comparison())) if key == "collapsed"]
    assert told == [
        "raft-hot (learning_rate=2e-4) collapsed on seeds 0 and 2: one answer to every prompt: "
        "distinct-2 fell to 12 % of the start's."
    ]


# ---- pictures and tables -------------------------------------------------------------------------


def near(place: tuple[float, float]) -> Any:
    """A place, but for the rounding of the numbers in the page."""
    return pytest.approx(place, abs=0.2)


def test_the_frontier_starts_at_base_and_keeps_the_order_of_the_numbers(tmp_path: Path) -> None:
    facts = comparison()
    c = read(tmp_path, facts)
    f = frontier(c, "reward", "reward")
    assert f is not None
    assert f.square_root  # the collapsed method lies at 0.18 nats, the others near 0.03
    assert f.base is not None
    assert (f.base.mean, f.target) == (0.31, 0.015)
    svg = frontier_figure(c, f).svg
    *marks, base = marks_of(svg, "mark")
    points = [p for curve in facts["frontier"] for p in curve["points"]]
    far = max(range(len(points)), key=lambda i: points[i]["kl"])
    (left, level), (right, top) = place_of(base), place_of(marks[far])
    x_unit = (right - left) / math.sqrt(points[far]["kl"])
    y_unit = (top - level) / (points[far]["reward"]["mean"] - 0.31)
    assert left == 0
    assert x_unit > 0 > y_unit

    def at(kl: float, reward: float) -> tuple[float, float]:
        return left + x_unit * math.sqrt(kl), level + y_unit * (reward - 0.31)

    assert [ends_of(line)[0][0] for line in marks_of(svg, "target")] == [
        pytest.approx(at(0.015, 0)[0], abs=0.2)
    ]
    assert [min(ends_of(line)) for line in marks_of(svg, "at_base")] == [near(at(0, 0.31))]
    paths = [corners_of(path) for path in marks_of(svg, "through")]
    assert len(paths) == len(facts["frontier"])
    for path, curve in zip(paths, facts["frontier"], strict=True):
        expected = [at(p["kl"], p["reward"]["mean"]) for p in curve["points"]]
        assert path == [near(place) for place in [at(0, 0.31), *expected]]
    uprights, levels = marks_of(svg, "spread"), marks_of(svg, "kl_spread")
    for mark, upright, across, p in zip(marks, uprights, levels, points, strict=True):
        kl, reward = p["kl"], p["reward"]
        assert place_of(mark) == near(at(kl, reward["mean"]))
        assert sorted(ends_of(upright)) == [
            near(at(kl, reward["high"])),
            near(at(kl, reward["low"])),
        ]
        assert sorted(ends_of(across)) == [
            near(at(p["kl_low"], reward["mean"])),
            near(at(p["kl_high"], reward["mean"])),
        ]
        hollow = "var(--paper)"
        assert (mark.get("fill") == hollow) == p["collapsed"]
        note = mark.findtext("title") or ""
        assert f": {reward['mean']:.3f} [" in note
        assert note.endswith(", collapsed") == p["collapsed"]


def test_every_method_has_its_own_shape_and_colour(tmp_path: Path) -> None:
    facts = comparison()
    facts["methods"] = [{"name": "base"}, *({"name": f"m{i}"} for i in range(20))]
    c = read(tmp_path, facts | {"table": [], "runs": [], "frontier": []})
    looks = [(css_of(c, m), shape_of(c, m)) for m in c.methods]
    assert len(set(looks)) == 21
    assert len({shape for _, shape in looks[:9]}) == 9
    assert len({css for css, _ in looks[:9]}) == 9


def test_gains_share_a_scale_that_holds_zero(tmp_path: Path) -> None:
    span = gain_span([Estimate(delta=0.2, low=0.1, high=0.3), Estimate(delta=0.4)])
    assert span[0] < 0 < 0.4 < span[1]
    facts = comparison()
    row_of(facts, "neat-pp")["at_budget"]["reward"] |= {"low": None}
    c = read(tmp_path, facts)
    charts = gain_charts(c, [("reward", "reward"), ("judges/minilm_tone", "judge")])
    assert [(chart.title, chart.where, len(chart.gains)) for chart in charts] == [
        ("reward", "at equal budget", 5),
        ("reward", "at equal KL", 4),
        ("judge", "at equal budget", 5),
        ("judge", "at equal KL", 4),
    ]
    for chart in charts:
        low, high = chart.span
        assert all(low < e.delta < high for e in chart.gains.values())
        assert all(low < e.low < e.high < high for e in chart.gains.values() if e.low is not None)
    assert charts[0].span == charts[1].span
    assert charts[2].span == charts[3].span
    svg = gain_figure(c, charts[0]).svg
    ((zero, _), _) = ends_of(marks_of(svg, "zero")[0])
    marks, intervals = marks_of(svg, "mark"), marks_of(svg, "interval")
    assert (len(marks), len(intervals)) == (5, 4)  # half an interval says nothing
    gains = {m: row_of(facts, m)["at_budget"]["reward"] for m in METHODS}
    unit = (place_of(marks[0])[0] - zero) / gains["neat"]["delta"]
    for mark, e in zip(marks, gains.values(), strict=True):
        assert place_of(mark)[0] == pytest.approx(zero + unit * e["delta"], abs=0.2)
    (low, y), (high, _) = sorted(ends_of(intervals[0]))
    assert (low, high) == near((zero + unit * 0.13, zero + unit * 0.21))
    assert y == pytest.approx(place_of(marks[0])[1], abs=0.2)


def test_wins_are_read_from_either_side(tmp_path: Path) -> None:
    facts = comparison()
    del row_of(facts, "neat-pp")["wins"]["neat"]
    c = read(tmp_path, facts)
    there, back = wins_between(c, "neat", "neat-pp"), wins_between(c, "neat-pp", "neat")
    assert there is not None
    assert back == Wins(there.lose, there.tie, there.win, -(there.high or 0), -(there.low or 0))
    matrix = {t.name: dict(zip(c.methods, cells, strict=True)) for t, cells in win_matrix(c)}
    assert matrix["neat"]["neat"] is None
    assert (matrix["neat"]["base"] or {})["css"] == "ahead"
    assert (matrix["base"]["neat"] or {})["css"] == "behind"
    assert (
        (matrix["neat"]["neat-pp"] or {})["css"]
        == (matrix["neat-pp"]["neat"] or {})["css"]
        == "even"
    )
    assert (matrix["neat"]["base"] or {})["net"] == "+37"
    assert [b["tag"].name for b in win_bars(c)] == list(METHODS)


# ---- hostile, missing, damaged -------------------------------------------------------------------


def poisoned(value: Any, text: str) -> Any:
    """The same data with hostile text in every text and every key that is a name."""
    if isinstance(value, dict):
        return {k: poisoned(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, text) for v in value]
    return f"{value}{text}" if isinstance(value, str) else value


def test_everything_is_escaped(tmp_path: Path) -> None:
    text = HOSTILE + BREAKOUT
    facts = poisoned(comparison(), text)
    for m in facts["methods"]:
        m["settings"] = {f"setting{text}": f"value{text}"}
    facts["versions"] = {f"version{text}": text}
    answered = poisoned(examples(), text)
    for x in answered:
        x["answers"] = {f"{m}{text}": answer for m, answer in x["answers"].items()}
    facts["judges"] = ["minilm_tone"]
    html, page = page_of(tmp_path, facts, answered)
    assert_escaped(html)
    assert_sealed(html)
    for marker in ("neat", "demo", "vader", "Could you look over my cover letter?", "user"):
        assert any(f"{marker}{text}" in shown for shown in page.shown), marker
    assert any(f"setting{text}" in folded for folded in page.folded)


def test_surrogates_and_overrides_do_not_break_the_page(tmp_path: Path) -> None:
    html, _ = page_of(
        tmp_path,
        answered=[{"prompt": "p", "answers": {"base": "a\ud800b\x00c\u202ed"}, "rewards": {}}],
    )
    assert "a\ufffdb\ufffdc\ufffdd" in html


@pytest.mark.parametrize("name", sorted(comparison().keys() - {"format"}))
def test_a_missing_piece_is_no_error(tmp_path: Path, name: str) -> None:
    facts = comparison()
    del facts[name]
    assert_sealed(page_of(tmp_path, facts)[0])
    assert_sealed(page_of(tmp_path, comparison() | {name: None})[0])


def hollow(value: Any) -> Any:
    """The same data with null for every number but the format."""
    if isinstance(value, dict):
        return {k: v if k == "format" else hollow(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hollow(v) for v in value]
    return None if isinstance(value, int | float) else value


def test_any_number_may_be_null(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, hollow(comparison()), hollow(examples()))
    assert "This comparison has no winner" in page.words
    assert "None" not in page.words
    assert "None" not in " ".join(page.folded)


def test_nothing_but_the_format(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, {"format": 1}, [])
    for sentence in (
        "no table of rewards",
        "Nothing but rewards was measured",
        "There are no curves",
        "no win rates",
        "examples.json is not there",
    ):
        assert sentence in page.words


def test_not_a_number_is_a_dash(tmp_path: Path) -> None:
    text = re.sub(
        r'"distinct2": [\d.]+',
        '"distinct2": Infinity',
        json.dumps(comparison()).replace('"ratio": 1.03', '"ratio": NaN'),
    )
    assert "NaN" in text
    assert "Infinity" in text
    write_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text(text)
    words = Page(write_comparison_report(tmp_path).read_text()).words.lower().split()
    assert not {"nan", "inf", "infinity"} & set(words)


def test_a_folder_without_a_comparison_and_a_file_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"holds no comparison.json: give the folder that `neat-align compare` wrote to",
    ):
        write_comparison_report(tmp_path)
    for text, message in (
        ("[1", "is not JSON"),
        ("[1]", "came a list, needed a mapping of format 1"),
        ('{"format": 2}', "came format 2"),
    ):
        (tmp_path / "comparison.json").write_text(text)
        with pytest.raises(DataError, match=message):
            write_comparison_report(tmp_path)
    assert not (tmp_path / "comparison.html").exists()


def test_damaged_examples_are_named_and_left_out(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    (tmp_path / "examples.json").write_text("[{")
    page = Page(write_comparison_report(tmp_path).read_text())
    assert "examples.json could not be read and is left out." in page.words
    (tmp_path / "examples.json").unlink()
    assert "examples.json is not there" in Page(write_comparison_report(tmp_path).read_text()).words
