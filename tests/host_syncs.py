"""Counts what would make a CPU wait for its GPU, on a machine that has none.

A CPU tensor's operators are those of a GPU's, so that they can be counted by name: reading a
tensor's value, and whatever gives a tensor whose shape depends on values (a GPU has to be waited
for before memory can be had). Making a tensor from Python numbers counts too: on a GPU that is a
copy which the CPU waits for.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that read a value, or whose result's shape depends on values.
WAITING = frozenset(
    [
        "_local_scalar_dense",  # float(x), int(x), bool(x), x.item()
        "nonzero",
        "masked_select",
        "unique_dim",
        "unique_consecutive",
        "_unique",
        "_unique2",
        "bincount",
        "isin",  # sorts, and drops repeated values, where many are looked for
        "equal",
        "masked_scatter_backward",  # selects by its mask
    ]
)
# Methods that read all of a tensor, or make one from Python numbers, without such an operator.
READING = frozenset([torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu])
MAKING = frozenset([torch.tensor, torch.as_tensor])


class HostSyncs:
    """While open, counts waits by operator and by the line of this package that caused them."""

    def __init__(self) -> None:
        self.by_name: Counter[str] = Counter()
        self.by_line: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self._modes = (_Operators(self), _Functions(self))

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_name.values())

    def saw(self, name: str) -> None:
        """One more, by name and by where it is."""
        frames = [f for f in traceback.extract_stack() if "neat_align" in f.filename]
        where = frames[-1] if frames else None
        line = f"{where.filename.rsplit('/', 1)[-1]}:{where.lineno}" if where else "backward"
        self.by_name[name] += 1
        self.by_line[f"{line} {name}"] += 1

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)


class _Operators(TorchDispatchMode):
    def __init__(self, seen: HostSyncs) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.seen.operators[name] += 1
        if name in WAITING or _indexes_by_mask(name, args) or _repeats(func, kwargs):
            self.seen.saw(name)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, seen: HostSyncs) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in READING or func in MAKING:
            self.seen.saw(func.__name__)
        return func(*args, **(kwargs or {}))


def _indexes_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """A boolean index is turned into places: `nonzero`, inside of the operator."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    return bool(masks)


def _repeats(func: Any, kwargs: Any) -> bool:
    by_tensor = func.overloadpacket.__name__ == "repeat_interleave" and "Tensor" in str(func)
    return by_tensor and (kwargs or {}).get("output_size") is None


@contextlib.contextmanager
def weight_casts(model: torch.nn.Module) -> Iterator[Counter[str]]:
    """While open, counts how often each weight of a model is cast to another type, by name."""
    names = {p.data_ptr(): name for name, p in model.named_parameters()}
    seen: Counter[str] = Counter()

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func.overloadpacket.__name__ == "_to_copy" and args[0].data_ptr() in names:
                seen[names[args[0].data_ptr()]] += 1
            return func(*args, **(kwargs or {}))

    with Casts():
        yield seen
