"""Weights that processes divide, where Trainer divides none: of a start policy of its own, and of a
policy that is only evaluated.

Whole in every process, a frozen copy would take more memory than the policy's share. An adapter
that is switched off needs none of this: it is the policy itself.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType

from neat_align.config.sharding import Sharding
from neat_align.errors import ConfigError
from neat_align.modeling.lockstep import is_sharded
from neat_align.modeling.reference import Reference, is_part_of, not_kept
from neat_align.modeling.requirements import is_trained

# How runs are divided in which a process has a part of every weight.
DIVIDES_WEIGHTS: tuple[Sharding, ...] = ("fsdp2", "zero3")


def sharding_of(accelerator: Accelerator) -> Sharding:
    """How accelerate divides the run between processes."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return cast("Sharding", f"zero{accelerator.state.deepspeed_plugin.zero_stage}")
    return "fsdp2" if accelerator.is_fsdp2 else "none"


def share_reference(
    accelerator: Accelerator, reference: Reference, policy: torch.nn.Module
) -> None:
    """Divide the start policy's weights where the policy's are divided and it was kept apart.

    Every rank calls this, once the policy is divided. A second call does nothing.
    """
    if reference is not_kept or not is_sharded(policy):
        return
    with reference() as start:
        if is_part_of(start, policy) or is_sharded(start):
            return
        _divide(accelerator, start)
        start.requires_grad_(False).eval()


def share_untrained(
    accelerator: Accelerator, sharding: Sharding, policy: torch.nn.Module, reference: Reference
) -> None:
    """Put a policy on its device, or divide it, where Trainer has not: it does when it trains.

    Every rank calls this. It does nothing to a policy that is where it belongs. Raises ConfigError
    for one that is to be trained: its optimizer is made of whole weights.
    """
    if sharding == "none" or is_sharded(policy):
        return
    if sharding not in DIVIDES_WEIGHTS:
        policy.to(accelerator.device)  # whole in every process
        return
    if is_trained(policy):
        raise ConfigError(
            f"the policy is called before it is trained, and the run is divided by {sharding}: its "
            "weights are divided when train() begins, and until then each process would have to "
            "hold all of them. eval_on_start: true has train() evaluate the start; a policy that "
            "is only evaluated has to be frozen (model.requires_grad_(False)); or call this after "
            "train()"
        )
    _divide(accelerator, policy)
    share_reference(accelerator, reference, policy)


def _divide(accelerator: Accelerator, model: torch.nn.Module) -> None:
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        _divide_as_zero3(model, accelerator)
    else:
        _divide_as_fsdp2(model, accelerator)


def _divide_as_fsdp2(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """A layer after the other goes to the device, and a part of it stays there."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    fsdp2_prepare_model(accelerator, model)


def _divide_as_zero3(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """An engine without an optimizer, as TRL's `prepare_deepspeed` makes it."""
    deepspeed: Any = importlib.import_module("deepspeed")  # not everybody has it
    settings: dict[str, Any] = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    settings.pop("optimizer", None)
    settings.pop("scheduler", None)
    settings["zero_optimization"].pop("offload_optimizer", None)
    deepspeed.initialize(model=model, config=settings)
