"""Attention masks from what the CPU knows of padding.

transformers asks a padding mask in every forward pass whether it hides anything, since a kernel
without a mask is faster: on a GPU the CPU waits for the answer. Whether rows are padded is known
where they were put side by side.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

# The ways of attention whose mask function asks.
_ASKING = ("sdpa", "flash_attention_2", "flash_attention_3")
# transformers has one table of mask functions for the process, and what is known is true of the
# batch of one thread: other threads may run models at the same time (reward functions, a server),
# and are not the last to leave because they were the first to come. So the table is changed while
# anybody knows something, and what it is, everybody knows for themselves.
_padded: ContextVar[bool | None] = ContextVar("padded", default=None)
_changing = threading.Lock()
_users: Counter[str] = Counter()
_before: dict[str, Callable[..., Any]] = {}


@contextlib.contextmanager
def masks_from(*, padded: bool, also: tuple[str, ...] = ()) -> Iterator[None]:
    """While open, transformers makes the masks that it would make, without asking them.

    `padded` says whether any row of the batches that this thread puts through models meanwhile has
    padding; `also` names further ways of attention whose masks are torch's.
    """
    names = (*_ASKING, *also)
    with _changing:
        for name in names:
            _change(name)
    token = _padded.set(padded)
    try:
        yield
    finally:
        _padded.reset(token)
        with _changing:
            for name in names:
                _put_back(name)


def _change(name: str) -> None:
    if not _users[name]:
        _before[name] = ALL_MASK_ATTENTION_FUNCTIONS[name]
        ALL_MASK_ATTENTION_FUNCTIONS[name] = _told(_before[name])
    _users[name] += 1


def _put_back(name: str) -> None:
    _users[name] -= 1
    if _users[name]:
        return
    function = _before.pop(name)
    if AttentionMaskInterface()[name] is function:
        del ALL_MASK_ATTENTION_FUNCTIONS[name]
    else:
        ALL_MASK_ATTENTION_FUNCTIONS[name] = function


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    def mask(
        *args: Any,
        attention_mask: Any = None,
        allow_is_causal_skip: bool = True,
        **others: Any,  # what transformers passes to every mask function
    ) -> Any:
        padded = _padded.get()
        told = None if padded is False else attention_mask
        may_skip = allow_is_causal_skip and (padded is None or told is None)
        return function(*args, attention_mask=told, allow_is_causal_skip=may_skip, **others)

    return mask
