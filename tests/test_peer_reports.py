"""docs/peer_reports.md: each report has a test that exists, and reliability.md counts them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "peer_reports.md"
REPORT = re.compile(r"\[([\w.-]+/[\w.-]+)#(\d+)\]\((https://github\.com/[^)]+)\)")
MOST_WORDS = 14


def rows() -> list[list[str]]:
    """kind, report, situation, what happens here, test: a list for every report."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "| kind | report | situation | what happens here | test |"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


@cache
def functions_of(file: Path) -> frozenset[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_report_names_a_test_that_exists() -> None:
    missing = []
    for _, report, _, _, test in rows():
        file, _, name = test.strip("`").partition("::")
        path = ROOT / file
        exists = path.suffix == ".py" and path.is_file() and name in functions_of(path)
        if not (exists and name.startswith("test_")):
            missing.append(f"{report}: {test}")
    assert not missing


def test_every_report_is_complete_short_and_there_once() -> None:
    seen = set()
    for row in rows():
        assert len(row) == 5, row
        assert all(row), row
        matched = REPORT.fullmatch(row[1])
        assert matched is not None, row
        repository, number, link = matched.groups()
        assert re.fullmatch(rf"https://github\.com/{repository}/(issues|pull)/{number}", link), row
        assert (repository, number) not in seen, row
        seen.add((repository, number))
        assert len(row[2].split()) <= MOST_WORDS, row
    kinds = [row[0] for row in rows()]
    assert kinds == sorted(kinds)


def test_the_reliability_page_counts_the_reports() -> None:
    text = " ".join((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split())
    counted = re.findall(r"peers' bug reports tried: (\d+), failing: (\d+)", text)
    assert counted == [(str(len(rows())), "0")]
