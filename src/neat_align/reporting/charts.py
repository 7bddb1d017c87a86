"""Geometry of the reports' charts in SVG units; the templates draw it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, quantiles
from typing import Any, TypeAlias

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 340.0, 190.0, 42.0, 10.0, 34.0
# Points of a strip beside its box: more say nothing more, and weigh on the page.
_STRIP = 80
# (rounds of training done, value)
Points: TypeAlias = list[tuple[float, float]]
# (rounds of training done, low, high)
Spreads: TypeAlias = list[tuple[float, float, float]]


@dataclass(frozen=True)
class Frame:
    """A chart's plot area in SVG units, x from 0 to `x_end`, y between its outer ticks.

    `root` puts x on a square-root scale.
    """

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
    x_names: tuple[str, ...] = ()

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data lies."""
        share = max(x, 0.0) / self.x_end
        low, high = self.y_values[0], self.y_values[-1]
        across = self.left + (math.sqrt(share) if self.root else share) * (self.right - self.left)
        return round(across, 1), round(
            self.top + (high - y) / (high - low) * (self.bottom - self.top), 1
        )

    def path(self, points: Points) -> str:
        """A line through points; empty for fewer than two."""
        return (
            "M" + " L".join(f"{x},{y}" for x, y in (self.at(*p) for p in points))
            if len(points) > 1
            else ""
        )

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """(place, label) of the ticks of y."""
        digits = decimals(self.y_values)
        return [
            (self.at(0, t)[1], f"{t + 0.0:,.{digits}f}".replace("-", "\u2212"))
            for t in self.y_values
        ]

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """(place, label) of the ticks of x."""
        names = self.x_names or tuple(f"{t:.6g}" for t in self.x_values)
        return [
            (self.at(t, self.y_values[0])[0], name)
            for t, name in zip(self.x_values, names, strict=True)
        ]


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


@dataclass(frozen=True)
class Series:
    """A line of a chart: its points, fainter points behind it, a band around it, and single bars
    where an interval is known.
    """

    name: str
    css: str
    points: Points
    faint: Points = field(default_factory=list)
    band: Spreads = field(default_factory=list)
    bars: Spreads = field(default_factory=list)

    def bounded(self) -> Series:
        """The same without numbers too large to draw."""
        band, bars = (
            [s for s in part if max(abs(s[1]), abs(s[2])) < 1e9] for part in (self.band, self.bars)
        )
        return Series(self.name, self.css, _bounded(self.points), _bounded(self.faint), band, bars)

    @property
    def values(self) -> list[float]:
        """Everything that must fit on the chart."""
        return [y for _, y in (*self.points, *self.faint)] + [
            v for _, *ends in (*self.band, *self.bars) for v in ends
        ]


def chart(title: str, unit: str, series: Sequence[Series], rounds: float) -> dict[str, Any] | None:
    """Geometry of one small line chart over rounds; None without points."""
    series = [s for s in (given.bounded() for given in series) if s.points or s.faint]
    if not series:
        return None
    values = [v for s in series for v in s.values]
    end = max(1.0, rounds, *(x for s in series for x, _ in (*s.points, *s.faint)))
    right = _WIDTH - (
        62.0 if len(series) > 1 else 10.0
    )  # room for the lines' names, when there are several
    x_values = tuple(float(i) for i in range(0, math.floor(end) + 1, max(1, math.ceil(end / 6))))
    y_values = tuple(nice_ticks(min(values), max(values)))
    frame = Frame(_WIDTH, _HEIGHT, _LEFT, right, _TOP, _HEIGHT - _BOTTOM, end, x_values, y_values)
    lines, ends = [], []
    for s in series:
        drawn = {
            "css": s.css,
            "path": frame.path(_thinned(s.points)),
            "faint": frame.path(_thinned(s.faint)),
        }
        dots = [frame.at(*p) for p in s.points] if len(s.points) <= 60 else []
        bars = [(*frame.at(x, low), frame.at(x, high)[1]) for x, low, high in s.bars]
        band = (
            frame.path(
                [(x, high) for x, _, high in s.band] + [(x, low) for x, low, _ in reversed(s.band)]
            )
            if len(s.band) > 1
            else ""
        )
        lines.append(drawn | {"dots": dots, "bars": bars, "band": f"{band} Z" if band else ""})
        ends.append((frame.at(*(s.points or s.faint)[-1])[1], s.name, s.css))
    labels = _apart(ends) if len(ends) > 1 else []
    return {
        "title": title,
        "unit": unit,
        "x_name": "rounds of training",
        "lines": lines,
        "labels": labels,
        "frame": frame,
    }


