"""The charts as they stand in a page: nothing in them runs, points outside or changes from one time
to the next, and who does not see them is told what they show.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import vl_convert

from comparison_files import comparison, write_comparison
from neat_align.reporting import comparison_report, run_report, svg
from neat_align.reporting.charts import BoxChart, LineChart, Series, box_spec, line_spec
from neat_align.reporting.comparison_charts import (
    frontier,
    frontier_spec,
    gain_charts,
    gain_spec,
)
from neat_align.reporting.comparison_files import read_comparison
from neat_align.reporting.round_rewards import Box
from pages import BREAKOUT, HOSTILE
from run_files import build_run

NASTY = f"{HOSTILE}{BREAKOUT}&amp; \ud800\x00\x1b[31m\u202e ]]> 'datum.x'"
POINTS = [(0.0, 0.1), (1.0, 0.4), (2.0, 0.3)]
SPREADS = [(x, y - 0.1, y + 0.1) for x, y in POINTS]
# Attributes that a chart may have: none can run, fetch, style or collide with another chart's.
ALLOWED = {
    *("aria-label", "class", "d", "role", "transform", "viewBox", "x2", "y2"),
    *("fill", "fill-opacity", "opacity", "stroke", "stroke-dasharray", "stroke-linecap"),
    *("stroke-miterlimit", "stroke-width", "font-size", "font-weight", "text-anchor"),
}
TAGS = {"svg", "desc", "g", "line", "path", "text", "title"}


def line_charts(name: str) -> dict[str, Any]:
    one = Series(name, "ink", POINTS, faint=POINTS, band=SPREADS, bars=SPREADS)
    other = Series("other", "plain", POINTS)
    return line_spec(LineChart("a chart", "a unit", [one, other], 3.0))


def specs(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    """Every kind of chart, with a name that somebody else chose."""
    facts = comparison()
    for part in ("methods", "table", "frontier", "runs"):
        for x in facts[part]:
            key = "name" if part == "methods" else "method"
            x[key] = (
                x[key] if x[key] == "base" else f"{x[key]}{name.encode(errors='replace').decode()}"
            )
    c = read_comparison(write_comparison(tmp_path, facts))
    box = Box(name, 3, (0.1, 0.2, 0.3, 0.4, 0.5), (0.1, 0.3, 0.5))
    drawn = frontier(c, "reward", "reward")
    assert drawn is not None
    return [
        line_charts(name),
        box_spec(BoxChart("a chart", "a unit", "positive", (name, "1"), (box,), (0.0, 1.0))),
        frontier_spec(c, drawn),
        *(gain_spec(c, chart) for chart in gain_charts(c, [("reward", "reward")])),
    ]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    for spec in specs(tmp_path, NASTY):
        text = svg.draw(spec, f"label {NASTY}", f"words {NASTY}", (340, 200))
        root = ElementTree.fromstring(text)
        assert {element.tag for element in root.iter()} <= TAGS
        assert {name for element in root.iter() for name in element.attrib} <= ALLOWED
        assert HOSTILE not in text
        assert HOSTILE in str(root.get("aria-label"))
        assert HOSTILE in (root.findtext("desc") or "")
        assert any(HOSTILE in (title.text or "") for title in root.iter("title"))
        assert not re.search("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)


def test_every_chart_of_a_page_is_named_and_has_the_colours_of_the_page(tmp_path: Path) -> None:
    run, compared = tmp_path / "run", tmp_path / "comparison"
    pages = [
        run_report.write_report(build_run(run)),
        comparison_report.write_comparison_report(write_comparison(compared)),
    ]
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.search(r"<svg[^>]*>.* id=", html)
        variables = set(re.findall(r"(--[\w-]+):", html))
        charts = re.findall(r"<figure.*?(<svg.*?</svg>)", html, re.DOTALL)
        assert charts
        for chart in charts:
            root = ElementTree.fromstring(chart)
            assert root.get("role") == "img"
            assert root.get("aria-label")
            assert root.findtext("desc")
            colors = {e.get(name) for e in root.iter() for name in ("fill", "stroke")}
            used = {str(color) for color in colors - {None, "none", "transparent"}}
            assert used <= {f"var({name})" for name in variables}


def test_a_chart_is_the_same_in_another_process(tmp_path: Path) -> None:
    """Python orders its sets anew in every process."""
    spec = line_charts("name")
    program = (
        "import json, sys; from neat_align.reporting.svg import draw; "
        "print(draw(json.load(sys.stdin), 'a', 'b', (340, 200)), end='')"
    )
    drawn = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(spec),
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONUTF8": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert drawn == {str(svg.draw(spec, "a", "b", (340, 200)))}
    for spec in specs(tmp_path, "name"):
        first, second = (svg.draw(spec, "a", "b", (340, 200)) for _ in range(2))
        assert first == second


def test_nothing_is_fetched_while_drawing() -> None:
    data = {"url": "http://127.0.0.1:9/rows.json"}
    encoding = {"x": {"field": "x", "type": "quantitative"}}
    with pytest.raises(ValueError, match="data url not allowed"):
        svg.draw({"data": data, "mark": "point", "encoding": encoding}, "a", "b", (340, 200))


def as_json(spec: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(svg.fitted(spec, (340, 200))))
    return made


def test_every_specification_is_vega_lite(tmp_path: Path) -> None:
    """vl-convert says nothing of a misspelt property; altair brings the grammar's own schema."""
    altair, jsonschema = pytest.importorskip("altair"), pytest.importorskip("jsonschema")
    assert altair.SCHEMA_VERSION.startswith(f"v{svg.VEGA_LITE}.")
    assert svg.VEGA_LITE in vl_convert.get_vegalite_versions()
    for spec in specs(tmp_path, "name"):
        altair.LayerChart.from_dict(as_json(spec))
    wrong = line_charts("name")
    wrong["layer"][0]["mark"]["strokeWith"] = 2
    with pytest.raises(jsonschema.ValidationError):
        altair.LayerChart.from_dict(as_json(wrong))


def test_markup_is_made_in_one_place() -> None:
    """Everything else on the pages is escaped by the templates."""
    sources = Path(svg.__file__).parent.glob("*.py")
    assert [p.name for p in sources if "Markup(" in p.read_text(encoding="utf-8")] == ["svg.py"]
