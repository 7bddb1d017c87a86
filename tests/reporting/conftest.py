"""What only the tests of the pages need."""

from __future__ import annotations

import json

import pytest
from markupsafe import Markup

from neat_align.reporting import charts, comparison_charts, svg

_DRAWN: dict[str, Markup] = {}


@pytest.fixture
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chart that an earlier test drew is not drawn again: the tests write some two hundred pages,
    most with the same charts.
    """

    def draw(chart: svg.Spec, label: str, description: str, size: tuple[int, int]) -> Markup:
        key = json.dumps([chart, label, description, size])
        if key not in _DRAWN:
            _DRAWN[key] = svg.draw(chart, label, description, size)
        return _DRAWN[key]

    monkeypatch.setattr(charts, "draw", draw)
    monkeypatch.setattr(comparison_charts, "draw", draw)
