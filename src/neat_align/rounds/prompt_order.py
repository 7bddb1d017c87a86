"""Which prompts a round takes: an endless stream of seeded shuffles of the data."""

from __future__ import annotations

import random
from array import array
from functools import lru_cache


def prompt_at(n_rows: int, seed: int, position: int) -> int:
    """Row number at a position of the endless stream, counted from 0.

    Every pass over the data is a fresh shuffle, seeded by `seed` and the pass.
    """
    cycle, offset = divmod(position, n_rows)
    return _pass_order(n_rows, seed, cycle)[offset]


# Two: the pass a round is in, and the one it may end in. A shuffle of a million rows takes half a
# second.
@lru_cache(maxsize=2)
def _pass_order(n_rows: int, seed: int, cycle: int) -> array[int]:
    order = array("q", range(n_rows))  # 8 bytes a row; a tuple has five times as many
    random.Random(f"{seed}/{cycle}").shuffle(order)
    return order


def percent_of_data(share: float) -> str:
    """A share in percent: 100 % only where it is all of the data."""
    if share == 1:
        return "100 %"
    percent = 100 * share
    if percent >= 100:
        return f"{max(percent, 100.1):,.1f} %"
    return f"{min(percent, 99.9):.3g} %" if percent >= 0.001 else "under 0.001 %"
