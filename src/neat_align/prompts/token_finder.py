"""Finds any of thousands of tokens in a text, in a time that does not depend on their number."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence


class TokenFinder:
    """Finds any of some tokens in a text: left to right, the longest first, as tokenizers do.

    The time depends on the text, not on how many tokens there are.
    """

    def __init__(self, tokens: Collection[str]) -> None:
        self.tokens = frozenset(tokens) - {""}
        # Lengths by first character, the longest first: "<" may begin thousands of tokens.
        self._lengths: dict[str, list[int]] = {}
        for first, length in sorted({(t[0], len(t)) for t in self.tokens}, reverse=True):
            self._lengths.setdefault(first, []).append(length)
        firsts = "".join(map(re.escape, self._lengths))
        self._starts = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def at(self, text: str, start: int) -> str | None:
        """The token that begins at `start`, or None."""
        for length in self._lengths.get(text[start : start + 1], ()):
            if text[start : start + length] in self.tokens:
                return text[start : start + length]
        return None

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """(start, token) of every one in the text; they do not overlap."""
        end = 0
        for match in self._starts.finditer(text):
            if match.start() >= end and (token := self.at(text, match.start())) is not None:
                yield match.start(), token
                end = match.start() + len(token)

    def tokens_in(self, value: object) -> set[str]:
        """Those in any text of plain data, keys of objects included."""
        if isinstance(value, str):
            return {token for _, token in self.find(value)}
        if isinstance(value, Mapping):
            parts: Sequence[object] = [*value, *value.values()]
        elif isinstance(value, list | tuple):
            parts = value
        else:
            return set()
        return set().union(*map(self.tokens_in, parts))
