"""What only the tests of the pages need."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import vl_convert


@cache
def _drawn(spec: str, settings: str) -> str:
    return str(_DRAW(json.loads(spec), **json.loads(settings)))


_DRAW = vl_convert.vegalite_to_svg


@pytest.fixture
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chart that an earlier test drew is not drawn again: the tests write some two hundred pages,
    most with the same charts.
    """

    def draw(spec: dict[str, Any], **settings: Any) -> str:
        return _drawn(json.dumps(spec), json.dumps(settings))

    monkeypatch.setattr(vl_convert, "vegalite_to_svg", draw)
