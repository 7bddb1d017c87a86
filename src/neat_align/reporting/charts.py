"""The report's charts: lines over the rounds of training, and boxes of each round's rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TypeAlias

from neat_align.reporting.pages import bounds, digits_for, plain
from neat_align.reporting.round_rewards import Box
from neat_align.reporting.svg import Figure, Rows, Spec, axis_span, draw, layer

_SIZE = (340, 200)
# Points of a line: more say nothing more, and weigh on the page.
_LINE_POINTS = 300
# A line with more points than this shows none of them as a dot.
_DOTS = 60
_DOT = {
    "type": "point",
    "filled": True,
    "size": 36,
    "opacity": 1,
    "stroke": "var(--paper)",
    "strokeWidth": 1,
}
# Numbers beyond this have no place on an axis.
_TOO_LARGE = 1e9
# (rounds of training done, value)
Points: TypeAlias = list[tuple[float, float]]
# (rounds of training done, low, high)
Spreads: TypeAlias = list[tuple[float, float, float]]


# ---- lines ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A line of a chart: its points, fainter points behind it, a band around it, and single bars
    where an interval is known. `color` is the name of one of the style sheet's colours.
    """

    name: str
    color: str
    points: Points
    faint: Points = field(default_factory=list)
    band: Spreads = field(default_factory=list)
    bars: Spreads = field(default_factory=list)

    def bounded(self) -> Series:
        """The same without numbers too large to draw."""
        return Series(
            self.name,
            self.color,
            [p for p in self.points if abs(p[1]) < _TOO_LARGE],
            [p for p in self.faint if abs(p[1]) < _TOO_LARGE],
            [s for s in self.band if max(abs(s[1]), abs(s[2])) < _TOO_LARGE],
            [s for s in self.bars if max(abs(s[1]), abs(s[2])) < _TOO_LARGE],
        )

    @property
    def values(self) -> list[float]:
        """Everything that must fit on the chart."""
        single = [y for _, y in (*self.points, *self.faint)]
        return single + [v for _, low, high in (*self.band, *self.bars) for v in (low, high)]


@dataclass(frozen=True)
class LineChart:
    """Some series over `rounds` rounds of training."""

    title: str
    unit: str
    series: Sequence[Series]
    rounds: float


def line_chart(title: str, unit: str, series: Sequence[Series], rounds: float) -> LineChart | None:
    """What can be drawn of some series; None without points."""
    drawable = [s for s in (given.bounded() for given in series) if s.points or s.faint]
    if not drawable:
        return None
    last = max(x for s in drawable for x, _ in (*s.points, *s.faint))
    return LineChart(title, unit, drawable, max(1.0, rounds, last))


def line_figure(chart: LineChart) -> Figure:
    """The chart as SVG; numbers where no line has two points."""
    if all(len({x for x, _ in (*s.points, *s.faint)}) == 1 for s in chart.series):
        return Figure(chart.title, chart.unit, None, _as_numbers(chart.series))
    label = f"{chart.title}, {chart.unit}, by rounds of training"
    svg = draw(line_spec(chart), label, _in_words(chart.series), _SIZE)
    return Figure(chart.title, chart.unit, svg)


def _as_numbers(series: Sequence[Series]) -> tuple[tuple[str, str, str], ...]:
    """(name, value, interval) of each line's one point; a single line needs no name."""
    values = [y for s in series for y in s.values]
    digits = digits_for(values)
    told = []
    for s in series:
        _, value = (s.points or s.faint)[0]
        around = next((bounds(low, high, digits) for _, low, high in (*s.bars, *s.band)), "")
        told.append((s.name if len(series) > 1 else "", plain(value, digits), around))
    return tuple(told)


