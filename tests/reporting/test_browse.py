"""Browsing in the terminal: fits in 80 columns, shows text as text, says what is wrong
with a path.
"""

from __future__ import annotations

import io
import random
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.pager import SystemPager

from neat_align.errors import ConfigError, DataError
from neat_align.reporting.terminal import browse, load_any, printable, render_group
from neat_align.rounds.completions import Completion, CompletionGroup
from run_files import build_run, fake_group


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("run"))


def printed(what: Any, width: int = 80, **options: Any) -> str:
    console = Console(width=width, file=io.StringIO(), **options)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


def browsed(path: Path, width: int = 80, **options: Any) -> str:
    console = Console(width=width, file=io.StringIO())
    browse(path, console=console, **options)
    return console.file.getvalue()  # type: ignore[attr-defined]


def group_of(
    *texts: str, prompt: Any = "what?", rewards: tuple[float | None, ...] = (), prompt_id: str = "p"
) -> CompletionGroup:
    values = rewards or tuple(float(i) for i in range(len(texts)))
    completions = tuple(
        Completion("plain", i, t, (1, 2), reward=r)
        for i, (t, r) in enumerate(zip(texts, values, strict=True))
    )
    return CompletionGroup(prompt_id, prompt, (1,), completions)


# ---- one group -----------------------------------------------------------------------------------


