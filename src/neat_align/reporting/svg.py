"""A Vega-Lite chart as static SVG that may stand inside a page: no scripts, no styles, no ids, and
colours that follow the page.

vl-convert compiles and draws the chart in this process, without a browser and without the network.
Vega-Lite's own reference says what a specification may hold: https://vega.github.io/vega-lite/docs/
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from xml.etree import ElementTree

from markupsafe import Markup

from neat_align.reporting.pages import replace_unprintable

# A chart in Vega-Lite's JSON, or a part of one.
Spec: TypeAlias = dict[str, Any]
Rows: TypeAlias = list[dict[str, Any]]
# The version of the grammar: vl-convert holds several, so that a chart stays as it is.
VEGA_LITE = "6.4"
# Colours are CSS variables of page.css, so that one SVG serves light and dark.
_CONFIG: Spec = {
    # Only the marks' own descriptions are wanted: they become titles.
    "aria": False,
    "background": None,
    "view": {"stroke": None},
    "axis": {
        "aria": False,
        "domain": False,
        "gridColor": "var(--hair)",
        "labelColor": "var(--soft)",
        "labelFontSize": 11,
        "tickColor": "var(--rule)",
        "titleColor": "var(--soft)",
        "titleFontSize": 11,
        "titleFontWeight": "normal",
    },
    "axisX": {"grid": False, "labelFlush": False},
    "axisY": {"ticks": False, "labelPadding": 6},
    "legend": {
        "aria": False,
        "labelColor": "var(--soft)",
        "labelFontSize": 11,
        "offset": 10,
        "orient": "top",
        "symbolSize": 50,
        "title": None,
    },
}
# What a parent may say for all of its children.
_INHERITED = (
    "fill",
    "font-size",
    "stroke",
    "stroke-dasharray",
    "stroke-linecap",
    "stroke-width",
    "text-anchor",
)
# Of use in a chart that reacts to a pointer, which a static one does not; the style sheet names the
# font.
_DROPPED = ("aria-hidden", "aria-roledescription", "font-family", "pointer-events", "role")
_GEOMETRY = ("d", "transform", "x2", "y2")
_LONG_FRACTION = re.compile(r"-?\d+\.\d{2,}")
_NAMESPACE = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Figure:
    """A drawn chart with its caption, or (name, value, interval) where there is nothing to draw."""

    title: str
    unit: str
    svg: Markup | None
    numbers: tuple[tuple[str, str, str], ...] = ()


def layer(name: str, mark: Spec, rows: Rows, encoding: Spec) -> Spec:
    """One layer of a chart: a mark a row; in the SVG its marks stand in a group of the class
    `name`.
    """
    return {"name": name, "mark": mark, "data": {"values": rows}, "encoding": encoding}


def axis_span(values: Iterable[float]) -> tuple[float, float]:
    """The range of some numbers, one at least; with room around numbers that are all the same, for
    which Vega-Lite would write a rounded number at the axis.
    """
    present = list(values)
    low, high = min(present), max(present)
    if high - low < 1e-9 * max(1.0, abs(high)):
        return low - 0.5 * max(1.0, abs(low)), high + 0.5 * max(1.0, abs(high))
    return low, high


def draw(chart: Spec, label: str, description: str, size: tuple[int, int]) -> Markup:
    """The chart as an `<svg>` of this width and height in CSS pixels, that scales with its place.

    `label` is its accessible name and `description` what it shows, in words. A mark's `description`
    channel becomes its `<title>`.
    """
    import vl_convert

    text = vl_convert.vegalite_to_svg(
        _printable(fitted(chart, size)), vl_version=VEGA_LITE, config=_CONFIG, allowed_base_urls=[]
    )
    return _inline(text, label, description)


def fitted(chart: Spec, size: tuple[int, int]) -> Spec:
    """The chart with its axes and legend in a frame of this width and height."""
    frame = {"type": "fit", "contains": "padding"}
    return {**chart, "width": size[0], "height": size[1], "autosize": frame, "padding": 4}


def _printable(spec: Any) -> Any:
    """The same specification without characters that XML does not allow."""
    if isinstance(spec, str):
        return replace_unprintable(spec)
    if isinstance(spec, Mapping):
        return {key: _printable(value) for key, value in spec.items()}
    if isinstance(spec, list | tuple):
        return [_printable(value) for value in spec]
    return spec


def _inline(text: str, label: str, description: str) -> Markup:
    """vl-convert's SVG as part of a page, and shorter."""
    root = ElementTree.fromstring(text)  # noqa: S314 (vl-convert wrote it, with our texts escaped)
    _shorten(root)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": replace_unprintable(label),
    }
    root.insert(0, _element("desc", replace_unprintable(description)))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_NAMESPACE)
    # ElementTree escapes texts and attributes.
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704


def _element(tag: str, text: str) -> ElementTree.Element:
    made = ElementTree.Element(tag)
    made.text = text
    return made


def _shorten(element: ElementTree.Element) -> None:
    """Take away what draws nothing, put common attributes on the parent, and round numbers."""
    for child in list(element):
        _shorten(child)
    _clean_attributes(element)
    kept: list[ElementTree.Element] = []
    for child in element:
        if _is_bare(child):
            kept.extend(child)
        elif not _draws_nothing(child):
            kept.append(child)
    element[:] = kept
    if element.tag == f"{_NAMESPACE}g" and len(element) > 1:
        _share_attributes(element)


def _share_attributes(group: ElementTree.Element) -> None:
    """Say once on the group what all of its children say alike."""
    for name in _INHERITED:
        values = {child.get(name) for child in group}
        value = values.pop()
        if values or value is None or name in group.attrib:
            continue
        group.set(name, value)
        for child in group:
            del child.attrib[name]


def _clean_attributes(element: ElementTree.Element) -> None:
    """Keep what is drawn; of the classes the layer's name, and of the labels a title."""
    attributes = {k: v for k, v in element.attrib.items() if k not in _DROPPED}
    for name in _GEOMETRY:
        if name in attributes:
            attributes[name] = _LONG_FRACTION.sub(_rounded, attributes[name])
    for name, default in (("opacity", "1"), ("transform", "translate(0,0)")):
        if attributes.get(name) == default:
            del attributes[name]
    for css in attributes.pop("class", "").split():
        if css.endswith("_marks"):
            attributes["class"] = css.removesuffix("_marks")
    label = attributes.pop("aria-label", None)
    if label:
        element.insert(0, _element(f"{_NAMESPACE}title", label))
    element.attrib = attributes


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _draws_nothing(element: ElementTree.Element) -> bool:
    """A group without content, or a path without a line or a colour, as groups have for frames."""
    if element.tag == f"{_NAMESPACE}g":
        return len(element) == 0
    painted = element.get("stroke") or element.get("fill")
    return element.tag == f"{_NAMESPACE}path" and (not element.get("d") or not painted)


def _is_bare(element: ElementTree.Element) -> bool:
    """A group that says nothing about its children."""
    return element.tag == f"{_NAMESPACE}g" and not element.attrib
