"""Number types: where autocast goes, and which weights cannot learn."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers.pytorch_utils import Conv1D

from neat_align.errors import one_line
from neat_align.modeling.lockstep import is_sharded
from neat_align.modeling.merging import (
    CannotMergeError,
    adapter_logprobs,
    merged,
    probed_tokens,
)
from neat_align.modeling.outputs import forward
from neat_align.modeling.rounding import own_type
from neat_align.modeling.shared_prefix import adds_virtual_tokens, unwrapped
from neat_align.modeling.text_config import text_config

logger = logging.getLogger(__name__)
# Tokens on which a model is compared with itself in another type.
_PROBED = 16


def autocast(device_type: str, dtype: torch.dtype | None) -> torch.autocast:
    """torch's autocast in `dtype`; None computes in the weights' own type."""
    return torch.autocast(device_type, dtype or torch.bfloat16, enabled=dtype is not None)


@contextlib.contextmanager
def inference(model: torch.nn.Module, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """No gradients, no dropout, and autocast when a type is given, while this is open.

    Without one the model computes in its weights' own type (or `rounding.own_type`). The model's
    training flag is put back afterwards. The head is given contiguous states. A model that keeps
    only some logits hands it a slice, and without gradients torch multiplies a non-contiguous slice
    as a batch, with the head's weight expanded once a row: for 64 rows of a 49k-token vocabulary on
    a CPU that took 8 s and 3.4 GiB instead of 24 ms (scripts/measure_head.py).
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device.type
    head = cast("Any", model).get_output_embeddings()
    contiguous = head.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(), *inputs[1:])
    )
    try:
        with torch.no_grad(), autocast(device, autocast_dtype or own_type(model)):
            yield
    finally:
        contiguous.remove()
        model.train(was_training)


