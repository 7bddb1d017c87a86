"""Geometry of the reports' charts in SVG units; the templates draw it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeAlias

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 340.0, 190.0, 42.0, 10.0, 34.0
# (rounds of training done, value)
Points: TypeAlias = list[tuple[float, float]]


@dataclass(frozen=True)
class Frame:
    """A chart's plot area in SVG units, x from 0 to `x_end`, y between its outer ticks. `root` puts x on a square-root scale."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_end: float
    x_values: tuple[float, ...]
    y_values: tuple[float, ...]
    root: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data lies."""
        share = max(x, 0.0) / self.x_end
        low, high = self.y_values[0], self.y_values[-1]
        across = self.left + (math.sqrt(share) if self.root else share) * (self.right - self.left)
        return round(across, 1), round(self.top + (high - y) / (high - low) * (self.bottom - self.top), 1)

    def path(self, points: Points) -> str:
        """A line through points; empty for fewer than two."""
        return "M" + " L".join(f"{x},{y}" for x, y in (self.at(*p) for p in points)) if len(points) > 1 else ""

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """(place, label) of the ticks of y."""
        digits = decimals(self.y_values)
        return [(self.at(0, t)[1], f"{t + 0.0:,.{digits}f}".replace("-", "\u2212")) for t in self.y_values]

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """(place, label) of the ticks of x."""
        return [(self.at(t, self.y_values[0])[0], f"{t:.6g}") for t in self.x_values]


def decimals(ticks: Sequence[float]) -> int:
    """Decimals that tell ticks apart."""
    return max(len(f"{t:.6f}".rstrip("0").partition(".")[2]) for t in ticks)


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
    end = max(1.0, rounds, *(x for s in series for x, _ in (*s[2], *s[3])))
    right = _WIDTH - (62.0 if len(series) > 1 else 10.0)  # room for the lines' names, when there are several
    x_values = tuple(float(i) for i in range(0, math.floor(end) + 1, max(1, math.ceil(end / 6))))
    y_values = tuple(nice_ticks(min(values), max(values)))
    frame = Frame(_WIDTH, _HEIGHT, _LEFT, right, _TOP, _HEIGHT - _BOTTOM, end, x_values, y_values)
    lines, ends = [], []
    for name, css, points, faint in series:
        dots = [frame.at(*p) for p in points] if len(points) <= 60 else []
        lines.append({"css": css, "path": frame.path(_thinned(points)), "dots": dots, "faint": frame.path(_thinned(faint))})
        ends.append((frame.at(*(points or faint)[-1])[1], name, css))
    labels = _apart(ends) if len(ends) > 1 else []
    return {"title": title, "unit": unit, "x_name": "rounds of training", "lines": lines, "labels": labels, "frame": frame}


def _bounded(points: Points) -> Points:
    return [p for p in points if abs(p[1]) < 1e9]


def _thinned(points: Points, most: int = 300) -> Points:
    size = max(1, math.ceil(len(points) / most))
    chunks = (points[i : i + size] for i in range(0, len(points), size))
    return points if size == 1 else [(fmean(x for x, _ in c), fmean(y for _, y in c)) for c in chunks]


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
