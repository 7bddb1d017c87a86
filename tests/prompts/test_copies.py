"""Deep copies of what a row of data may hold."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from neat_align.prompts.copies import deep_copy

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner) | st.sets(st.text())
    ),
)


def changeable(value: Any) -> set[int]:
    """The ids of everything in `value` that can be changed."""
    if isinstance(value, list | tuple | set):
        inside = set().union(*map(changeable, value)) if value else set()
        return inside | (set() if isinstance(value, tuple) else {id(value)})
    if isinstance(value, dict):
        return {id(value)}.union(*map(changeable, value.values()))
    return set()


@given(JSON)
def test_a_copy_is_equal_and_shares_nothing_that_can_be_changed(value: Any) -> None:
    copied = deep_copy(value)
    assert copied == value
    assert type(copied) is type(value)
    assert not changeable(copied) & changeable(value)


def test_arrays_and_objects_are_copied_and_what_cannot_be_is_shared() -> None:
    class Holder:
        def __init__(self) -> None:
            self.items = [1]

    class Refuses:
        def __deepcopy__(self, memo: Any) -> Any:
            raise NotImplementedError

    lock, refuses = threading.Lock(), Refuses()
    in_a_graph = torch.ones(2, requires_grad=True) * 2
    row = {
        "a": [np.zeros(2), torch.zeros(2), Holder()],
        "b": [lock, in_a_graph, refuses, {"c": []}],
    }
    copied = deep_copy(row)
    copied["a"][0][0] = copied["a"][1][0] = 9
    copied["a"][2].items.append(2)
    copied["b"][3]["c"].append(1)
    assert row["a"][0][0] == row["a"][1][0] == 0
    assert row["a"][2].items == [1]
    assert row["b"][3] == {"c": []}  # its neighbours have no copy, and it has one all the same
    for i, same in enumerate((lock, in_a_graph, refuses)):
        assert copied["b"][i] is same


def test_what_stands_twice_or_in_itself_does_so_in_the_copy() -> None:
    inner: list[Any] = [1]
    ring: list[Any] = [inner, inner]
    ring.append(ring)
    copied = deep_copy(ring)
    assert copied[0] is copied[1] is not inner
    assert copied[2] is copied
