"""The comparison page's charts: rewards against KL, and gains with their intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from neat_align.reporting.comparison_files import BASE, Comparison, Curve, CurvePoint, Estimate
from neat_align.reporting.pages import bounds, change, digits_for, plain
from neat_align.reporting.svg import Figure, Rows, Spec, axis_span, draw, layer

_FRONTIER_SIZE = (380, 280)
_GAINS_WIDTH, _GAINS_HEIGHT, _METHOD_HEIGHT = 340, 50, 24
# Area in which a mark is drawn, as Vega-Lite counts it.
_MARK_AREA = 70
# Where the farthest point lies this many times farther than the middle one, a linear axis would
# show one heap and one point.
_WIDE = 6.0
# Colours in the style sheet (.m0 …); one fewer than shapes, so that a colour that comes again has
# another shape.
_COLOURS = 8
# Dashes of a method's curves, one a strength; the first is a solid line.
_SOLID = [1, 0]
_DASHES = (_SOLID, [7, 3], [2, 3], [9, 3, 2, 3])
_COLLAPSED_DASH = [2, 2]

_AT_BASE: Spec = {"type": "rule", "stroke": "var(--base)", "strokeDash": [6, 4]}
_TARGET: Spec = {
    "type": "rule",
    "stroke": "var(--soft)",
    "strokeWidth": 1.2,
    "strokeDash": [1.5, 3],
}
_MARK: Spec = {"type": "point", "size": _MARK_AREA, "strokeWidth": 1.2, "opacity": 1}
# A row names its own colours, dashes and shape; without a scale they are drawn as named.
_LINE_LOOK: Spec = {
    "stroke": {"field": "color", "type": "nominal", "scale": None},
    "strokeDash": {"field": "dash", "type": "nominal", "scale": None},
}
_MARK_LOOK: Spec = {
    "fill": {"field": "fill", "type": "nominal", "scale": None},
    "stroke": {"field": "outline", "type": "nominal", "scale": None},
    "shape": {"field": "shape", "type": "nominal", "scale": None},
    "description": {"field": "note"},
}

# SVG paths around 0,0, within -1.5 to 1.5.
_CIRCLE = "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z"
_SHAPES = (
    "M0,-1.35L1.25,0L0,1.35L-1.25,0Z",  # diamond
    "M-.95,-.95L.95,-.95L.95,.95L-.95,.95Z",  # square
    "M0,-1.2L1.15,.9L-1.15,.9Z",  # triangle
    "M-.42,-1.25L.42,-1.25L.42,-.42L1.25,-.42L1.25,.42L.42,.42L.42,1.25L-.42,1.25L-.42,.42"
    "L-1.25,.42L-1.25,-.42L-.42,-.42Z",  # plus
    "M0,1.2L-1.15,-.9L1.15,-.9Z",  # triangle upside down
    "M0,-1.45L.32,-.44L1.38,-.45L.52,.17L.85,1.17L0,.55L-.85,1.17L-.52,.17L-1.38,-.45L-.32,-.44Z",
    "M1.2,0L-.9,1.15L-.9,-1.15Z",  # triangle to the right
    "M-1.2,0L.9,-1.15L.9,1.15Z",  # triangle to the left
    "M-1.3,-.55L1.3,-.55L1.3,.55L-1.3,.55Z",  # bar
)


def css_of(c: Comparison, method: str) -> str:
    """A method's colour, by its name in the style sheet: base has its own, the others take theirs
    in display order.
    """
    return "base" if method == BASE else f"m{c.rivals.index(method) % _COLOURS}"


def shape_of(c: Comparison, method: str) -> str:
    """A method's shape as an SVG path: nobody needs the colours to tell methods apart. Base has the
    circle.
    """
    return _CIRCLE if method == BASE else _SHAPES[c.rivals.index(method) % len(_SHAPES)]


def strengths(c: Comparison, method: str) -> list[tuple[str, str]]:
    """(class, strength) of a method's curves: one colour, another line for each strength."""
    names = list(dict.fromkeys(curve.strength for curve in c.curves if curve.method == method))
    return [(f"line-{i % len(_DASHES)}", name) for i, name in enumerate(names)]


def _dash_of(c: Comparison, curve: Curve) -> list[int]:
    names = [strength for _, strength in strengths(c, curve.method)]
    return _DASHES[names.index(curve.strength) % len(_DASHES)]


def _look(c: Comparison, method: str, *, collapsed: bool = False) -> dict[str, Any]:
    """How a method's line, its mark and the mark's intervals are drawn: a collapsed one is
    hollow.
    """
    color = f"var(--{css_of(c, method)})"
    return {
        "color": color,
        "fill": "var(--paper)" if collapsed else color,
        "outline": color if collapsed else "var(--paper)",
        "dash": _COLLAPSED_DASH if collapsed else _SOLID,
        "shape": shape_of(c, method),
    }