@contextlib.contextmanager
def casting_once(module: torch.nn.Module) -> Iterator[None]:
    """While open, autocast casts each frozen fp32 weight once instead of in every forward pass.

    Only inside of `inference`. autocast keeps the cast of a weight that requires a gradient, and
    where no gradients are recorded nothing else reads that flag; so the numbers are the same. The
    casts take half the weights' memory until autocast is closed. Weights that ranks hold parts of
    are left alone: they are gathered anew in every pass, and kept casts would be all of them.
    """
    if is_sharded(module):
        yield
        return
    frozen = [p for p in module.parameters() if p.dtype is torch.float32 and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def frozen_casts(head: torch.nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """The frozen fp32 weights of the linear layer under a LoRA adapter in autocast's type, by name.

    To call `head` with in chunks, and again in the backward pass: autocast itself would cast the
    weights in each. Empty where autocast is off, and for any other head, which may do more with its
    weights than multiply by them (as DoRA does, which takes their norm).
    """
    from peft.tuners.lora import Linear

    kind = device.type
    if not torch.is_autocast_enabled(kind) or not isinstance(head, Linear):
        return {}
    if type(head.get_base_layer()) is not torch.nn.Linear or head.lora_variant:
        return {}
    dtype = torch.get_autocast_dtype(kind)
    return {
        name: weight.detach().to(dtype)
        for name, weight in head.named_parameters()
        if name.startswith("base_layer.")
        and weight.dtype is torch.float32
        and not weight.requires_grad
    }


def held_in(model: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Hold a frozen model's linear layers in autocast's type; False where it says something else
    then: it has to be loaded again.

    autocast casts these weights in every pass, so that logits under autocast are the same to the
    bit, for half the memory. What is added up or scaled in fp32 (embeddings, norms) stays fp32, and
    so does a head that shares the embeddings' weight. The logits of a few tokens are compared: a
    model's own code may read such a weight otherwise.
    """
    try:
        tokens = torch.arange(_PROBED) % text_config(unwrapped(model).config).vocab_size
        expected = _autocast_logits(model, tokens, dtype)
        for parameter in linear_weights(model):
            if parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(dtype)
        return torch.equal(_autocast_logits(model, tokens, dtype), expected)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        logger.warning(
            "the copy of the start policy keeps fp32 weights: %s cannot be run on token ids alone "
            "in %s (%s)",
            type(unwrapped(model)).__name__,
            dtype,
            one_line(error, 100),
        )
        return False


def linear_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Weights and biases that only linear layers read, each once: those that autocast casts."""
    owners: dict[int, list[bool]] = {}
    found: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        is_linear = type(module) in (torch.nn.Linear, Conv1D)
        for parameter in module.parameters(recurse=False):
            found[id(parameter)] = parameter
            owners.setdefault(id(parameter), []).append(is_linear)
    return [found[key] for key, linear in owners.items() if all(linear)]


def _autocast_logits(
    model: torch.nn.Module, tokens: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    device = next(model.parameters()).device
    with inference(model, dtype):
        given = forward(model, input_ids=tokens[None].to(device), use_cache=False)
    return cast("torch.Tensor", given["logits"])


def half_precision_copy(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module | None:
    """A frozen copy of a policy in `dtype`, adapters merged, for sampling only.

    On a CPU autocast converts activations back and forth and runs an adapter as two more layers; a
    merged half-precision copy samples faster for half the weights' memory. It is the same policy up
    to rounding: an adapter that cannot be merged, or would be another one merged, stays an adapter
    (said once). Frozen weights that are in `dtype` already are not copied, and an adapter on such
    stays one: merging would round it, and need them once more. None where the model cannot be
    copied: sample from the policy itself then.
    """
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    inner = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    try:
        copied = _merged_copy(inner, dtype) if isinstance(inner, PeftModel) else None
        if copied is None:
            copied = _copy(inner, _converted(inner, dtype))
        _to_type(copied, dtype)
        # Some models and adapters keep buffers that they compute with in fp32, and then fail.
        adapter_logprobs(copied, torch.zeros(4, dtype=torch.long))
    except RuntimeError as error:
        # torch copies no weight that is computed from another: peft ties adapters in this way.
        _say_once(
            f"{type(unwrapped(inner)).__name__} cannot be copied in {dtype} for sampling "
            f"({one_line(error, 100)}): completions are sampled from the policy "
            "itself, which is slower on a CPU"
        )
        return None
    return copied.requires_grad_(False).eval()


def _to_type(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: a rotary embedding's frequencies are a buffer, and in half precision late
    positions would run together.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    if "base_model_torch_dtype" in vars(model):
        # Older peft notes it once; prefix tuning makes its keys in this type.
        vars(model)["base_model_torch_dtype"] = dtype


def _copy(inner: torch.nn.Module, known: dict[int, Any]) -> torch.nn.Module:
    """A copy, with `known` objects in the place of those of these ids."""
    from accelerate.utils import extract_model_from_parallel

    # Without accelerate's wrapper, which would put autocast around it.
    copied: Any = extract_model_from_parallel(copy.deepcopy(inner, known), keep_fp32_wrapper=False)
    # accelerate leaves a bound method behind. The model would hold itself, and a copy stay in
    # memory through the training that follows, until Python looks for such circles.
    before = vars(inner).get("_original_forward")
    if getattr(before, "__func__", None) is type(copied).forward:
        del copied.forward
    return cast("torch.nn.Module", copied)


def _converted(inner: torch.nn.Module, dtype: torch.dtype) -> dict[int, Any]:
    """What a copy in `dtype` has in the place of each parameter, by its id.

    So the weights are never there twice in their own type. Those that do not change, in type or by
    training, are the copy's, too.
    """
    known: dict[int, Any] = {}
    for parameter in inner.parameters():
        if not parameter.requires_grad and parameter.dtype == dtype:
            known[id(parameter)] = parameter
        elif type(parameter) is torch.nn.Parameter and parameter.is_floating_point():
            data = parameter.detach().to(dtype, copy=True)
            known[id(parameter)] = torch.nn.Parameter(data, requires_grad=False)
    return known


def _merged_copy(inner: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module | None:
    """A copy in the weights' own types with its adapter merged, or left out where it is off; None
    where the adapter stays.

    That merging changes nothing else is seen only before the weights are rounded. Those that it
    changes have to be there once more until then, and those that learn.
    """
    if adds_virtual_tokens(inner):
        _say_once(_unmerged(inner, "it adds virtual tokens"))
        return None
    is_on, adapted = _adapted(inner)
    if is_on and adapted == {dtype} and dtype.itemsize < torch.float32.itemsize:
        return None
    # An adapter that is off is left out, which is the same in any type.
    copied = _copy(inner, _left_alone(inner) if is_on else _converted(inner, dtype))
    try:
        return merged(copied, adapter_logprobs(copied, probed_tokens(copied)))
    except CannotMergeError as error:
        _say_once(_unmerged(inner, str(error)))
    return None


def _left_alone(inner: torch.nn.Module) -> dict[int, Any]:
    """What a copy has in the place of each weight that neither training nor merging changes, by its
    id: a parameter of its own over the same numbers, until it is given others.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in inner.modules() if isinstance(m, BaseTunerLayer)]
    merges = {id(p) for layer in layers for p in layer.parameters()}
    return {
        id(p): torch.nn.Parameter(p.detach(), requires_grad=False)
        for p in inner.parameters()
        if type(p) is torch.nn.Parameter and not p.requires_grad and id(p) not in merges
    }


def _adapted(inner: torch.nn.Module) -> tuple[bool, set[torch.dtype | None]]:
    """Whether an adapter is on, and the types of what it adapts; None stands for what learns."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in inner.modules() if isinstance(m, BaseTunerLayer)]
    adapted = [p for layer in layers for p in layer.get_base_layer().parameters()]
    is_on = not all(layer.disable_adapters for layer in layers)
    return is_on, {None if p.requires_grad else p.dtype for p in adapted}


def _unmerged(inner: torch.nn.Module, reason: str) -> str:
    return (
        f"the adapter of {type(unwrapped(inner)).__name__} is not merged into the copy that "
        f"samples: {reason}. Sampling is correct but slower"
    )


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
