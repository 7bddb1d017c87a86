"""The policy that training started from: a frozen copy, or the adapter switched off.

A copy is the dearest way: the weights once more. None is made where nothing reads it, and under
autocast its linear layers are held in the type that autocast would cast them to at every pass.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from neat_align.errors import ConfigError, one_line
from neat_align.modeling.lockstep import is_sharded
from neat_align.modeling.precision import held_in
from neat_align.modeling.requirements import is_trained
from neat_align.modeling.shared_prefix import adds_virtual_tokens
from neat_align.modeling.target_modules import check_target_modules

# Opens the start policy: a frozen copy, or the trained model with its adapter switched off.
Reference = Callable[[], AbstractContextManager[torch.nn.Module]]


def not_kept() -> AbstractContextManager[torch.nn.Module]:
    """The start policy of a run that needs none: it cannot be opened once training has begun."""
    raise RuntimeError(
        "the start policy was not kept, since no option of this run reads it: pass ref_model"
    )


def start_policy(
    model: Any,
    peft_config: Any,
    ref_model: torch.nn.Module | None,
    *,
    keep: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> tuple[Reference, torch.nn.Module]:
    """How to open the start policy, and the model to train.

    With `peft_config` the model to train is `model` with a new adapter. The start policy is
    `ref_model`, or the new adapter switched off, or a frozen copy. A model that comes with an
    adapter is copied: its adapter may hold something already, and switched off it would be a
    different start. So is one whose new adapter trains weights of the base, too (LoRA's `bias`):
    they stay trained when the adapter is switched off. No copy is made of a model that is not
    trained, or without `keep` (`not_kept`); one that is made is only for `autocast_dtype`. Raises
    ConfigError for two adapters, for an adapter that does not fit, and for one that changes the
    base before training begins.
    """
    # The model itself is no reference: it moves, and its copy does not.
    given = None if ref_model is model else ref_model
    if peft_config is None:
        if given is not None:
            return _frozen(given, model), model
        if not is_trained(model):
            return lambda: contextlib.nullcontext(model), model
        return _copy(model, autocast_dtype) if keep else not_kept, model
    weights = list(model.parameters())
    before = [_some_numbers(p) for p in weights]
    trained = _with_adapter(model, peft_config)
    if given is not None:
        return _frozen(given, trained), trained
    kept = {id(p) for p in trained.parameters()}
    if not all(
        id(p) in kept and (p.is_meta or torch.equal(_some_numbers(p), numbers))
        for p, numbers in zip(weights, before, strict=True)
    ):
        raise ConfigError(
            "peft_config changes weights of the model itself before training begins (as "
            "init_lora_weights: pissa, olora or corda do), so with the adapter switched off it is "
            "no longer the model that was passed, which KL, dpo, kto, npo and contrast "
            "distillation are measured against: pass ref_model, another copy of the model, or "
            "leave init_lora_weights out"
        )
    if any(p.requires_grad for p in weights):
        if not keep:
            return not_kept, trained
        return _frozen(_copied(trained).unload(), trained), trained
    return _adapter_off(trained), trained


def is_part_of(start: torch.nn.Module, policy: torch.nn.Module) -> bool:
    """Whether an opened start policy is the policy itself or in it, and not one that was given, or
    a copy. (Of a model that comes with an adapter it is a copy, too.)
    """
    return any(start is module for module in policy.modules())


def adapter_is_zero(model: torch.nn.Module) -> bool:
    """Whether a LoRA adapter is as it was made, with second factors that are 0: the model gives, to
    the bit, what it gives with the adapter off.

    False wherever weights do not say so at once: other adapters, more that is trained than such
    factors, weights that ranks hold parts of.
    """
    from peft import PeftModel
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(model, PeftModel) or is_sharded(model):
        return False
    modules = list(model.modules())
    changed = [m for m in modules if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    plain = [m for m in modules if type(m) is Linear and not m.lora_variant]
    factors = {id(p) for m in plain for d in (m.lora_A, m.lora_B) for p in d.parameters()}
    if len(plain) < len(changed) or any(
        p.requires_grad and id(p) not in factors for p in model.parameters()
    ):
        return False
    return not any(bool(p.any()) for m in plain for p in m.lora_B.parameters())


def _with_adapter(model: Any, peft_config: Any) -> Any:
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ConfigError(
            "the model already has an adapter and peft_config asks for another: pass one of the two"
        )
    if peft_config.task_type not in (None, "CAUSAL_LM"):
        raise ConfigError(
            f"peft_config.task_type is {peft_config.task_type}, and a policy continues text: set "
            'task_type="CAUSAL_LM"'
        )
    check_target_modules(model, peft_config)
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ConfigError(f"peft_config does not fit {type(model).__name__}: {error}") from error


def _copy(model: Any, autocast_dtype: torch.dtype | None) -> Reference:
    start = _copied(model).requires_grad_(False).eval()
    # With virtual tokens it is measured how the copy samples, in its weights' own type.
    narrow = None if adds_virtual_tokens(start) else autocast_dtype
    if narrow is not None and not held_in(start, narrow):
        start = _copied(model)  # what was cast cannot be put back
    return _frozen(start, model)


def _copied(model: Any) -> Any:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        # torch copies no weight that is computed from another: peft ties adapters in this way.
        raise ConfigError(
            "the start policy cannot be copied from the model "
            f"({one_line(error, 200)}): pass the model without its adapter and "
            "peft_config, or pass ref_model"
        ) from error


def _some_numbers(weight: torch.Tensor, count: int = 16) -> torch.Tensor:
    """A few evenly spaced numbers of a weight, to see whether it was changed."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // count)].clone()


def _adapter_off(trained: Any) -> Reference:
    if adds_virtual_tokens(trained):
        # The model below knows nothing of them.
        return lambda: contextlib.nullcontext(trained.get_base_model())

    @contextlib.contextmanager
    def adapter_off() -> Iterator[torch.nn.Module]:
        with trained.disable_adapter():
            yield trained

    return adapter_off


def _frozen(start: torch.nn.Module, trained: torch.nn.Module) -> Reference:
    """`start` without gradients or dropout; opened, it is on the device of the trained model.

    Where processes divide that one's weights, whoever divides these puts them there.
    """
    start.requires_grad_(False).eval()

    @contextlib.contextmanager
    def frozen() -> Iterator[torch.nn.Module]:
        device = next(trained.parameters()).device
        # A model in parts may not be moved, and one that is to be divided has no room there.
        if next(start.parameters()).device != device and not is_sharded(trained):
            start.to(device)
        yield start

    return frozen
