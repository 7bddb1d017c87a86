"""Geometry of the comparison page's pictures: rewards against KL, and gains with their intervals.

The template draws it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any, TypeAlias

from neat_align.reporting.charts import Frame, nice_ticks
from neat_align.reporting.comparison_files import BASE, Comparison, CurvePoint, Estimate
from neat_align.reporting.pages import bounds, digits_for, plain

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420.0, 300.0, 48.0, 408.0, 12.0, 258.0
# Where the farthest point lies this many times farther than the middle one, a linear axis would
# show one heap and one point.
_WIDE = 6.0
# A whisker's width in its units: the ends of the scale that a column's cells share.
WHISKER = 96.0
# Colours in the style sheet (.m0 …); one fewer than shapes, so that a colour that comes again has
# another shape.
_COLOURS = 8
# Kinds of line in the style sheet (.line-0 …), one a strength.
_DASHES = 4
_Corners: TypeAlias = tuple[tuple[float, float], ...]


def css_of(c: Comparison, method: str) -> str:
    """A method's colour class: base has its own, the others take theirs in display order."""
    return "base" if method == BASE else f"m{c.rivals.index(method) % _COLOURS}"


def marker_of(c: Comparison, method: str, x: float, y: float, size: float = 4.2) -> str:
    """A method's shape around a point, as an SVG path: nobody needs the colours to tell methods
    apart. Base has the circle.
    """
    if method == BASE:
        return _circle(x, y, size)
    i = c.rivals.index(method)
    corners = _SHAPES[i % len(_SHAPES)]
    return "M" + " L".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners) + " Z"


def _circle(x: float, y: float, r: float) -> str:
    return f"M{x - r:.1f},{y:.1f} a{r},{r} 0 1 0 {2 * r},0 a{r},{r} 0 1 0 {-2 * r},0 Z"


def _turned(corners: Iterable[tuple[float, float]], quarter_turns: int) -> _Corners:
    turn: Callable[[float, float], tuple[float, float]] = [
        lambda x, y: (x, y),
        lambda x, y: (-y, x),
        lambda x, y: (-x, -y),
        lambda x, y: (y, -x),
    ][quarter_turns]
    return tuple(turn(x, y) for x, y in corners)


