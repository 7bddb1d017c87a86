"""What the HTML pages share: numbers in words, and how a page is rendered.

A page is one file. Everything that a model or a person wrote is escaped; its
Content-Security-Policy forbids the network and allows one style sheet and one script, each by its
hash. The script searches and filters; without it a page shows everything.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neat_align.files.atomic import write_atomic
from neat_align.prompts.rows import Prompt
from neat_align.reporting.run_files import number

if TYPE_CHECKING:
    from jinja2 import Environment


SHOWN_CHARACTERS = 6000
# Not allowed in HTML, or able to reorder what stands beside it: controls, surrogates, bidirectional
# overrides.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


# ---- numbers in words ----------------------------------------------------------------------------


def plain(value: Any, digits: int = 2) -> str:
    """A number with a true minus sign; a dash where there is none."""
    v = number(value)
    return "–" if v is None else f"{round(v, digits) + 0.0:,.{digits}f}".replace("-", "\u2212")


def signed(value: Any, digits: int = 2) -> str:
    """A difference with its sign; none where it rounds to zero."""
    text = plain(value, digits)
    v = number(value)
    return f"+{text}" if v is not None and round(v, digits) > 0 else text


def percent(value: Any) -> str:
    """A share of one as a percentage."""
    v = number(value)
    return "–" if v is None else f"{plain(100 * v, 0)}\u00a0%"


def bounds(low: Any, high: Any, digits: int = 2) -> str:
    """An interval; empty where an end is missing."""
    if number(low) is None or number(high) is None:
        return ""
    return f"[{plain(low, digits)},\u00a0{plain(high, digits)}]"


def change(delta: Any, low: Any, high: Any, digits: int = 2) -> str:
    """A difference and its interval, on one line."""
    return f"{signed(delta, digits)}\u00a0{bounds(low, high, digits)}".rstrip("\u00a0")


def digits_for(values: Iterable[Any]) -> int:
    """Decimals, 2 to 4, that show the spread of some numbers with two figures."""
    present = [v for v in map(number, values) if v is not None]
    spread = max(present, default=0.0) - min(present, default=0.0)
    return 2 if spread <= 0 else min(4, max(2, 1 - math.floor(math.log10(spread))))


def listed(names: Iterable[str]) -> str:
    """Names as a sentence has them: a, b and c."""
    first = list(names)
    last = first.pop() if first else ""
    return f"{', '.join(first)} and {last}" if first else last


def clipped(text: str) -> str:
    """A text of bearable length for a page."""
    left = len(text) - SHOWN_CHARACTERS
    return text if left <= 0 else f"{text[:SHOWN_CHARACTERS]} … ({left:,} more characters)"


def duration(value: Any) -> str | None:
    """Seconds as words."""
    seconds = number(value)
    if seconds is None:
        return None
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{seconds:.0f} s"


def replace_unprintable(text: str) -> str:
    """A text without characters that HTML and XML forbid or that reorder what stands beside them.

    Each is replaced by U+FFFD.
    """
    return _UNPRINTABLE.sub("\ufffd", text)


def turns(prompt: Prompt) -> list[tuple[str, str]]:
    """A prompt as (role, text) turns; a text prompt is one turn without a role."""
    if isinstance(prompt, str):
        return [("", prompt)]
    return [(str(m.get("role", "")), str(m.get("content", ""))) for m in prompt]


# ---- pages ---------------------------------------------------------------------------------------


def write_page(path: Path, template: str, context: Mapping[str, Any]) -> Path:
    """Render one of the package's templates to a file, atomically; returns its path."""
    page = render_page(template, context).encode("utf-8")
    write_atomic(path, lambda file: file.write(page))
    return path


def render_page(template: str, context: Mapping[str, Any]) -> str:
    """A page as text.

    Escaping is on for every expression, an unknown name in a template is an error.
    """
    environment = _environment()
    # The policy names what the browser will find between the tags, so the hash is of the rendered
    # text.
    hashes = {
        f"{kind}_hash": _csp_hash(environment.get_template(f"page.{kind}").render())
        for kind in ("css", "js")
    }
    return replace_unprintable(environment.get_template(template).render({**context, **hashes}))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("neat_align.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "plain": plain,
        "signed": signed,
        "percent": percent,
        "bounds": bounds,
        "clipped": clipped,
    }
    made.filters.update(filters)
    return made


def _csp_hash(text: str) -> str:
    """The text's hash as a Content-Security-Policy source."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"