def line_spec(chart: LineChart) -> Spec:
    """Bands, interval bars and single steps behind, lines and dots before them."""
    names, every = [s.name for s in chart.series], math.ceil(chart.rounds / 6)
    colors = {"domain": names, "range": [f"var(--{s.color})" for s in chart.series]}
    legend = {"symbolOpacity": 1} if len(names) > 1 else None
    x = {
        "field": "x",
        "type": "quantitative",
        "title": "rounds of training",
        "scale": {"domain": [0, chart.rounds], "nice": False},
        "axis": {"values": list(range(0, math.floor(chart.rounds) + 1, every)), "format": "d"},
    }
    y = {
        "field": "y",
        "type": "quantitative",
        "title": None,
        "scale": {"domain": axis_span(v for s in chart.series for v in s.values), "nice": True},
        "axis": {"tickCount": 4},
    }
    color = {"field": "series", "type": "nominal", "scale": colors, "legend": legend}
    # Shapes tell the lines apart in black and white too.
    shape = {"field": "series", "type": "nominal", "scale": {"domain": names}, "legend": legend}
    point = {"x": x, "y": y, "color": color}
    spread = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": color}
    dot = {**point, "shape": shape, "description": {"field": "note"}}
    rows = _line_rows(chart.series)
    return {
        "layer": [
            layer("band", {"type": "area", "opacity": 0.16}, rows["band"], spread),
            layer("bar", {"type": "rule", "strokeWidth": 1.4, "opacity": 0.7}, rows["bar"], spread),
            layer("step", {"type": "line", "strokeWidth": 1, "opacity": 0.32}, rows["step"], point),
            layer("line", {"type": "line", "strokeWidth": 1.8}, rows["line"], point),
            layer("dot", _DOT, rows["dot"], dot),
        ]
    }


def _line_rows(series: Sequence[Series]) -> dict[str, Rows]:
    """The rows of each layer of a line chart."""
    rows: dict[str, Rows] = {name: [] for name in ("band", "bar", "step", "line", "dot")}
    for s in series:
        # One spread alone has no area.
        rows["band"] += _spread_rows(s.name, s.band) if len(s.band) > 1 else []
        rows["bar"] += _spread_rows(s.name, s.bars)
        rows["step"] += _point_rows(s.name, _thinned(s.faint))
        rows["line"] += _point_rows(s.name, _thinned(s.points))
        rows["dot"] += _point_rows(s.name, s.points) if len(s.points) <= _DOTS else []
    return rows


def _point_rows(name: str, points: Points) -> Rows:
    digits = digits_for(y for _, y in points)
    return [
        {"series": name, "x": x, "y": y, "note": f"{name}, {x:.4g}: {plain(y, digits)}"}
        for x, y in points
    ]


def _spread_rows(name: str, spreads: Spreads) -> Rows:
    return [{"series": name, "x": x, "low": low, "high": high} for x, low, high in spreads]


def _in_words(series: Sequence[Series]) -> str:
    """Where each line starts and where it ends."""
    told = []
    for s in series:
        points = s.points or s.faint
        digits = digits_for(y for _, y in points)
        (start, first), (end, last) = points[0], points[-1]
        told.append(
            f"{s.name}: {plain(first, digits)} at {start:.4g}, {plain(last, digits)} at {end:.4g}"
        )
    return "; ".join(told)


def _thinned(points: Points) -> Points:
    """Means of neighbours, so that no more than `_LINE_POINTS` are left."""
    size = max(1, math.ceil(len(points) / _LINE_POINTS))
    if size == 1:
        return points
    chunks = (points[i : i + size] for i in range(0, len(points), size))
    return [(fmean(x for x, _ in chunk), fmean(y for _, y in chunk)) for chunk in chunks]


# ---- boxes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoxChart:
    """Boxes side by side; `names` has the rounds without a box too, `span` is the range of y."""

    title: str
    unit: str
    color: str
    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    span: tuple[float, float]


def box_figure(chart: BoxChart) -> Figure:
    """The chart as SVG."""
    label = f"{chart.title}, {chart.unit}, by round"
    words = "; ".join(_box_note(box) for box in chart.boxes)
    return Figure(chart.title, chart.unit, draw(box_spec(chart), label, words, _SIZE))