_TRIANGLE: _Corners = ((0, -1.2), (1.15, 0.9), (-1.15, 0.9))
_ARM: _Corners = ((-0.42, -0.42), (-0.42, -1.25), (0.42, -1.25))
_SHAPES: tuple[_Corners, ...] = (
    ((0, -1.35), (1.25, 0), (0, 1.35), (-1.25, 0)),  # diamond
    ((-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)),  # square
    _TRIANGLE,
    tuple(corner for k in range(4) for corner in _turned(_ARM, k)),  # plus
    _turned(_TRIANGLE, 2),
    tuple(
        (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
        for k in range(10)
        for r in [0.55 if k % 2 else 1.45]
    ),  # star
    _turned(_TRIANGLE, 1),
    _turned(_TRIANGLE, 3),
    ((-1.3, -0.55), (1.3, -0.55), (1.3, 0.55), (-1.3, 0.55)),  # bar
)


def strengths(c: Comparison, method: str) -> list[tuple[str, str]]:
    """(class, strength) of a method's curves: one colour, another line for each strength."""
    names = list(dict.fromkeys(curve.strength for curve in c.curves if curve.method == method))
    return [(f"line-{i % _DASHES}", name) for i, name in enumerate(names)]


# ---- reward against KL ---------------------------------------------------------------------------


def base_level(c: Comparison, metric: str) -> Estimate | None:
    """The start policy's mean of a reward: the point at KL 0."""
    drawn = (
        p.values.get(metric) for curve in c.curves if curve.method == BASE for p in curve.points
    )
    known = [
        e
        for e in (*drawn, c.row(BASE).at_budget.get(metric))
        if e is not None and e.mean is not None
    ]
    return known[0] if known else None


def frontier(c: Comparison, metric: str, title: str) -> dict[str, Any] | None:
    """One reward against KL, a curve a method and strength, from base at KL 0; None where there is
    nothing to draw.
    """
    base = base_level(c, metric)
    curves = [
        (curve, [p for p in curve.points if _place(p, metric)])
        for curve in c.curves
        if curve.method != BASE
    ]
    curves = [(curve, points) for curve, points in curves if points]
    if not curves:
        return None
    estimates = [p.values[metric] for _, points in curves for p in points] + (
        [base] if base else []
    )
    heights = [v for e in estimates for v in (e.mean, e.low, e.high) if v is not None]
    kls = [
        v for _, points in curves for p in points for v in (p.kl.mean, p.kl.high) if v is not None
    ]
    if c.kl_target is not None:
        kls.append(c.kl_target)
    frame, drawn = _frame(kls, heights), []
    kinds = {(m, strength): css for m in c.rivals for css, strength in strengths(c, m)}
    for curve, points in curves:
        marks = [_mark(c, curve.method, curve.strength, p, metric, frame) for p in points]
        through = [place for p in points if (place := _place(p, metric)) is not None]
        if base is not None and base.mean is not None:
            through.insert(0, (0.0, base.mean))
        drawn.append(
            {
                "css": f"{css_of(c, curve.method)} {kinds[curve.method, curve.strength]}",
                "path": frame.path(through),
                "marks": marks,
            }
        )
    return {
        "title": title,
        "unit": "mean over seeds, 95 % intervals",
        "x_name": f"KL to base, nats per token{', square-root scale' if frame.root else ''}",
        "frame": frame,
        "curves": drawn,
        "target": None if c.kl_target is None else frame.at(c.kl_target, 0)[0],
        "base": None if base is None or base.mean is None else frame.at(0, base.mean),
    }


def _place(p: CurvePoint, metric: str) -> tuple[float, float] | None:
    value = p.values.get(metric)
    return (
        None
        if value is None or value.mean is None or p.kl.mean is None
        else (p.kl.mean, value.mean)
    )


def _frame(kls: list[float], heights: list[float]) -> Frame:
    far = max(1e-6, *kls)
    root = len(kls) > 2 and far > _WIDE * max(median(kls), 1e-9)
    # On a square-root axis even steps crowd near the end: few round numbers, chosen for where they
    # lie.
    x_values = [v for v in nice_ticks(0.0, far) if v <= far * 1.0001]
    if root:
        size = 10.0 ** math.floor(math.log10(far))
        steps = sorted(
            {
                round(s * size, 12)
                for s in (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 7)
                if s * size <= far
            }
        )
        x_values = [0.0]
        for v in steps:
            if math.sqrt(v / far) - math.sqrt(x_values[-1] / far) > 0.14:
                x_values.append(v)
    y_values = tuple(nice_ticks(min(heights), max(heights), 6))
    return Frame(
        _WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM, far * 1.03, tuple(x_values), y_values, root
    )


def _mark(
    c: Comparison, method: str, strength: str, p: CurvePoint, metric: str, frame: Frame
) -> dict[str, Any]:
    """A point with its bars, and what it says when it is pointed at."""
    value, (kl, mean) = p.values[metric], _place(p, metric) or (0.0, 0.0)
    x, y = frame.at(kl, mean)
    bars = []
    if value.low is not None and value.high is not None:
        bars.append((x, frame.at(kl, value.low)[1], x, frame.at(kl, value.high)[1]))
    if p.kl.low is not None and p.kl.high is not None:
        bars.append((frame.at(p.kl.low, mean)[0], y, frame.at(p.kl.high, mean)[0], y))
    digits = digits_for((value.low, value.high, value.mean))
    name = f"{method} {strength}".strip()
    when = "" if p.round is None else f", round {p.round}"
    note = (
        f"{name}{when}: {plain(mean, digits)} {bounds(value.low, value.high, digits)} at KL "
        f"{plain(kl, 4)}"
    )
    return {
        "d": marker_of(c, method, x, y),
        "bars": bars,
        "collapsed": p.collapsed,
        "note": f"{note}, collapsed" if p.collapsed else note,
    }


# ---- gains in the table --------------------------------------------------------------------------


def whisker_scale(estimates: Iterable[Estimate]) -> tuple[float, float]:
    """The range, 0 in it, that the cells of one reward share."""
    values = [v for e in estimates for v in (e.delta, e.low, e.high) if v is not None]
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def whisker(e: Estimate, scale: tuple[float, float]) -> dict[str, float | None]:
    """Places of zero, the gain and its interval's ends on a line of WHISKER units."""

    def at(value: float | None) -> float | None:
        return (
            None
            if value is None
            else round((value - scale[0]) / (scale[1] - scale[0]) * WHISKER, 1)
        )

    return {"zero": at(0.0), "delta": at(e.delta), "low": at(e.low), "high": at(e.high)}
