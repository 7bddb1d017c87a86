"""Ranks that hold parts of a model's weights make the same forward passes, or wait for ever.

Under FSDP2 and DeepSpeed's ZeRO-3 a forward pass gathers each layer's weights from all ranks, so it
is a collective call. What a rank samples or scores is its own share, of its own size: while
`lockstep` is open every pass is announced to all ranks first, and a rank that has none to make
joins in with a pass over one token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from neat_align.errors import NEATError, one_line
from neat_align.modeling.outputs import forward
from neat_align.modeling.packing import pack_rows
from neat_align.modeling.shared_prefix import is_sharing


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ranks hold parts of the weights, so that a forward pass needs all of them.

    FSDP2 (`fully_shard`) and DeepSpeed's ZeRO-3. A model on a single rank is whole.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return True
    return any("ds_id" in vars(parameter) for parameter in model.parameters())


def class_of(module: torch.nn.Module) -> type[torch.nn.Module]:
    """A module's class, which FSDP2 hides behind one that it derives from it."""
    own = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
    return cast("type[torch.nn.Module]", own)


@contextlib.contextmanager
def lockstep(*models: torch.nn.Module) -> Iterator[None]:
    """While open, all ranks make the same forward passes of these models, in the same order.

    Every rank has to open it, with the same models in the same order, however much it has to do: a
    rank that leaves goes on with passes over one token, without a gradient, until no rank has any
    to make. So does a rank on which an error is raised, and raises it then; an error in the middle
    of a pass is raised at once, since the others cannot finish that pass. No other collective may
    be called while it is open. Models that are not sharded, and a block inside of another one, cost
    nothing and do nothing.
    """
    roots = dict.fromkeys(map(_root, models))
    sharded = [m for m in roots if m not in _IN_STEP and is_sharded(m)]
    if not sharded:
        yield
        return
    announcing = _announcing(dist.group.WORLD, _waiting.seconds)
    steps = _Steps([_Model(m) for m in sharded], announcing)
    with contextlib.ExitStack() as hooks:
        for index, model in enumerate(sharded):
            _IN_STEP.append(model)
            hooks.callback(_IN_STEP.remove, model)
            before = functools.partial(steps.before, index)
            hooks.callback(model.register_forward_pre_hook(before, prepend=True).remove)
            hooks.callback(model.register_forward_hook(steps.after).remove)
        try:
            yield
        except BaseException as error:
            if steps.is_in_pass:
                error.add_note(
                    "It was raised in the middle of a forward pass of a model whose weights are "
                    "divided between processes: the others wait in that pass until their limit"
                )
            else:
                with contextlib.suppress(NEATError):  # this rank's own error says more
                    steps.finish()
            raise
        steps.finish()


def _root(model: torch.nn.Module) -> torch.nn.Module:
    """The model that a wrapper, such as DeepSpeed's engine, calls."""
    from accelerate.utils import extract_model_from_parallel

    root: torch.nn.Module = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    return root


# Models that a block is open for; modules are compared by identity.
_IN_STEP: list[torch.nn.Module] = []


class _Model:
    """A model, and whether its adapter is on: ZeRO-3 gathers what a pass uses, and no more."""

    def __init__(self, model: torch.nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.model = model
        layers = (m for m in model.modules() if isinstance(m, BaseTunerLayer))
        self._layer: BaseTunerLayer | None = next(layers, None)

    def is_off(self) -> bool:
        """Whether the model has an adapter and it is switched off."""
        return self._layer is not None and bool(self._layer.disable_adapters)

    def one_token_pass(self, *, off: bool) -> None:
        """A pass over one token, without a gradient, with the adapter on or off."""
        with self._switched(off=off):
            one_token_pass(self.model)

    @contextlib.contextmanager
    def _switched(self, *, off: bool) -> Iterator[None]:
        was_off = self.is_off()
        if off == was_off:
            yield
            return
        tuner = cast("Any", self.model).base_model
        switch = (tuner.enable_adapter_layers, tuner.disable_adapter_layers)
        switch[off]()
        try:
            yield
        finally:
            switch[was_off]()


@dataclass
class _Steps:
    """The passes of one block on this rank; `is_in_pass`: one is being made, and not finished."""

    models: list[_Model]
    group: Any
    is_in_pass: bool = False
    _is_idle: bool = False

    def before(self, index: int, *_: Any) -> None:
        """This rank is about to make a pass: the others' passes of earlier models come first."""
        if self._is_idle:
            return
        wanted = 2 * index + self.models[index].is_off()
        while (agreed := self._agree(wanted)) != wanted:
            self._idle_pass(agreed)
        self.is_in_pass = True

    def after(self, *_: Any) -> None:
        """A pass has been made."""
        if not self._is_idle:
            self.is_in_pass = False

    def finish(self) -> None:
        """Join in with the others' passes until there are none."""
        nothing = 2 * len(self.models)
        while (agreed := self._agree(nothing)) != nothing:
            self._idle_pass(agreed)

    def _agree(self, wanted: int) -> int:
        """The first pass in order that any rank wants: 2 · model, and 1 more with its adapter off.

        Raises NEATError when another process is gone.
        """
        first = torch.tensor([wanted])
        try:
            dist.all_reduce(first, dist.ReduceOp.MIN, group=self.group)
        except RuntimeError as error:  # gloo's, for a closed connection and for one that waits
            raise NEATError(
                "another process is gone, or is stuck, while all of them were to make the same "
                f"passes of a model whose weights they share ({one_line(error, 200)}): its own "
                "message says why; if it was only slow, raise ddp_timeout"
            ) from error
        return int(first)

    def _idle_pass(self, wanted: int) -> None:
        index, off = divmod(wanted, 2)
        self._is_idle = True
        try:
            self.models[index].one_token_pass(off=bool(off))
        finally:
            self._is_idle = False


def one_token_pass(model: torch.nn.Module) -> None:
    """A row of one token, without a gradient: it gathers the weights that any other row gathers."""
    device = next(model.parameters()).device
    rows = pack_rows([[0]], [[[0]]]).to(device)
    inputs: dict[str, Any] = {"input_ids": rows.input_ids}
    if is_sharing(model):  # no other rows are taken then
        inputs |= {"position_ids": rows.position_ids, "shared_prefix": rows.layout}
    with torch.no_grad():
        forward(model, **inputs, use_cache=False)


@dataclass
class _Waiting:
    """How long a rank waits for another's announcement; None: as long as torch does."""

    seconds: float | None = None


_waiting = _Waiting()


def wait_at_most(seconds: float) -> None:
    """How long a rank waits from now on for another's announcement: a run's `ddp_timeout`.

    Every rank has to say the same. One that waits longer raises NEATError.
    """
    _waiting.seconds = seconds


@functools.cache
def _announcing(_: Any, seconds: float | None) -> Any:
    """A process group on the CPU: an announcement waits for no GPU, and no GPU for it.

    One for each time that torch.distributed was set up, and each limit.
    """
    limit = None if seconds is None else timedelta(seconds=seconds)
    return dist.new_group(backend="gloo", timeout=limit)
