"""Conversations that are too long, without their oldest turns (`drop_old_turns`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from neat_align.prompts.rows import Message, PromptRow

logger = logging.getLogger(__name__)


def without_old_turns(row: PromptRow, fits: Callable[[PromptRow], bool]) -> PromptRow | None:
    """The row with as many of its newest turns as fit; None where not even the last ones do.

    System turns at the beginning stay, and what follows them begins with a user turn, so that no
    answer and no result of a tool stands without what it answers. Nothing is cut inside of a turn.
    `fits` is asked a few times (it is taken to hold for all that is shorter than what fits).
    """
    if isinstance(row.prompt, str):
        return None
    starts = _starts(row.prompt)
    first, last = 0, len(starts)  # the first start that fits is in between; `last`: none does
    while first < last:
        middle = (first + last) // 2
        if fits(_from(row, starts[middle])):
            last = middle
        else:
            first = middle + 1
    return _from(row, starts[first]) if first < len(starts) else None


def _system_turns(prompt: list[Message]) -> int:
    others = (i for i, message in enumerate(prompt) if message["role"] != "system")
    return next(others, len(prompt))


def _starts(prompt: list[Message]) -> list[int]:
    """Where a shorter conversation may begin: at each user turn but the one it begins with now."""
    head = _system_turns(prompt)
    return [i for i in range(head + 1, len(prompt)) if prompt[i]["role"] == "user"]


def _from(row: PromptRow, start: int) -> PromptRow:
    prompt = row.prompt
    assert not isinstance(prompt, str)
    return replace(row, prompt=[*prompt[: _system_turns(prompt)], *prompt[start:]])


class Shortened:
    """Conversations that lost turns: how many, how many turns, and the first of them.

    `ids` are the rows'.
    """

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.turns = 0
        self._first = ""

    def add(self, before: PromptRow, after: PromptRow) -> None:
        """A row before and after."""
        dropped = len(before.prompt) - len(after.prompt)
        if not self.ids:
            self._first = f"{before.where}, {dropped} of {len(before.prompt)}"
        self.ids.add(before.id)
        self.turns += dropped

    def tell(self, name: str, limit: int) -> None:
        """Say it once; `name` is the data's, `limit` the tokens of a prompt."""
        if self.ids:
            rows = "conversation is" if len(self.ids) == 1 else "conversations are"
            logger.warning(
                "%s: %s %s too long (max_prompt_length=%d) and used without the oldest turns: %s "
                "in all; the first: %s",
                name,
                f"{len(self.ids):,}",
                rows,
                limit,
                f"{self.turns:,} turn{'s' * (self.turns > 1)}",
                self._first,
            )
