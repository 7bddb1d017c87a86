"""Attention masks from what the CPU knows of padding.

transformers asks a padding mask in every forward pass whether it hides anything, since a kernel
without a mask is faster: on a GPU the CPU waits for the answer. Whether rows are padded is known
where they were put side by side.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

# The ways of attention whose mask function asks.
_ASKING = ("sdpa", "flash_attention_2", "flash_attention_3")


@dataclass
class KnownPadding:
    """Whether any of the rows that go through a model has padding."""

    is_there: bool


# Of this thread: others may run other rows through other models at the same time.
_padding: ContextVar[KnownPadding | None] = ContextVar("padding", default=None)
_lock = threading.Lock()
# By way of attention: how many blocks are open, and the function that stood there before the first.
_open: dict[str, tuple[int, Callable[..., Any]]] = {}


@contextlib.contextmanager
def masks_from(padding: KnownPadding, *, also: tuple[str, ...] = ()) -> Iterator[None]:
    """While open, transformers makes the masks that it would make, without asking them.

    In this thread; in others it goes on asking. `padding` has to be true of every batch that goes
    through a model meanwhile; `also` names further ways of attention whose masks are torch's.
    """
    names = (*_ASKING, *also)
    before = _padding.set(padding)
    for name in names:
        _replace(name)
    try:
        yield
    finally:
        for name in names:
            _put_back(name)
        _padding.reset(before)


def _replace(name: str) -> None:
    """Put a function that knows of padding in the place of a way's own, for the first block."""
    with _lock:
        count, own = _open.get(name, (0, ALL_MASK_ATTENTION_FUNCTIONS[name]))
        if count == 0:
            ALL_MASK_ATTENTION_FUNCTIONS[name] = _told(own)
        _open[name] = count + 1, own


def _put_back(name: str) -> None:
    """The way's own function again, after the last block."""
    with _lock:
        count, own = _open.pop(name)
        if count > 1:
            _open[name] = count - 1, own
        elif AttentionMaskInterface()[name] is own:
            del ALL_MASK_ATTENTION_FUNCTIONS[name]
        else:
            ALL_MASK_ATTENTION_FUNCTIONS[name] = own


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    def mask(
        *args: Any,
        attention_mask: Any = None,
        allow_is_causal_skip: bool = True,
        **others: Any,  # what transformers passes to every mask function
    ) -> Any:
        padding, may_skip = _padding.get(), allow_is_causal_skip
        if padding is not None:
            attention_mask = attention_mask if padding.is_there else None
            may_skip = allow_is_causal_skip and attention_mask is None
        return function(
            *args, attention_mask=attention_mask, allow_is_causal_skip=may_skip, **others
        )

    return mask
