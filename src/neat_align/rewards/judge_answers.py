"""Reading a judge's answer, strictly: a verdict in the form that was asked for, or none.

Never a number out of running text: "not a 10, I would say 4" has two.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neat_align.rewards.judge_prompts import LABELS, TIE

# Of the probability that the score token's alternatives have together, this much must be scores.
_LEAST_MASS = 0.5
_MISSING = object()


class NoVerdictError(Exception):
    """An answer without a verdict; the message is the kind of failure, a few words that are
    counted.
    """


@dataclass(frozen=True)
class Verdict:
    """What was read: the value under the question's key, and the reasons, where they were given."""

    value: Any
    reasoning: str | None = None


def read_verdict(text: str, key: str) -> Verdict:
    """The verdict in an answer: a JSON object with the key, alone, in a code block, or in text.

    A model's thoughts (`<think>`) are passed over. Several objects must agree.
    """
    said = text.rsplit("</think>", 1)[-1].strip()
    if not said:
        raise NoVerdictError("empty answer")
    whole = _whole(said)
    found = _objects(said) if whole is _MISSING else [whole]
    objects = [value for value in found if isinstance(value, Mapping) and key in value]
    if not objects:
        if len(found) == 1 and not isinstance(found[0], Mapping | list):
            return Verdict(found[0])  # the bare value
        raise NoVerdictError("not the JSON that was asked for")
    if any(value[key] != objects[0][key] for value in objects[1:]):
        raise NoVerdictError("several verdicts that differ")
    reasoning = objects[0].get("reasoning")
    return Verdict(objects[0][key], reasoning if isinstance(reasoning, str) else None)


def _whole(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _MISSING


def _objects(text: str) -> list[Any]:
    """The outermost JSON objects in a text."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (start := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, start)
            found.append(value)
        except (ValueError, RecursionError):
            at = start + 1
    return found


def read_score(value: Any, scale: tuple[int, int]) -> float:
    """The score, a number on the scale (or a text that is nothing else)."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,9}(\.\d{1,9})?", value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise NoVerdictError("no number")
    if not scale[0] <= value <= scale[1]:
        raise NoVerdictError("outside of the scale")
    return float(value)


def read_better(value: Any) -> str:
    """ "A", "B" or "tie"."""
    said = value.strip() if isinstance(value, str) else value
    if said not in ("A", "B", TIE):
        raise NoVerdictError("neither A, B nor tie")
    return str(said)


def read_order(value: Any, n: int) -> list[int]:
    """Places of the answers, best first; every one of the `n` once."""
    labels = LABELS[:n]
    if not isinstance(value, list) or sorted(map(str, value)) != list(labels):
        raise NoVerdictError("not a ranking of all answers")
    return [labels.index(label) for label in value]


def expected_score(alternatives: Sequence[tuple[str, float]], scale: tuple[int, int]) -> float:
    """The mean of the scale by the probabilities of the score token (G-Eval, arXiv:2303.16634).

    `alternatives` are tokens with log-probabilities in nats. Those that are no score of one digit
    are left out and the rest is rescaled; NoVerdictError where the rest has less than half.
    """
    mass: dict[int, float] = {}
    for token, logprob in alternatives:
        plain = token.strip()
        if re.fullmatch(r"[0-9]", plain) and scale[0] <= int(plain) <= scale[1]:
            mass[int(plain)] = mass.get(int(plain), 0.0) + math.exp(logprob)
    total = sum(mass.values())
    if not total >= _LEAST_MASS:
        raise NoVerdictError("no score among the likeliest tokens")
    return sum(score * p for score, p in mass.items()) / total
