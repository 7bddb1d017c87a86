"""Crashes, as sudden as a kill, at a chosen moment of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neat_align.rounds.rollout_store import RolloutStore


class Crash(BaseException):
    """As sudden as a kill: nothing in the code under test may catch it."""


def crash_at_rename(patch: pytest.MonkeyPatch, point: int, *, before: bool) -> None:
    """The `point`-th rename from now on crashes, just before or just after it is done.

    Everything durable is renamed into place.
    """
    rename, seen = Path.replace, 0

    def crashing(self: Path, target: Any) -> Path:
        nonlocal seen
        seen += 1
        if seen == point and before:
            raise Crash
        done = rename(self, target)
        if seen == point:
            raise Crash
        return done

    patch.setattr(Path, "replace", crashing)


def crash_in_second_round(patch: pytest.MonkeyPatch, method: str, after: int) -> None:
    """A run's second round crashes where this method of its `RolloutStore` was called `after` times
    and is called again.
    """
    write, calls = getattr(RolloutStore, method), 0

    def crashing(self: RolloutStore, *arguments: Any) -> None:
        nonlocal calls
        if self.folder.parents[1].name == "00001":
            calls += 1
            if calls > after:
                raise Crash
        write(self, *arguments)

    patch.setattr(RolloutStore, method, crashing)
