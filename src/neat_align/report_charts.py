"""Geometry of the report's small line charts; the template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, TypeAlias

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 340.0, 190.0, 42.0, 10.0, 34.0
# (rounds of training done, value)
Points: TypeAlias = list[tuple[float, float]]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that span a range, about `count` steps."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * max(1.0, abs(low)), high + 0.5 * max(1.0, abs(high))
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def chart(title: str, unit: str, series: Sequence[tuple[str, str, Points, Points]], rounds: float) -> dict[str, Any] | None:
    """Geometry of one small line chart over rounds; None without points. A series is (label, class, points, fainter points)."""
    series = [(name, css, _bounded(points), _bounded(faint)) for name, css, points, faint in series]
    series = [s for s in series if s[2] or s[3]]
    if not series:
        return None
    values = [y for _, _, points, faint in series for _, y in (*points, *faint)]
    ticks = nice_ticks(min(values), max(values))
    end = max(1.0, rounds, *(x for s in series for x, _ in (*s[2], *s[3])))
    step = max(1, math.ceil(end / 6))
    right = _WIDTH - (62.0 if len(series) > 1 else 10.0)  # room for the lines' names, when there are several
    decimals = max(len(f"{t:.6f}".rstrip("0").partition(".")[2]) for t in ticks)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + point[0] / end * (right - _LEFT)
        return round(x, 1), round(_TOP + (ticks[-1] - point[1]) / (ticks[-1] - ticks[0]) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def path(points: Points) -> str:
        return "M" + " L".join(f"{x},{y}" for x, y in map(at, _thinned(points))) if len(points) > 1 else ""

    lines, ends = [], []
    for name, css, points, faint in series:
        dots = [at(p) for p in points] if len(points) <= 60 else []
        lines.append({"css": css, "path": path(points), "dots": dots, "faint": path(faint)})
        ends.append((at((points or faint)[-1])[1], name, css))
    return {
        "title": title,
        "unit": unit,
        "lines": lines,
        "labels": _apart(ends) if len(ends) > 1 else [],
        "y_ticks": [(at((0, t))[1], t) for t in ticks],
        "decimals": decimals,
        "x_ticks": [(at((i, 0))[0], str(i)) for i in range(0, math.floor(end) + 1, step)],
        "box": {"left": _LEFT, "right": right, "top": _TOP, "bottom": _HEIGHT - _BOTTOM, "width": _WIDTH, "height": _HEIGHT},
    }


def _bounded(points: Points) -> Points:
    return [p for p in points if abs(p[1]) < 1e9]


def _thinned(points: Points, most: int = 300) -> Points:
    size = math.ceil(len(points) / most)
    chunks = (points[i : i + size] for i in range(0, len(points), size))
    return points if size <= 1 else [(fmean(x for x, _ in c), fmean(y for _, y in c)) for c in chunks]


def _apart(labels: list[tuple[float, str, str]], gap: float = 12.5) -> list[tuple[float, str, str]]:
    """Labels at their line's end, pushed apart until each has a line of its own, and back inside the chart."""
    placed: list[tuple[float, str, str]] = []
    for y, name, css in sorted(labels):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, name, css))
    floor = _HEIGHT - _BOTTOM
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = (min(placed[i][0], floor), *placed[i][1:])
        floor = placed[i][0] - gap
    return [(round(y, 1), name, css) for y, name, css in placed]