# ---- reward against KL ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Frontier:
    """One reward against KL to base (nats per token).

    `base` is the start policy's mean reward, the point at KL 0; `target` the KL at which methods
    are compared; `curves` have only points with a reward and a KL.
    """

    metric: str
    title: str
    base: Estimate | None
    target: float | None
    curves: tuple[Curve, ...]

    @property
    def kls(self) -> list[float]:
        """Every KL that must fit on the chart."""
        kls = [v for curve in self.curves for p in curve.points for v in (p.kl.mean, p.kl.high)]
        return [v for v in (*kls, self.target) if v is not None]

    @property
    def rewards(self) -> list[float]:
        """Every reward that must fit on the chart."""
        measured = [p.values[self.metric] for curve in self.curves for p in curve.points]
        estimates = measured if self.base is None else [*measured, self.base]
        return [v for e in estimates for v in (e.mean, e.low, e.high) if v is not None]

    @property
    def square_root(self) -> bool:
        """Whether KL is on a square-root scale."""
        return len(self.kls) > 2 and max(self.kls) > _WIDE * max(median(self.kls), 1e-9)


def base_level(c: Comparison, metric: str) -> Estimate | None:
    """The start policy's mean of a reward."""
    measured = [
        p.values.get(metric) for curve in c.curves if curve.method == BASE for p in curve.points
    ]
    for e in (*measured, c.row(BASE).at_budget.get(metric)):
        if e is not None and e.mean is not None:
            return e
    return None


def frontier(c: Comparison, metric: str, title: str) -> Frontier | None:
    """One reward against KL, a curve a method and strength; None where there is nothing to draw."""
    curves = []
    for curve in c.curves:
        points = tuple(p for p in curve.points if _has_place(p, metric))
        if points and curve.method != BASE:
            curves.append(replace(curve, points=points))
    if not curves:
        return None
    return Frontier(metric, title, base_level(c, metric), c.kl_target, tuple(curves))


def _has_place(p: CurvePoint, metric: str) -> bool:
    value = p.values.get(metric)
    return value is not None and value.mean is not None and p.kl.mean is not None


def frontier_figure(c: Comparison, f: Frontier) -> Figure:
    """The frontier as SVG."""
    unit = "mean over seeds, 95 % intervals"
    label = f"{f.title}, {unit}, by KL to base"
    words = "; ".join(row["note"] for row in _mark_rows(c, f))
    return Figure(f.title, unit, draw(frontier_spec(c, f), label, words, _FRONTIER_SIZE))


def frontier_spec(c: Comparison, f: Frontier) -> Spec:
    """Curves that start at base, with a mark and its intervals for the mean after each round."""
    kls = min(0.0, *f.kls), 1.03 * max(1e-6, *f.kls)
    kl = {
        "field": "kl",
        "type": "quantitative",
        "title": f"KL to base, nats per token{', square-root scale' if f.square_root else ''}",
        "scale": {"type": "sqrt" if f.square_root else "linear", "domain": kls, "nice": False},
        "axis": {"labelOverlap": "greedy", "labelSeparation": 8, "tickCount": 6},
    }
    reward = {
        "field": "reward",
        "type": "quantitative",
        "title": None,
        "scale": {"domain": axis_span(f.rewards), "nice": True},
        "axis": {"tickCount": 6},
    }
    place = {"x": kl, "y": reward}
    path = {"detail": {"field": "curve"}, "order": {"field": "place", "type": "quantitative"}}
    low_to_high = {"y": {**reward, "field": "low"}, "y2": {"field": "high"}}
    kl_low_to_high = {"x": {**kl, "field": "kl_low"}, "x2": {"field": "kl_high"}}
    base, marks = _base_rows(c, f), _mark_rows(c, f)
    target: Rows = [] if f.target is None else [{"kl": f.target}]
    spread = [row for row in marks if "low" in row]
    kl_spread = [row for row in marks if "kl_low" in row]
    interval = {"type": "rule", "strokeWidth": 1.1, "opacity": 0.6}
    through = {"type": "line", "strokeWidth": 1.5, "opacity": 0.75}
    return {
        "layer": [
            layer("at_base", _AT_BASE, base, {"y": reward}),
            layer("target", _TARGET, target, {"x": kl}),
            layer("through", through, _path_rows(c, f), place | path | _LINE_LOOK),
            layer("spread", interval, spread, place | low_to_high | _LINE_LOOK),
            layer("kl_spread", interval, kl_spread, place | kl_low_to_high | _LINE_LOOK),
            layer("mark", _MARK, [*marks, *base], place | _MARK_LOOK),
        ]
    }


def _base_rows(c: Comparison, f: Frontier) -> Rows:
    if f.base is None:
        return []
    note = f"base: {plain(f.base.mean, 3)}"
    return [{"kl": 0.0, "reward": f.base.mean, "note": note, **_look(c, BASE)}]


