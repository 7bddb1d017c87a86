"""Optional arguments of a reward function: TRL's `trainer_state`, `log_metric` and `log_extra`, and
`log_total`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

from neat_align.errors import RewardError
from neat_align.prompts.copies import deep_copy
from neat_align.rewards.protocol import NamedReward

logger = logging.getLogger(__name__)
OPTIONAL_ARGUMENTS = ("trainer_state", "log_metric", "log_extra", "log_total")


class CallLog:
    """What the reward function `name` logs in one call on `rows` rows.

    It knows nothing of the trainer: a function may keep what it is given, and would keep that too.
    """

    def __init__(self, name: str, rows: int) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.totals: dict[str, float] = {}
        self.extra: dict[str, list[Any]] = {}
        self._name, self._rows, self._is_open = name, rows, True

    def arguments_for(self, reward: NamedReward) -> dict[str, Any]:
        """The optional arguments that the function's signature names."""
        available: dict[str, Callable[[], Any]] = {
            "trainer_state": lambda: _copy_of_state(reward),
            "log_metric": lambda: self.log_metric,
            "log_extra": lambda: self.log_extra,
            "log_total": lambda: self.log_total,
        }
        return {name: available[name]() for name in named_by(reward.function, OPTIONAL_ARGUMENTS)}

    def log_metric(self, name: str, value: Any) -> None:
        """A number of this call, to be averaged with those of the other calls and logged.

        One that is not finite is warned of and left out: it would hide all others.
        """
        number = self._number("log_metric", name, value)
        if number is not None:
            self.metrics.setdefault(str(name), []).append(number)

    def log_total(self, name: str, value: Any) -> None:
        """A number of this call, to be added to those of the other calls and logged: tokens, say.

        One that is not finite is warned of and left out.
        """
        number = self._number("log_total", name, value)
        if number is not None:
            self.totals[str(name)] = self.totals.get(str(name), 0.0) + number

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Values of a column, one a row; several calls add up."""
        self._check_open("log_extra")
        self.extra.setdefault(str(column), []).extend(_as_json(value) for value in values)

    def close(self) -> None:
        """The call is over. Raises RewardError for a column without one value a row."""
        self._is_open = False
        for column, values in self.extra.items():
            if len(values) != self._rows:
                raise RewardError(
                    f"reward function {self._name!r} gave log_extra {len(values)} values of "
                    f"{column!r} for {self._rows} completions: one a completion is needed"
                )

    def _number(self, what: str, name: str, value: Any) -> float | None:
        """The value as a number; None, with a warning, where it is not finite."""
        self._check_open(what)
        plain = value.item() if getattr(value, "ndim", None) == 0 else value
        if not isinstance(plain, numbers.Real):
            raise RewardError(
                f"reward function {self._name!r} gave {what} {name!r} as "
                f"{type(value).__name__} {str(value)[:80]!r}; it must be one number"
            )
        if math.isfinite(plain):
            return float(plain)
        logger.warning("reward function %r logged %s as %r: left out", self._name, plain, name)
        return None

    def _check_open(self, what: str) -> None:
        if not self._is_open:
            raise RewardError(
                f"reward function {self._name!r} called {what} after the call that it was "
                "given for: call it before returning"
            )


def _copy_of_state(reward: NamedReward) -> Any:
    if reward.trainer_state is None:
        return None
    state = copy.copy(reward.trainer_state())
    vars(state).update((name, deep_copy(value)) for name, value in vars(state).items())
    return state


def named_by(function: Any, names: Iterable[str]) -> list[str]:
    """Which of these arguments the function's signature names, and has not been given already."""
    bound: set[str] = set()
    plain = function
    while isinstance(plain, functools.partial):
        bound |= plain.keywords.keys()
        plain = plain.func
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions of C have none
        return []
    return [
        name
        for name in names
        if name in parameters
        and name not in bound
        and parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
    ]


def _as_json(value: Any) -> Any:
    """The value now, as plain data; text where JSON has no form for it."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    try:
        return json.loads(json.dumps(plain, default=str, allow_nan=False))
    except (TypeError, ValueError):
        return str(value)
