"""The diagrams of docs/pictures.md: python scripts/site_pictures.py writes docs/assets/*.svg.

Colours are legible on light and dark pages; text stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
GOOD, BAD, PLAIN, INK = "#2e8b57", "#c0392b", "#7a7f87", "#5a6472"


def text(
    x: float, y: float, words: str, *, anchor: str = "middle", size: int = 14, ink: str = INK
) -> str:
    """A line of text."""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{ink}">'
        f"{escape(words)}</text>"
    )


def box(x: float, y: float, w: float, h: float, lines: Sequence[str], ink: str = INK) -> str:
    """A box with centred lines."""
    first = y + h / 2 + 5 - 9 * (len(lines) - 1)
    shape = (
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="8" fill="{ink}" '
        f'fill-opacity="0.12" stroke="{ink}" stroke-width="1.5"/>'
    )
    return shape + "".join(
        text(x + w / 2, first + 18 * i, line, ink=ink) for i, line in enumerate(lines)
    )


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight arrow."""
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}" '
        'stroke-width="1.5" marker-end="url(#tip)"/>'
    )


def page(width: int, height: int, parts: Sequence[str], title: str) -> str:
    """A whole SVG file."""
    tip = (
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif" role="img"><title>{escape(title)}</title>'
        f"{tip}{''.join(parts)}</svg>\n"
    )


def round_() -> str:
    """One round: sample, score, rank, learn, again."""
    parts = [
        box(10, 85, 120, 60, ["prompt"]),
        box(186, 15, 200, 50, ["“answer kindly” + prompt"], GOOD),
        box(186, 90, 200, 50, ["prompt"], PLAIN),
        box(186, 165, 200, 50, ["“answer rudely” + prompt"], BAD),
        box(430, 15, 100, 50, ["answers +"], GOOD),
        box(430, 90, 100, 50, ["answers"], PLAIN),
        box(430, 165, 100, 50, ["answers −"], BAD),
        box(590, 85, 90, 60, ["reward"]),
        box(740, 85, 110, 60, ["ranked", "group"]),
        box(740, 205, 110, 50, ["learn, on the", "plain prompt"]),
        text(540, 240, "the policy writes all of them", size=12),
        text(520, 318, "next round: from the improved policy", size=12),
    ]
    for y in (40, 115, 190):
        parts += [arrow(132, 115, 182, y), arrow(388, y, 426, y), arrow(532, y, 586, 115)]
    parts += [arrow(682, 115, 736, 115), arrow(795, 147, 795, 201)]
    parts.append(
        f'<path d="M738 232 C 560 300 330 300 285 219" fill="none" stroke="{INK}" '
        'stroke-width="1.5" stroke-dasharray="5 4" marker-end="url(#tip)"/>'
    )
    return page(860, 326, parts, "One round of NEAT")


def spread() -> str:
    """How far apart rewards of plain and of instructed answers lie: a sketch, no measurement."""
    parts = [text(20, 30, "four plain answers", anchor="start")]
    for x in (390, 410, 425, 445):
        parts.append(f'<circle cx="{x}" cy="52" r="8" fill="{PLAIN}"/>')
    parts.append(text(20, 112, "two of each instruction", anchor="start"))
    for x, ink in ((250, BAD), (300, BAD), (520, GOOD), (575, GOOD)):
        parts.append(f'<circle cx="{x}" cy="134" r="8" fill="{ink}"/>')
    for y in (52, 134):
        parts.append(
            f'<line x1="200" y1="{y + 16}" x2="660" y2="{y + 16}" stroke="{INK}" '
            'stroke-width="1" marker-end="url(#tip)"/>'
        )
    parts.append(text(660, 175, "reward", anchor="end", size=12))
    parts.append(text(20, 175, "a sketch; probe measures yours", anchor="start", size=12))
    return page(680, 190, parts, "Instructions spread the answers")


def packed() -> str:
    """Padded rows against one packed row."""
    parts = [text(20, 24, "padded rows", anchor="start")]
    answers = (70, 110, 90)
    for i, width in enumerate(answers):
        y = 36 + 34 * i
        parts += [box(20, y, 260, 26, ["prompt"]), box(284, y, width, 26, [f"y{i + 1}"], GOOD)]
        if width < max(answers):
            parts.append(
                f'<rect x="{288 + width}" y="{y}" width="{max(answers) - 4 - width}" height="26" '
                f'rx="6" fill="none" stroke="{PLAIN}" stroke-dasharray="4 3"/>'
            )
    parts.append(text(20, 166, "one packed row", anchor="start"))
    parts.append(box(20, 178, 260, 26, ["prompt"]))
    x = 284
    for i, width in enumerate(answers):
        parts.append(box(x, 178, width, 26, [f"y{i + 1}"], GOOD))
        x += width + 4
    parts.append(text(20, 230, "every answer sees the prompt and itself", anchor="start", size=12))
    return page(600, 240, parts, "A group's prompt is read once")


def contrast() -> str:
    """Contrast distillation at one token."""
    parts = [
        box(10, 15, 250, 50, ["start policy, “answer kindly”"], GOOD),
        box(10, 85, 250, 50, ["start policy, plain prompt"], PLAIN),
        box(10, 155, 250, 50, ["start policy, “answer rudely”"], BAD),
        box(330, 85, 210, 50, ["plain × (kind ÷ rude)^α", "for every next word"]),
        box(610, 85, 200, 50, ["the policy learns that", "on the plain prompt"]),
        text(560, 190, "at every token of the policy’s own plain answers", size=12),
    ]
    parts += [arrow(262, y, 326, 110) for y in (40, 110, 180)]
    parts.append(arrow(542, 110, 606, 110))
    return page(820, 220, parts, "Contrast distillation at a token")


PICTURES: dict[str, Callable[[], str]] = {
    "round": round_,
    "spread": spread,
    "packed": packed,
    "contrast": contrast,
}


def main() -> None:
    """Write every diagram."""
    for name, draw in PICTURES.items():
        (ASSETS / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
