"""Attention masks from what the CPU knows of padding.

transformers asks a padding mask in every forward pass whether it hides anything, since a kernel
without a mask is faster: on a GPU the CPU waits for the answer. Whether rows are padded is known
where they were put side by side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def masks_from(padding: KnownPadding, *, also: tuple[str, ...] = ()) -> Iterator[None]:
    """While open, transformers makes the masks that it would make, without asking them.

    `padding` has to be true of every batch that goes through a model meanwhile; `also` names
    further ways of attention whose masks are torch's.
    """
    registered = AttentionMaskInterface()
    before = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in (*_ASKING, *also)}
    for name, function in before.items():
        ALL_MASK_ATTENTION_FUNCTIONS[name] = _told(function, padding)
    try:
        yield
    finally:
        for name, function in before.items():
            if registered[name] is function:
                del ALL_MASK_ATTENTION_FUNCTIONS[name]
            else:
                ALL_MASK_ATTENTION_FUNCTIONS[name] = function


def _told(function: Callable[..., Any], padding: KnownPadding) -> Callable[..., Any]:
    def mask(
        *args: Any,
        attention_mask: Any = None,
        allow_is_causal_skip: bool = True,
        **others: Any,  # what transformers passes to every mask function
    ) -> Any:
        told = attention_mask if padding.is_there else None
        may_skip = allow_is_causal_skip and told is None
        return function(*args, attention_mask=told, allow_is_causal_skip=may_skip, **others)

    return mask
