"""Deep copies of rows' values, for code that may change what it is given."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

T = TypeVar("T")
_UNCHANGEABLE = (str, int, float, bool, type(None), bytes, complex)


def deep_copy(value: T) -> T:
    """A copy that shares nothing changeable with `value`, as far as Python can make one.

    Lists, dicts and tuples are copied all the way down; what holds no copy (a lock, an open file, a
    tensor within a graph) is the same object in the copy as in `value`. Where one object stands
    twice in `value`, its copy does as well.
    """
    copied: T = _copied(value, {})
    return copied


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _UNCHANGEABLE:
        return value
    if id(value) in memo:
        return memo[id(value)]
    # `copy.deepcopy` is ten times slower on plain data, and gives a whole list up for one lock.
    if kind is list:
        items: list[Any] = []
        memo[id(value)] = items
        items.extend(_copied(item, memo) for item in value)
        return items
    if kind is dict:
        pairs: dict[Any, Any] = {}
        memo[id(value)] = pairs
        pairs.update((_copied(k, memo), _copied(v, memo)) for k, v in value.items())
        return pairs
    if kind is tuple:
        return tuple(_copied(item, memo) for item in value)
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001 - an object may refuse to be copied with any exception
        return value