def box_chart(
    title: str,
    unit: str,
    css: str,
    columns: Sequence[tuple[str, Sequence[float]]],
    span: tuple[float, float],
) -> dict[str, Any]:
    """Geometry of box plots side by side, over a strip of the values; a column is (name, values),
    `span` the range of y.

    A box holds the middle half, its line is the median, the whiskers reach from the 5th to the 95th
    percentile.
    """
    x_values, y_values = tuple(i + 0.5 for i in range(len(columns))), tuple(nice_ticks(*span, 6))
    names = tuple(name for name, _ in columns)
    place = (_WIDTH, _HEIGHT, _LEFT, _WIDTH - 10.0, _TOP, _HEIGHT - _BOTTOM)
    frame = Frame(*place, float(len(columns)), x_values, y_values, x_names=names)
    half = min(16.0, 0.36 * (frame.right - frame.left) / len(columns))
    boxes = []
    for x, (name, values) in zip(x_values, columns, strict=True):
        if not values:
            continue
        cuts = quantiles(values, n=20, method="inclusive") if len(values) > 1 else [values[0]] * 19
        low, first, middle, third, high = (frame.at(x, cuts[i])[1] for i in (0, 4, 9, 14, 18))
        at = frame.at(x, values[0])[0]
        picked = sorted(values)[:: math.ceil(len(values) / _STRIP)]
        # Shifted by the golden ratio, so that neighbours in value stand apart and the picture is
        # the same every time.
        strip = "".join(
            f"M{at + half * (2 * (i * 0.618034 % 1) - 1):.1f},{frame.at(x, v)[1]}h0"
            for i, v in enumerate(picked)
        )
        note = (
            f"{title}, round {name}: {len(values)} completions, median {cuts[9]:.3f}, middle "
            f"half {cuts[4]:.3f} to {cuts[14]:.3f}"
        )
        boxes.append(
            {
                "x": at,
                "half": round(half, 1),
                "cuts": (low, first, middle, third, high),
                "strip": strip,
                "note": note,
            }
        )
    return {
        "title": title,
        "css": css,
        "unit": unit,
        "x_name": "round",
        "frame": frame,
        "boxes": boxes,
    }


def _bounded(points: Points) -> Points:
    return [p for p in points if abs(p[1]) < 1e9]


def _thinned(points: Points, most: int = 300) -> Points:
    size = max(1, math.ceil(len(points) / most))
    chunks = (points[i : i + size] for i in range(0, len(points), size))
    return (
        points if size == 1 else [(fmean(x for x, _ in c), fmean(y for _, y in c)) for c in chunks]
    )


def _apart(labels: list[tuple[float, str, str]], gap: float = 12.5) -> list[tuple[float, str, str]]:
    """Labels at their line's end, pushed apart until each has a line of its own, and back inside
    the chart.
    """
    placed: list[tuple[float, str, str]] = []
    for y, name, css in sorted(labels):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, name, css))
    floor = _HEIGHT - _BOTTOM
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = (min(placed[i][0], floor), *placed[i][1:])
        floor = placed[i][0] - gap
    return [(round(y, 1), name, css) for y, name, css in placed]
