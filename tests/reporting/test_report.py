"""The report: everything escaped, nothing fetched, negatives folded, warnings when and only when
they hold.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neat_align.errors import ConfigError
from neat_align.files.atomic import write_json
from neat_align.reporting import run_report as report
from neat_align.reporting.charts import Series, line_chart, line_figure
from neat_align.reporting.pages import digits_for, plain, signed
from neat_align.reporting.run_files import RunContents, read_run
from neat_align.reporting.run_report import examples, sample_groups, write_report
from neat_align.reporting.run_warnings import warnings_of
from neat_align.rounds.completions import Completion, CompletionGroup
from pages import BREAKOUT, HOSTILE, Page, assert_escaped, assert_sealed, corners_of, marks_of
from run_files import (
    build_run,
    change_json,
    contrast_group,
    fake_group,
    poison,
    report_round,
    write_round,
)

pytestmark = pytest.mark.usefixtures("drawn_once")


@pytest.fixture(scope="module")
def clean_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run_dir(clean_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean_run, tmp_path / "polite-run"))


def page_of(run_dir: Path) -> tuple[str, Page]:
    html = write_report(run_dir).read_text(encoding="utf-8")
    return html, Page(html)


def test_a_whole_run(run_dir: Path) -> None:
    assert write_report(run_dir) == run_dir / "report.html"
    html, page = page_of(run_dir)
    shown = " ".join(" ".join(page.shown).split())
    result = json.loads((run_dir / "result.json").read_text())
    low, high = result["reward_delta_ci95"]
    change = f"+{result['reward_delta']:.2f} [{low:.2f}, {high:.2f}] on 40 prompts"
    assert (
        f"Held-out reward {result['reward_before']:.2f} → {result['reward_after']:.2f}, {change}"
        in shown
    )
    assert "Read with care" not in shown
    for expected in (
        "Perplexity of preferred answers",
        "Second judge: vader",
        "Distinct-2",
        "12 min 34 s",
        "2.0 GiB",
        "Largest gains",
        "Largest losses",
    ):
        assert expected in shown, expected
    assert page.tags.count("svg") == 7 + 4  # curves, and an origin's rewards each
    assert html.count('class="case"') == 40 + 12
    assert "num_train_epochs" in page.folded
    assert "3.11.7" in page.folded
    assert "hf_abcdef" not in html
    assert str(run_dir.parent) not in html


def test_the_report_is_the_same_twice(run_dir: Path) -> None:
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


def test_nothing_is_fetched_or_run_but_our_own_script(run_dir: Path) -> None:
    assert_sealed(page_of(run_dir)[0])


def test_everything_is_escaped(run_dir: Path) -> None:
    poison(run_dir)
    html, page = page_of(run_dir)
    assert_escaped(html)
    assert_sealed(html)
    for marker in ("positive", "chosen", "prompt", "asked", "answered"):
        assert any(f"{HOSTILE}{BREAKOUT} {marker}" in text for text in page.shown), marker
    assert any(f"{HOSTILE}{BREAKOUT} negative" in text for text in page.folded)


def test_the_template_never_switches_escaping_off() -> None:
    templates = [
        path.read_text(encoding="utf-8")
        for path in (Path(report.__file__).parent / "templates").iterdir()
    ]
    assert len(templates) == 6
    assert not [1 for text in templates if re.search(r"\|\s*safe|autoescape false|Markup", text)]


def test_answers_of_bad_origin_are_folded(run_dir: Path) -> None:
    _, page = page_of(run_dir)
    groups = sample_groups(read_run(run_dir))
    assert len(groups) == 12
    shown, folded = "\n".join(page.shown), "\n".join(page.folded)
    for group in groups:
        for _, c in group["completions"]:
            bad = c.origin in ("negative", "rejected")
            assert (c.text in folded) == bad
            assert (c.text in shown) == (not bad)
    assert "Answer rudely." in folded
    assert "Answer rudely." not in shown
    assert page.summaries.count("harmful text by design – show") == 36
    assert not [1 for tag, name, _ in page.attributes if tag == "details" and name == "open"]


def test_ranks_share_ties_and_end_with_what_has_no_reward() -> None:
    rewards = [1.0, 2.0, 2.0, None]
    completions = tuple(
        Completion("positive", i, str(i), (1,), reward=r) for i, r in enumerate(rewards)
    )
    run = RunContents(
        "x", rounds=[report_round("00000", [CompletionGroup("a", "p", (1,), completions)])]
    )
    assert [(rank, c.text) for rank, c in sample_groups(run)[0]["completions"]] == [
        (1, "1"),
        (1, "2"),
        (3, "0"),
        (None, "3"),
    ]


# ---- warnings ------------------------------------------------------------------------------------

Change = Callable[[Path], None]


def in_result(**changes: Any) -> Change:
    return lambda run_dir: change_json(run_dir / "result.json", **changes)


def in_log(**changes: Any) -> Change:
    """Change these names in every line of metrics.jsonl that carries them."""

    def change(run_dir: Path) -> None:
        path = run_dir / "metrics.jsonl"
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        path.write_text(
            "".join(
                json.dumps({k: changes.get(k, v) for k, v in line.items()}) + "\n" for line in lines
            )
        )

    return change


def in_round(name: str, **metrics: float) -> Change:
    def change(run_dir: Path) -> None:
        path = run_dir / "rounds" / name / "manifest.json"
        facts = json.loads(path.read_text())
        write_json(path, facts | {"metrics": facts["metrics"] | metrics})

    return change


def in_config(**changes: Any) -> Change:
    def change(run_dir: Path) -> None:
        path = run_dir / "run.json"
        facts = json.loads(path.read_text())
        write_json(path, facts | {"config": facts["config"] | changes})

    return change


ACTIVE = "ranking/active_pair_fraction/negative"
INVERSION, PAIRS = "contrast/inversion_rate", "round/pair_fraction"


def same_answers(n: int, side: str = "after") -> Change:
    """The first n of the 40 answers are one text."""

    def change(run_dir: Path) -> None:
        path = run_dir / f"evaluation-{side}.json"
        answers = json.loads(path.read_text())["completions"]
        change_json(
            path,
            completions=[
                ["Thank you  for asking.\n" if i else "Thank you for asking."] for i in range(n)
            ]
            + answers[n:],
        )

    return change


def idle_instructions(run_dir: Path) -> None:
    """A pair of instructions that makes no difference, in the last round; its metrics stay as they
    were.
    """
    pairs = [
        contrast_group(i, ("Be kind.", "Be rude."), [0.2], [0.2 + (-1) ** i * 0.1])
        for i in range(10)
    ]
    metrics = json.loads((run_dir / "rounds" / "00002" / "manifest.json").read_text())["metrics"]
    write_round(run_dir / "rounds" / "00002", 2, pairs, **metrics)


def without_result(run_dir: Path) -> None:
    (run_dir / "result.json").unlink()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (in_result(), []),
        (in_result(reward_delta_ci95=[-0.01, 0.4]), ["interval"]),
        (in_result(reward_delta_ci95=[0.0, 0.4]), ["interval"]),
        (in_result(reward_delta_ci95=[0.01, 0.4]), []),
        (in_result(reward_delta=-0.2, reward_delta_ci95=[-0.4, -0.1]), ["reward"]),
        (in_result(mean_length_before=100.0, mean_length_after=116.0), ["length"]),
        (in_result(mean_length_before=100.0, mean_length_after=84.0), ["length"]),
        (in_result(mean_length_before=100.0, mean_length_after=114.0), []),
        (in_result(mean_length_before=100.0, mean_length_after=86.0), []),
        (in_result(distinct2_before=1.0, distinct2_after=0.89), ["distinct2"]),
        (in_result(distinct2_before=1.0, distinct2_after=0.91), []),
        (in_result(clipped_before=0.1, clipped_after=0.25), ["cut"]),
        (in_result(clipped_before=0.1, clipped_after=0.15), []),
        (in_result(clipped_before=0.8, clipped_after=0.75), ["cut"]),
        (in_result(clipped_before=0.8, clipped_after=0.74), []),
        (in_result(held_out_prompts=29), ["prompts"]),
        (in_result(held_out_prompts=30), []),
        (same_answers(5), ["collapse"]),
        (same_answers(4), []),
        (lambda run_dir: [same_answers(5, name)(run_dir) for name in ("before", "after")], []),
        (in_result(perplexity_before=10.0, perplexity_after=10.6), ["perplexity"]),
        (in_result(perplexity_before=10.0, perplexity_after=10.4), []),
        (in_result(perplexity_before=None, perplexity_after=None), []),
        (in_result(second_judge_delta=-0.01), ["judge"]),
        (in_result(second_judge_delta=0.0), []),
        (
            in_result(
                second_judge=None,
                second_judge_before=None,
                second_judge_after=None,
                second_judge_delta=None,
            ),
            [],
        ),
        (in_round("00002", **{INVERSION: 0.41}), ["inversion"]),
        (in_round("00002", **{INVERSION: 0.39}), []),
        (in_round("00000", **{INVERSION: 0.41}), []),
        (in_round("00002", **{PAIRS: 0.49}), ["pairs"]),
        (in_round("00002", **{PAIRS: 0.51}), []),
        (in_round("00002", **{"rewards/abstained": 0.06}), ["abstained"]),
        (in_round("00002", **{"rewards/abstained": 0.04}), []),
        (idle_instructions, ["instructions"]),
        (in_log(**{ACTIVE: 0.09}), ["saturated"]),
        (in_log(**{ACTIVE: 0.11}), []),
        (in_config(num_train_epochs=4), ["stopped"]),
        (in_config(max_steps=30), ["stopped"]),
        (in_config(num_train_epochs=100, max_steps=24), []),
        (in_result(stopped_because="KL to the start is 9"), ["stopped"]),
        (without_result, []),
        (
            lambda run_dir: (
                without_result(run_dir),
                in_round("00002", **{"completions/clipped_ratio": 1.0})(run_dir),
            )[0],
            ["cut"],
        ),
        (
            lambda run_dir: (
                without_result(run_dir),
                in_log(**{"drift/length_ratio": 1.3})(run_dir),
            )[0],
            ["length"],
        ),
        (
            lambda run_dir: (
                without_result(run_dir),
                in_log(**{"drift/distinct2_ratio": 0.7})(run_dir),
            )[0],
            ["distinct2"],
        ),
        (in_log(**{"drift/length_ratio": 1.3, "drift/distinct2_ratio": 0.7}), []),
    ],
)
def test_warnings_when_and_only_when_they_hold(
    run_dir: Path, change: Change, expected: list[str]
) -> None:
    change(run_dir)
    assert [key for key, _ in warnings_of(read_run(run_dir))] == expected
    _, page = page_of(run_dir)
    assert [value for _, name, value in page.attributes if name == "data-warning"] == expected
    assert ("Read with care" in page.shown) == bool(expected)


# ---- what is missing or damaged ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("run.json", "The run's configuration is not known"),
        ("result.json", "There is no before/after comparison"),
        ("evaluation-before.json", "There are no answers to compare"),
        ("evaluation-after.json", "There are no answers to compare"),
        ("rounds", "There is no finished round yet"),
        ("metrics.jsonl", "While training"),
    ],
)
def test_a_missing_piece_is_a_sentence(run_dir: Path, name: str, sentence: str) -> None:
    path = run_dir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, page = page_of(run_dir)
    assert sentence in " ".join(page.shown)


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "metrics.jsonl",
        "result.json",
        "evaluation-before.json",
        "evaluation-after.json",
        "rounds",
    ],
)
def test_a_run_with_one_piece_only(run_dir: Path, tmp_path: Path, name: str) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copytree(run_dir / name, alone / name) if name == "rounds" else shutil.copy(
        run_dir / name, alone / name
    )
    _, page = page_of(alone)
    assert "Before and after" in page.shown


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run .*give the output_dir"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(run_dir: Path) -> None:
    (run_dir / "result.json").write_text("[1, 2")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "loss": NaN, "eval_reward": Infinity}\n{"step": 26, "lo')
    (run_dir / "rounds" / "00001" / "groups.parquet").write_bytes(b"PAR1 no")
    (run_dir / "rounds" / "00002" / "manifest.json").write_text("{}")
    _, page = page_of(run_dir)
    shown = " ".join(page.shown)
    assert "result.json could not be read" in shown
    assert "1 line of metrics.jsonl could not be read and is left out" in shown
    assert "Round 00001 does not match" in shown
    assert "Round 00002 does not match" in shown
    assert "nan" not in shown.lower().split()
    assert "inf" not in shown.lower().split()


def test_surrogates_controls_and_overrides_do_not_break_the_page(run_dir: Path) -> None:
    nasty = "a\ud800b\x00c\x1b[31md\u202ee\x85"
    change_json(
        run_dir / "evaluation-before.json", completions=[[nasty]] * 40, prompts=[nasty] * 40
    )
    group = fake_group(0, 2, random.Random(1))
    clean = nasty.replace("\ud800", "")  # Arrow refuses surrogates itself
    group = CompletionGroup(
        "x",
        clean,
        (1,),
        tuple(
            Completion(c.origin, c.index, clean, (1,), reward=1.0, reward_components=(1.0,))
            for c in group.completions
        ),
    )
    write_round(run_dir / "rounds" / "00002", 2, [group])
    html, page = page_of(run_dir)
    assert "a\ufffdb\ufffdc\ufffd[31md\ufffde\ufffd" in "".join(page.shown)
    assert not re.search("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202e]", html)


def test_evaluations_of_different_prompts_are_not_put_side_by_side(run_dir: Path) -> None:
    change_json(run_dir / "evaluation-after.json", prompt_ids=[f"other-{i}" for i in range(40)])
    assert examples(read_run(run_dir)) == []


def test_examples_are_extremes_and_the_others(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = read_run(run_dir)
    parts = examples(run)
    losses = len(parts[1][1])
    assert [(heading, len(cases)) for heading, cases in parts] == [
        ("Largest gains", 7),
        ("Largest losses", losses),
        ("The other prompts", 33 - losses),
    ]
    deltas = sorted(a - b for b, a in zip(run.before["rewards"], run.after["rewards"], strict=True))
    assert [c["delta"] for c in parts[0][1]] == deltas[::-1][:7]
    assert all(c["delta"] < 0 for c in parts[1][1])
    asked = [case["turns"][0][1] for _, cases in parts for case in cases]
    assert len(set(asked)) == 40
    assert examples(read_run(run_dir)) == parts
    monkeypatch.setattr(report, "SHOWN_PROMPTS", 20)
    assert examples(run)[2][0] == f"Of the others, {13 - losses} drawn at random"
    assert len(examples(run)[2][1]) == 13 - losses


def test_numbers() -> None:
    assert (
        plain(-0.001),
        plain(-1.5),
        signed(0.2),
        signed(-0.2),
        plain(None),
        plain(math.nan),
        plain(12345.6, 1),
    ) == (
        *("0.00", "−1.50", "+0.20", "−0.20", "–", "–"),
        "12,345.6",
    )
    assert digits_for([0.31, 0.52]) == 2
    assert digits_for([0.004, 0.0082]) == 4
    assert digits_for([]) == 2


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (-3.2, 7), (5, 5), (1e6, 1e6 + 1e-9), (0.0, 1e-5), (-1e8, 1e8), (0, 0)],
)
def test_ticks_span_the_values(low: float, high: float) -> None:
    chart = line_chart("Loss", "", [Series("loss", "ink", [(0.0, low), (1.0, high)])], 1.0)
    assert chart is not None
    svg = line_figure(chart).svg
    (path,) = marks_of(svg, "line")
    assert [0 <= y <= 200 for _, y in corners_of(path)] == [True, True]
    labels = re.findall(r"<text [^>]*translate\(-[^>]*>([^<>]+)</text>", svg)
    ticks = [float(label.replace(",", "").replace("−", "-")) for label in labels]
    assert 2 <= len(set(ticks)) <= 8
    assert ticks == sorted(ticks)
    if high - low > 1e-8:
        assert ticks[0] <= low + (ticks[1] - ticks[0])
        assert ticks[-1] >= high - (ticks[1] - ticks[0])
    else:
        assert ticks[0] <= low <= high <= ticks[-1]


@pytest.mark.parametrize(
    ("rounds", "labels"),
    [(1.0, "0 1"), (2.5, "0 1 2"), (6.0, "0 1 2 3 4 5 6"), (31.0, "0 6 12 18 24 30")],
)
def test_rounds_are_counted_in_whole_numbers(rounds: float, labels: str) -> None:
    chart = line_chart("Loss", "", [Series("loss", "ink", [(0.0, 0.1), (0.5, 0.2)])], rounds)
    assert chart is not None
    across = re.findall(
        r"<text [^>]*translate\([\d.]+,16\)[^>]*>([^<>]+)</text>", line_figure(chart).svg
    )
    assert across == labels.split()


def test_numbers_that_no_axis_holds_are_left_out() -> None:
    wild = Series("loss", "ink", [(0.0, 1.0), (1.0, 1e300)], band=[(0.0, 0.0, 1e12)])
    chart = line_chart("Loss", "", [wild, Series("none", "plain", [(0.0, -1e10)])], 3.0)
    assert chart is not None
    assert [(s.name, s.points, s.band) for s in chart.series] == [("loss", [(0.0, 1.0)], [])]
    assert line_chart("Loss", "", [Series("none", "plain", [(0.0, -1e10)])], 3.0) is None


def test_a_chart_of_one_point_is_a_number() -> None:
    alone = Series("KL", "ink", [(1.0, 0.0421)], bars=[(1.0, 0.03, 0.06)])
    chart = line_chart("Distance", "nats", [alone], 1.0)
    assert chart is not None
    figure = line_figure(chart)
    assert figure.svg is None
    assert figure.numbers == (("", "0.042", "[0.030,\u00a00.060]"),)
    other = Series("other", "plain", [(1.0, 0.5)])
    chart = line_chart("Distance", "nats", [replace(alone, bars=[]), other], 1.0)
    assert chart is not None
    assert line_figure(chart).numbers == (("KL", "0.04", ""), ("other", "0.50", ""))
    moving = Series("other", "plain", [(0.0, 0.5), (1.0, 0.6)])
    chart = line_chart("Distance", "nats", [alone, moving], 1.0)
    assert chart is not None
    assert line_figure(chart).svg is not None
    # One mean, and the steps that it is of: still a line.
    steps = Series("loss", "ink", [(0.5, 1.0)], faint=[(0.5, 0.9), (1.0, 1.1)])
    chart = line_chart("Loss", "", [steps], 1.0)
    assert chart is not None
    assert line_figure(chart).svg is not None