def test_a_group_shows_all_of_its_completions() -> None:
    group = fake_group(1, 0, random.Random(3))
    lines = printed(render_group(group, 3, 40)).splitlines()
    text = " ".join(" ".join(lines).split())
    assert "3 of 40" in lines[0]
    assert "user  Could you look over my cover letter?" in "\n".join(lines)
    best_first = sorted(group.completions, key=lambda c: -(c.reward or 0))
    shown = [line.split()[:3] for line in lines if re.match(r"\s*\d ", line)]
    assert shown == [[str(i), c.origin, f"{c.reward:.3f}"] for i, c in enumerate(best_first, 1)]
    assert " stop " in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_too_long(width: int) -> None:
    group = group_of("x" * 500, "汉字" * 200, "a b " * 300, prompt="y" * 300, prompt_id="z" * 300)
    text = printed(render_group(group, 123456, 1234567), width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert text.count("汉") == 200
    assert text.count("x") == 501  # and the one of the column "text"


def test_markup_is_printed_as_it_is() -> None:
    group = group_of(
        "[red]x[/red]",
        "[/]",
        "[link=http://a]b[/link]",
        ":smile:",
        prompt="[bold]p[/bold]",
        prompt_id="[i]id[/i]",
    )
    text = printed(render_group(group, 1, 1), force_terminal=True, color_system="truecolor")
    for literal in (
        "[red]x[/red]",
        "[/]",
        "[link=http://a]b[/link]",
        ":smile:",
        "[bold]p[/bold]",
        "[i]id[/i]",
    ):
        assert literal in text
    assert "\x1b]8" not in text


def test_control_characters_are_taken_out() -> None:
    nasty = "a\x1b[31mb\x1b]0;title\x07c\x9b2Jd\x00e\rf\x08g\u202eh\x1bci\x1b]8;;http://x\x1b\\j\x7fk\x85"
    assert printable(nasty) == "abcdefghijk"
    group = group_of(nasty, prompt=[{"role": nasty, "content": nasty}], prompt_id=nasty)
    text = printed(render_group(group, 1, 1))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert text.count("abcdefghijk") == 4


def test_lines_tabs_and_lone_surrogates() -> None:
    assert printable("a\r\nb\tc\n\ud800\x1b]0;never ended") == "a\nb   c\n\ufffd0;never ended"
    printed(render_group(group_of("\udc80"), 1, 1)).encode("utf-8")


def test_ties_share_a_rank_and_no_reward_is_last() -> None:
    lines = printed(
        render_group(group_of("one", "two", "three", "", rewards=(1.0, None, 1.0, 2.0)), 1, 1)
    ).splitlines()
    shown = [(line.split()[0], line.split()[-1]) for line in lines if " plain " in line]
    assert shown == [("1", "(empty)"), ("2", "one"), ("2", "three"), ("–", "two")]


def test_one_origin_keeps_the_ranks_of_the_whole_group() -> None:
    group = fake_group(1, 0, random.Random(3))
    text = printed(render_group(group, 1, 1, origin="negative"))
    ranks = [
        1 + sum((o.reward or 0) > (c.reward or 0) for o in group.completions)
        for c in group.completions
        if c.origin == "negative"
    ]
    assert [int(m) for m in re.findall(r"^(\d) +negative", text, re.MULTILINE)] == sorted(ranks)
    assert "positive" not in text.partition("origin")[2].replace("(positive", "")


# ---- what is opened ------------------------------------------------------------------------------


def test_a_run_a_round_and_a_file(run_dir: Path) -> None:
    rounds = load_any(run_dir)
    assert [(name, len(groups)) for name, groups in rounds] == [
        ("00000", 12),
        ("00001", 12),
        ("00002", 12),
    ]
    assert load_any(run_dir / "rounds") == rounds
    assert load_any(run_dir / "rounds" / "00001") == [rounds[1]]
    assert load_any(run_dir / "rounds" / "00001" / "groups.parquet") == [
        ("groups.parquet", rounds[1][1])
    ]


def test_an_unfinished_round_is_left_out_of_a_run_and_refused_alone(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / "rounds" / "00002" / "manifest.json").unlink()
    assert [name for name, _ in load_any(run)] == ["00000", "00001"]
    with pytest.raises(DataError, match="not finished"):
        load_any(run / "rounds" / "00002")


def test_a_path_that_is_nothing_of_ours_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing at .*missing: give a run's output_dir"):
        load_any(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"neither a run .* nor a round .*: give"):
        load_any(tmp_path)
    (tmp_path / "rounds" / "00000").mkdir(parents=True)
    with pytest.raises(DataError, match="no finished round"):
        load_any(tmp_path)
    (tmp_path / "rounds" / "00000" / "manifest.json").write_text("{not json")
    with pytest.raises(DataError, match=r"00000 could not be read as groups"):
        load_any(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt could not be read as groups"):
        load_any(tmp_path / "notes.txt")


def test_a_parquet_file_of_something_else(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="columns"):
        load_any(tmp_path / "other.parquet")


# ---- browsing ------------------------------------------------------------------------------------


def test_browsing_a_run_fits_80_columns(run_dir: Path) -> None:
    text = browsed(run_dir, limit=2)
    assert max(map(cell_len, text.splitlines())) <= 80
    header = next(line for line in text.splitlines() if line.startswith("00000"))
    assert header.split()[1:3] == ["12", "72"]
    assert header.split()[-1].endswith("%")
    assert len(header.split()) == 8
    assert text.count("12 groups, 2 shown") == 3
    assert re.findall(r"prompt (\d+) of 12", text) == ["1", "2"] * 3


def test_sorting_searching_and_filtering(run_dir: Path) -> None:
    groups = load_any(run_dir)[0][1]
    path = run_dir / "rounds" / "00000"
    rewards = [[c.reward or 0.0 for c in g.completions] for g in groups]

    def numbers(**options: Any) -> list[int]:
        return [
            int(n) for n in re.findall(r"prompt (\d+) of 12", browsed(path, limit=12, **options))
        ]

    assert numbers(sort="gap") == sorted(
        range(1, 13), key=lambda i: min(rewards[i - 1]) - max(rewards[i - 1])
    )
    assert numbers(sort="reward") == sorted(range(1, 13), key=lambda i: -sum(rewards[i - 1]))
    assert numbers(search="COVER letter") == [2, 6, 10]
    assert numbers(search="(negative 2, prompt 4)") == [5]
    assert numbers(search="(negative 2, prompt 4)", origin="positive") == []
    assert "0 of 12 groups match" in browsed(path, search="nowhere to be found")
    only = browsed(path, limit=12, origin="chosen").partition("groups match")[2]
    assert "chosen" in only
    assert "negative" not in only


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"origin": "bad"}, "origin is 'bad'; it must be one of positive"),
        ({"search": "x", "limit": -1}, "limit"),
    ],
)
def test_options_that_make_no_sense(run_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        browsed(run_dir, **options)


def test_a_terminal_gets_a_pager_with_colours(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    shown: list[tuple[str, str]] = []
    monkeypatch.delenv("LESS", raising=False)
    monkeypatch.setattr(
        SystemPager, "show", lambda self, content: shown.append((content, os.environ["LESS"]))
    )
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
    browse(run_dir, limit=1, console=console)
    assert len(shown) == 1
    assert "\x1b[" in shown[0][0]
    assert "R" in shown[0][1]
    assert "LESS" not in os.environ
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
