"""A start policy of its own, divided between processes as the policy is.

Whole in every process, a frozen copy would take more memory than the policy's share. An adapter
that is switched off needs none of this: it is the policy itself.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from neat_align.modeling.lockstep import is_sharded
from neat_align.modeling.reference import Reference, not_kept


def share_reference(
    accelerator: Accelerator, reference: Reference, policy: torch.nn.Module
) -> None:
    """Divide the start policy's weights where the policy's are divided and it was kept apart.

    Every rank calls this, once the policy is divided. A second call does nothing.
    """
    if reference is not_kept or not is_sharded(policy):
        return
    with reference() as start:
        parts_of_policy = {id(module) for module in policy.modules()}
        if id(start) in parts_of_policy or is_sharded(start):
            return
        if accelerator.distributed_type is DistributedType.DEEPSPEED:
            _divide_as_zero3(start, accelerator)
        else:
            _divide_as_fsdp2(start, accelerator)
        start.requires_grad_(False).eval()


def _divide_as_fsdp2(start: torch.nn.Module, accelerator: Accelerator) -> None:
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    start.to(accelerator.device)
    fsdp2_prepare_model(accelerator, start)


def _divide_as_zero3(start: torch.nn.Module, accelerator: Accelerator) -> None:
    """An engine without an optimizer, as TRL's `prepare_deepspeed` makes it."""
    deepspeed: Any = importlib.import_module("deepspeed")  # not everybody has it
    settings: dict[str, Any] = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    settings.pop("optimizer", None)
    settings.pop("scheduler", None)
    settings["zero_optimization"].pop("offload_optimizer", None)
    deepspeed.initialize(model=start, config=settings)
