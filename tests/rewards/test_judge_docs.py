"""docs/judges.md says what judges are: its examples are read, its table has every key, and its
script makes a reward model.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from textwrap import dedent

import pytest

from neat_align.rewards.aggregation import normalized_sums
from neat_align.rewards.judge_file import SHIPPED_RUBRICS, JudgeSettings, load_rubric, read_judge

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "judges.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
BLOCKS = [dedent(block) for block in re.findall(r"(?:^    .+\n|^\n(?=    ))+", TEXT, re.MULTILINE)]


def test_the_examples_are_judges(tmp_path: Path) -> None:
    (first,) = [block for block in BLOCKS if "base_url" in block]
    (rubric,) = [block for block in BLOCKS if block.strip().startswith("rubric:\n")]
    path = tmp_path / "strict.yaml"
    path.write_text(first, encoding="utf-8")
    settings = read_judge(str(path))
    assert (settings.name, settings.rubric) == ("strict", load_rubric("helpful"))
    own = first.replace("rubric: helpful\n", rubric)
    path.write_text(own, encoding="utf-8")
    assert read_judge(str(path)).rubric.scale == (1, 5)


def test_the_table_has_every_key_with_its_default() -> None:
    table = TEXT.split("## Every key")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^`|]+?)`? \|", table, re.MULTILINE))
    assert set(rows) == {f.name for f in fields(JudgeSettings)}
    said = {"name": "the file's", "prices": "none", "api_key_env": "see below", "extra_body": "{}"}
    for f in fields(JudgeSettings):
        default = "needed" if f.default is f.default_factory is MISSING else f.default
        plain = {None: "null", True: "true", False: "false"}
        expected = plain[default] if default is None or default in (True, False) else default
        if isinstance(default, int | float) and not isinstance(default, bool):
            expected = f"{default:g}"
        assert rows[f.name] == said.get(f.name, str(expected)), f.name


def test_the_table_of_normalised_rewards_is_right() -> None:
    rows = re.findall(r"^\| (?:first|second|third) \| (.+) \|$", TEXT, re.MULTILINE)
    shown = [[float(x.replace("−", "-")) for x in row.split(" | ")] for row in rows]
    pairs = [(row[0], row[2]) for row in shown]
    expected = normalized_sums(pairs, (1.0, 1.0))
    for row, (judge, tone), total in zip(shown, pairs, expected, strict=True):
        assert (row[4], row[5]) == (pytest.approx(judge + tone), pytest.approx(total, abs=0.005))


@pytest.mark.parametrize("name", SHIPPED_RUBRICS)
def test_the_shipped_rubrics_say_all_that_a_judge_needs(name: str) -> None:
    rubric = load_rubric(name)
    assert (rubric.name, rubric.scale) == (name, (1, 10))
    assert {1, 10} <= set(rubric.levels)
    assert rubric.description
    assert rubric.source
    assert "not count" in rubric.criteria
