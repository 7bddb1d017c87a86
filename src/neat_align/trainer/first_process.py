"""Weights that the first process alone has loaded, until all of them divide it.

With FSDP2's `cpu_ram_efficient_loading` the other processes make the model without numbers (on the
meta device, where reading a number is an error): eight of them would hold it eight times. What is
measured on the model before training, the first process measures for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from neat_align.config import NEATConfig
from neat_align.config.sharding import leave_models_whole
from neat_align.errors import ConfigError, OtherProcessError
from neat_align.runs.run_key import weights_fingerprint

T = TypeVar("T")


def found_by_first(args: NEATConfig, find: Callable[[], T], what: str) -> T:
    """What `find` gives: here; or, where the first process alone has the weights, what it gives
    there.

    Every process calls it. `what` says what is found, for messages. What `find` raises on the first
    process is OtherProcessError on the others.
    """
    if not args.loads_once:
        return find()
    told: list[Any] = [None, False]
    try:
        if args.process_index == 0:
            told = [find(), True]
    finally:
        broadcast_object_list(told)
    if not told[1]:
        raise OtherProcessError(f"another process failed {what}: its own message says why")
    return cast("T", told[0])


def hands_out_weights(args: NEATConfig, accelerator: Accelerator) -> None:
    """Have accelerate give the first process's weights to the others, where it alone has them.

    No other model is to be loaded so.
    """
    if args.loads_once:
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = True
        leave_models_whole()


def start_fingerprint(args: NEATConfig, model: torch.nn.Module) -> str:
    """`weights_fingerprint` of the model that training begins with.

    Raises ConfigError for a model that the first process cannot give to the others.
    """
    if args.loads_once:
        _check_can_be_given(args, model)
    return found_by_first(
        args, lambda: weights_fingerprint(model), "while it looked at the weights"
    )


def _check_can_be_given(args: NEATConfig, model: torch.nn.Module) -> None:
    """Refuse what accelerate would not hand out right: it goes by names, shapes and types."""
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kept = sorted(model.state_dict().keys() - weights)
    if kept:
        raise ConfigError(
            f"cpu_ram_efficient_loading is true, and the model saves {kept[0]}, which is no weight "
            "that could be divided and is not handed out to the other processes: set it to false"
        )
    form = [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in model.named_parameters()]
    own = hashlib.sha256(repr(form).encode()).hexdigest()
    if found_by_first(args, lambda: own, "while it looked at the model") != own:
        raise ConfigError(
            "cpu_ram_efficient_loading is true, and this process has made another model than the "
            "first one loaded (names, shapes or number types differ): set it to false"
        )


def give_room(model: torch.nn.Module) -> None:
    """Memory for weights that are on the meta device, which nothing is written into.

    accelerate tells weights apart by where they are, and on the meta device all are nowhere. Pages
    that are never touched take none of the machine's memory.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if weight.is_meta:
                room = torch.empty_like(weight, device="cpu")
                if id(weight) not in made:
                    made[id(weight)] = torch.nn.Parameter(room, weight.requires_grad)
                module.register_parameter(name, made[id(weight)])
