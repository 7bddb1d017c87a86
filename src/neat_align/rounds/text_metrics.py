"""What answers say about themselves as text: variety, repetition, refusals. No model, no reward."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

# How far into an answer a refusal is looked for, in characters: further on, the same words are
# mostly somebody's quoted speech.
REFUSAL_WINDOW = 160
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:really |very |so )?sorry,? but\b"
    r"|i(?: can(?:not|'t)| won't| will not|(?: am|'m) (?:not able|unable) to) "
    r"(?:help|assist|answer|provide|support|engage|comply|fulfil|give|offer|discuss|do that)"
    r"|as an ai\b"
    r"|(?:i|we) (?:do not|don't) (?:feel comfortable|condone)"
    r"|it(?:'s| is) not (?:appropriate|ethical|right|okay) to"
    r"|i(?:'m| am) not (?:able|allowed|comfortable|going) to"
    r"|i would rather not|i'd rather not)",
    re.IGNORECASE,
)


def distinct_n(texts: Iterable[str], n: int = 2) -> float:
    """Share of distinct word n-grams among all word n-grams of the texts together.

    Li et al., 2016. NaN without any.
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        grams.update(_grams(text, n))
    total = sum(grams.values())
    return len(grams) / total if total else math.nan


def repetition(text: str, n: int = 3) -> float:
    """Share of an answer's word n-grams that repeat an earlier one of the same answer.

    Welleck et al., 2019. 0 without any.
    """
    grams = _grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_refusal(text: str) -> bool:
    """Whether an answer begins by declining or deflecting ("I'm sorry, but", "As an AI").

    By its wording alone.
    """
    return _REFUSAL.search(text[:REFUSAL_WINDOW].replace("\u2019", "'")) is not None


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
