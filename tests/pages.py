"""What the tests of the HTML pages share: hostile text, a parsed page, its policy, its charts."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

HOSTILE = "<script>alert(1)</script>"
BREAKOUT = "\"><img src=x onerror='alert(2)'>"


class Page(HTMLParser):
    """Tags, attributes and text of a page; text is kept with whether it stands inside a <details>.

    The one that holds the rest of a list does not count: what is in it is folded only if it is
    folded by itself.
    """

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.folded: list[str] = []
        self.shown: list[str] = []
        self.summaries: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append("rest" if ("data-rest", None) in attrs else tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        opened = self.open.pop()
        assert opened == tag or (opened == "rest" and tag == "details")

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        (
            self.summaries
            if "summary" in self.open
            else self.folded
            if "details" in self.open
            else self.shown
        ).append(data)

    @property
    def words(self) -> str:
        """All text that is shown, with single blanks."""
        return " ".join(" ".join(self.shown).split())


def assert_sealed(html: str) -> None:
    """The policy allows the page's one style and one script by their hashes and nothing else, and
    nothing points outside.
    """
    page = Page(html)
    policies = [
        value
        for tag, name, value in page.attributes
        if tag == "meta" and name == "content" and "default-src" in value
    ]
    allowed = dict(part.strip().split(" ", 1) for part in policies[0].split(";"))
    hashes = {}
    for tag in ("style", "script"):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert len(inside) == page.tags.count(tag) == 1, tag
        hashes[f"{tag}-src"] = (
            f"'sha256-{base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()}'"
        )
        assert "url(" not in inside[0]
        assert "@import" not in inside[0]
    assert allowed == {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        **hashes,
    }
    assert len(policies) == 1
    assert html.index("Content-Security-Policy") < html.index("<style>")
    assert not {"img", "iframe", "object", "embed", "form", "a", "base"} & set(page.tags)
    outside = ("src", "href", "srcset", "action", "xlink:href", "data")
    assert [(tag, name, value) for tag, name, value in page.attributes if name in outside] == [
        ("link", "href", "data:,")
    ]
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]


def assert_escaped(html: str) -> None:
    """Hostile text made no element and no handler."""
    page = Page(html)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE not in html
    assert "<img" not in html


def marks_of(svg: str, layer: str) -> list[ElementTree.Element]:
    """The marks of a chart's layer, in the order in which they are drawn."""
    groups = [g for g in ElementTree.fromstring(svg).iter("g") if g.get("class") == layer]
    return [mark for group in groups for mark in group if mark.tag != "title"]


def place_of(mark: ElementTree.Element) -> tuple[float, float]:
    """Where a mark stands in the chart's plot area."""
    moved = re.findall(r"translate\((-?[\d.]+),(-?[\d.]+)\)", mark.get("transform", ""))
    assert len(moved) <= 1
    return (float(moved[0][0]), float(moved[0][1])) if moved else (0.0, 0.0)


def ends_of(line: ElementTree.Element) -> tuple[tuple[float, float], tuple[float, float]]:
    """Both ends of a rule."""
    x, y = place_of(line)
    return (x, y), (x + float(line.get("x2", 0)), y + float(line.get("y2", 0)))


def corners_of(path: ElementTree.Element) -> list[tuple[float, float]]:
    """The points of a path of straight lines."""
    pairs = re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", path.get("d", ""))
    return [(float(x), float(y)) for x, y in pairs]