def _path_rows(c: Comparison, f: Frontier) -> Rows:
    """The points of each curve in their order, with the start policy before them."""
    rows: Rows = []
    for i, curve in enumerate(f.curves):
        start = [] if f.base is None else [(0.0, f.base.mean)]
        places = [(p.kl.mean, p.values[f.metric].mean) for p in curve.points]
        look = _look(c, curve.method) | {"dash": _dash_of(c, curve)}
        rows += [
            {"curve": i, "place": place, "kl": kl, "reward": reward, **look}
            for place, (kl, reward) in enumerate([*start, *places])
        ]
    return rows


def _mark_rows(c: Comparison, f: Frontier) -> Rows:
    return [_mark_row(c, f.metric, curve, p) for curve in f.curves for p in curve.points]


def _mark_row(c: Comparison, metric: str, curve: Curve, p: CurvePoint) -> dict[str, Any]:
    """A point with its intervals, and what it says when it is pointed at."""
    value = p.values[metric]
    digits = digits_for((value.low, value.high, value.mean))
    name = f"{curve.method} {curve.strength}".strip()
    when = "" if p.round is None else f", round {p.round}"
    note = (
        f"{name}{when}: {plain(value.mean, digits)} {bounds(value.low, value.high, digits)} at KL "
        f"{plain(p.kl.mean, 4)}"
    )
    row = {"kl": p.kl.mean, "reward": value.mean, **_look(c, curve.method, collapsed=p.collapsed)}
    if value.low is not None and value.high is not None:
        row |= {"low": value.low, "high": value.high}
    if p.kl.low is not None and p.kl.high is not None:
        row |= {"kl_low": p.kl.low, "kl_high": p.kl.high}
    return row | {"note": f"{note}, collapsed" if p.collapsed else note}


# ---- gains ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GainChart:
    """The gains over base in one reward, `at equal budget` or `at equal KL`; `span` is the range of
    gains on the axis.
    """

    title: str
    where: str
    gains: dict[str, Estimate]
    span: tuple[float, float]


def gain_charts(c: Comparison, scores: Iterable[tuple[str, str]]) -> list[GainChart]:
    """Gains in each of the rewards (name in the file, name for a reader), first at equal budget;
    the two charts of a reward have one scale.
    """
    sides = (("at_budget", "at equal budget"), ("at_equal_kl", "at equal KL"))
    charts = []
    for metric, title in scores:
        gains = {words: c.gains(side, metric) for side, words in sides}
        span = gain_span(e for estimates in gains.values() for e in estimates.values())
        charts += [GainChart(title, words, of, span) for words, of in gains.items() if of]
    return charts


def gain_span(estimates: Iterable[Estimate]) -> tuple[float, float]:
    """The range, 0 in it, that the charts of one reward share."""
    values = [v for e in estimates for v in (e.delta, e.low, e.high) if v is not None]
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def gain_figure(c: Comparison, chart: GainChart) -> Figure:
    """The chart as SVG."""
    size = (_GAINS_WIDTH, _GAINS_HEIGHT + _METHOD_HEIGHT * len(chart.gains))
    unit = f"{chart.where}, 95 % intervals"
    label = f"Gain over base in {chart.title}, {unit}"
    words = "; ".join(row["note"] for row in _gain_rows(c, chart))
    return Figure(chart.title, unit, draw(gain_spec(c, chart), label, words, size))


def gain_spec(c: Comparison, chart: GainChart) -> Spec:
    """A row a method, with its gain and the interval; base is the line at 0."""
    gain = {
        "field": "gain",
        "type": "quantitative",
        "title": "gain over base",
        "scale": {"domain": chart.span, "nice": False},
        "axis": {"tickCount": 5},
    }
    method = {
        "field": "method",
        "type": "nominal",
        "title": None,
        "sort": None,
        "axis": {"labelColor": "var(--ink)", "labelLimit": 110},
    }
    place = {"x": gain, "y": method}
    low_to_high = {"x": {**gain, "field": "low"}, "x2": {"field": "high"}}
    rows = _gain_rows(c, chart)
    spread = [row for row in rows if "low" in row]
    zero = {"type": "rule", "stroke": "var(--soft)"}
    interval = {"type": "rule", "strokeWidth": 1.6}
    return {
        "layer": [
            layer("zero", zero, [{"gain": 0.0}], {"x": gain}),
            layer("interval", interval, spread, place | low_to_high | _LINE_LOOK),
            layer("mark", _MARK, rows, place | _MARK_LOOK),
        ]
    }


def _gain_rows(c: Comparison, chart: GainChart) -> Rows:
    return [_gain_row(c, method, e) for method, e in chart.gains.items()]


def _gain_row(c: Comparison, method: str, e: Estimate) -> dict[str, Any]:
    collapsed = c.collapsed(method)
    note = f"{method}: {change(e.delta, e.low, e.high, digits_for((e.low, e.high, 0.0)))}"
    row = {"method": method, "gain": e.delta, **_look(c, method, collapsed=collapsed)}
    if e.low is not None and e.high is not None:
        row |= {"low": e.low, "high": e.high}
    return row | {"note": f"{note}, collapsed" if collapsed else note}