def box_spec(chart: BoxChart) -> Spec:
    """The values as a strip, over it the middle half with its median, and whiskers from the 5th to
    the 95th percentile.
    """
    rows = [_box_row(chart.title, box) for box in chart.boxes]
    color, half = f"var(--{chart.color})", min(16.0, 100.0 / len(chart.names))
    # Before the first round and after the last lies half of the gap between two, so that the middle
    # of round i lies at i + 0.5 of the strip's axis.
    rounds = {
        "field": "round",
        "type": "nominal",
        "title": "round",
        "scale": {"domain": chart.names, "paddingInner": 0.2, "paddingOuter": 0.1},
        "sort": None,
        "axis": {"labelAngle": 0, "labelOverlap": True},
    }
    scale = {"domain": axis_span(chart.span), "nice": True}
    at = {
        name: {"x": rounds, "y": {"field": name, "type": "quantitative", "title": None}}
        for name in ("low", "first", "median", "third", "high")
    }
    whisker = {"type": "rule", "stroke": color, "strokeWidth": 1.2}
    end = {"type": "tick", "color": color, "size": 0.7 * half, "thickness": 1.2}
    middle = {"type": "tick", "color": color, "size": 2 * half, "thickness": 2.4}
    box = {"type": "bar", "width": 2 * half, "fill": color, "fillOpacity": 0.14, "stroke": color}
    note = {"description": {"field": "note"}}
    boxes = [
        layer("low_whisker", whisker, rows, at["low"] | {"y2": {"field": "first"}}),
        layer("high_whisker", whisker, rows, at["third"] | {"y2": {"field": "high"}}),
        layer("low_end", end, rows, at["low"]),
        layer("high_end", end, rows, at["high"]),
        layer("box", box, rows, at["first"] | {"y2": {"field": "third"}} | note),
        layer("median", middle, rows, at["median"]),
    ]
    return {
        "layer": [_strip(chart, half, scale), {"layer": boxes}],
        "resolve": {"scale": {"x": "independent"}},
    }


def _strip(chart: BoxChart, half: float, y_scale: Spec) -> Spec:
    """The values as the single points of one broken line: point marks would be an element each.

    Its x is a number, so that a value can stand beside the middle of its round.
    """
    width = half / _SIZE[0] * len(chart.names)
    rows: Rows = []
    for box in chart.boxes:
        middle = chart.names.index(box.name) + 0.5
        for i, value in enumerate(box.strip):
            # Shifted by the golden ratio, so that neighbours in value stand apart and the picture
            # is the same every time.
            place = middle + width * (2 * (i * 0.618034 % 1) - 1)
            rows.append({"order": len(rows), "place": place, "value": value})
            rows.append({"order": len(rows), "place": place, "value": None})
    mark = {
        "type": "line",
        "stroke": f"var(--{chart.color})",
        "strokeWidth": 2.4,
        "strokeCap": "round",
        "opacity": 0.35,
        "invalid": "break-paths-show-domains",
    }
    across = {"domain": [0, len(chart.names)], "nice": False}
    encoding = {
        "x": {"field": "place", "type": "quantitative", "scale": across, "axis": None},
        "y": {"field": "value", "type": "quantitative", "title": None, "scale": y_scale},
        "order": {"field": "order", "type": "quantitative"},
    }
    return layer("strip", mark, rows, encoding)


def _box_row(title: str, box: Box) -> Spec:
    low, first, median, third, high = box.percentiles
    ends = {"low": low, "first": first, "median": median, "third": third, "high": high}
    return {"round": box.name, "note": f"{title}, {_box_note(box)}", **ends}


def _box_note(box: Box) -> str:
    _, first, median, third, _ = (plain(v, 3) for v in box.percentiles)
    return (
        f"round {box.name}: {box.count} completions, median {median}, middle half {first} to "
        f"{third}"
    )
