"""A Vega-Lite chart as static SVG that may stand inside a page: no scripts, no styles, no ids, and
colours that follow the page.

vl-convert compiles and draws the chart in this process, without a browser and without the network.
Vega-Lite's own reference says what a specification may hold: https://vega.github.io/vega-lite/docs/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from xml.etree import ElementTree

from markupsafe import Markup

from neat_align.reporting.pages import replace_unprintable

# A chart in Vega-Lite's JSON, or a part of one.
Spec: TypeAlias = dict[str, Any]
Rows: TypeAlias = list[dict[str, Any]]
VEGA_LITE = "6.4"
# Colours are CSS variables of page.css, so that one SVG serves light and dark.
_CONFIG: Spec = {
    "aria": False,  # the marks' own descriptions become titles below
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
_INHERITED = frozenset(
    (
        "fill",
        "font-size",
        "stroke",
        "stroke-dasharray",
        "stroke-linecap",
        "stroke-width",
        "text-anchor",
    )
)
# Said about a chart that reacts to a pointer, which a static one does not, or what CSS says.
_DROPPED = ("aria-hidden", "aria-roledescription", "font-family", "pointer-events", "role")
_GEOMETRY = frozenset(("d", "height", "transform", "width", "x", "x2", "y", "y2"))
_LONG_FRACTION = re.compile(r"-?\d+\.\d{2,}")
_NAMESPACE = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Figure:
    """A drawn chart with its caption."""

    title: str
    unit: str
    svg: Markup


def layer(name: str, mark: Spec, rows: Rows, encoding: Spec) -> Spec:
    """One layer of a chart: a mark a row; in the SVG its marks stand in a group of the class
    `name`.
    """
    return {"name": name, "mark": mark, "data": {"values": rows}, "encoding": encoding}


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
    kept = [child for child in element if not _draws_nothing(child)]
    element[:] = [inner for child in kept for inner in (child if _is_bare(child) else [child])]
    if element.tag == f"{_NAMESPACE}g" and len(element) > 1:
        for name in _INHERITED - element.attrib.keys():
            values = {child.get(name) for child in element}
            if len(values) == 1 and (value := values.pop()) is not None:
                element.set(name, value)
                for child in element:
                    del child.attrib[name]


def _clean_attributes(element: ElementTree.Element) -> None:
    attributes = {k: v for k, v in element.attrib.items() if k not in _DROPPED}
    if attributes.get("opacity") == "1":
        del attributes["opacity"]
    layer = attributes.pop("class", "").split()[-1:]
    if layer and layer[0].endswith("_marks") and not layer[0].startswith("layer_"):
        attributes["class"] = layer[0].removesuffix("_marks")
    label = attributes.pop("aria-label", None)
    if label:
        element.insert(0, _element(f"{_NAMESPACE}title", label))
    element.attrib = {
        name: _LONG_FRACTION.sub(_rounded, value) if name in _GEOMETRY else value
        for name, value in attributes.items()
    }
    if element.get("transform") == "translate(0,0)":
        del element.attrib["transform"]


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _draws_nothing(element: ElementTree.Element) -> bool:
    """A group without content, or a path without a line or a colour: frames of groups."""
    if element.tag == f"{_NAMESPACE}g":
        return len(element) == 0
    painted = element.get("stroke") or element.get("fill")
    return element.tag == f"{_NAMESPACE}path" and (not element.get("d") or not painted)


def _is_bare(element: ElementTree.Element) -> bool:
    return element.tag == f"{_NAMESPACE}g" and not element.attrib
