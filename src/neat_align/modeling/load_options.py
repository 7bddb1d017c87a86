"""How a model's weights are loaded: number type, attention, 4 bits. Names are those of TRL."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from neat_align.config.load_values import ATTENTIONS, DTYPES
from neat_align.errors import ConfigError
from neat_align.modeling.shared_prefix import unwrapped

logger = logging.getLogger(__name__)

_FP32_LEARNS = (
    "small updates round away in such weights, and nothing would be learned. Leave it out (weights "
    "are fp32, and bf16: true computes in bf16 all the same), or train an adapter (use_peft: true; "
    "peft_config in a script), under which the model's own weights are frozen"
)


@dataclass(frozen=True)
class LoadOptions:
    """How `load_policy` loads a model.

    Attributes:
        dtype: type of the weights; `auto` is the one in which they were saved.
        attn_implementation: transformers' name of an attention; None is transformers' choice.
        load_in_4bit: hold the linear layers in 4 bits (NF4 of bitsandbytes); the rest is `dtype`.

    Raises ConfigError for another value.
    """

    dtype: str = "float32"
    attn_implementation: str | None = None
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("attn_implementation", (None, *ATTENTIONS))):
            value = getattr(self, name)
            if value not in allowed:
                known = ", ".join(str(a) for a in allowed if a is not None)
                raise ConfigError(f"{name} is {value!r}; it must be one of {known}")

    @property
    def torch_dtype(self) -> torch.dtype | str:
        """What transformers' `from_pretrained` takes as `dtype`."""
        return "auto" if self.dtype == "auto" else getattr(torch, self.dtype)

    def where_all_weights_learn(self) -> LoadOptions:
        """The same for a model whose own weights are trained: in fp32.

        Raises ConfigError where another type was asked for by name.
        """
        if self.load_in_4bit:
            raise ConfigError(f"load_in_4bit is true and the weights are trained: {_FP32_LEARNS}")
        if self.dtype in ("bfloat16", "float16"):
            raise ConfigError(f"dtype is {self.dtype} and the weights are trained: {_FP32_LEARNS}")
        if self.dtype == "auto":
            logger.info("dtype auto: the weights are trained, so they are loaded in fp32")
        return replace(self, dtype="float32")

    def quantization(self) -> dict[str, Any]:
        """What `from_pretrained` takes for 4 bits; nothing without. Raises ConfigError where this
        machine cannot.
        """
        if not self.load_in_4bit:
            return {}
        instead = "or set dtype: bfloat16, which holds a frozen weight in 2 bytes"
        computing = torch.float16 if self.dtype == "float16" else torch.bfloat16
        return in_few_bits(4, "load_in_4bit", instead, computing)


def in_few_bits(
    bits: Literal[4, 8], option: str, instead: str, computing: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """What `from_pretrained` takes for weights of 4 (NF4) or 8 bits (LLM.int8) of bitsandbytes.

    Raises ConfigError, which names the option and what to do `instead`, where this machine cannot.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{option} is true and the package bitsandbytes is not installed: install it "
            f"(pip install bitsandbytes), {instead}"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{option} is true and torch {torch.__version__} sees no CUDA device, which its "
            f"{bits}-bit kernels need: run on a GPU, {instead}"
        )
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    ranks: Any = PartialState()
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computing
        )
    )
    return {"quantization_config": settings, "device_map": {"": ranks.local_process_index}}


FP32 = LoadOptions()
_NONE = type(None)
_KINDS: Mapping[str, tuple[type, ...]] = {
    "dtype": (str,),
    "attn_implementation": (str, _NONE),
    "load_in_4bit": (bool,),
    "revision": (str, _NONE),
    "trust_remote_code": (bool,),
}


def held_as(model: torch.nn.Module) -> dict[str, Any]:
    """Number types of a model's weights, and its attention, as a run's record has them."""
    inner = unwrapped(model)
    types = sorted(_weight_types(inner))
    attention = inner.config._attn_implementation if isinstance(inner, PreTrainedModel) else None
    return {"weights": types, "attention": attention}


def named_as(model: torch.nn.Module) -> dict[str, Any]:
    """The name or folder of a model's own weights, and the kind of the adapter on it, if any."""
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    inner = unwrapped(model)
    name = inner.config.name_or_path if isinstance(inner, PreTrainedModel) else ""
    adapted = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    kind = adapted.active_peft_config.peft_type if isinstance(adapted, PeftModel) else None
    return {"name": name or "", "adapter": None if kind is None else str(kind.value)}


def held_like(model: torch.nn.Module) -> LoadOptions:
    """How to load another model so that it is held as this one."""
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        return FP32
    types = _weight_types(inner)
    attention = inner.config._attn_implementation
    return LoadOptions(
        dtype=next((name for name in ("bfloat16", "float16") if name in types), "float32"),
        attn_implementation=attention if attention in ATTENTIONS else None,
        load_in_4bit=is_in_4_bits(inner),
    )


def _weight_types(model: torch.nn.Module) -> set[str]:
    return {str(p.dtype).removeprefix("torch.") for p in model.parameters()}


def is_in_4_bits(model: torch.nn.Module) -> bool:
    """Whether a model's linear layers hold 4 bits a weight."""
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        return False
    settings = getattr(inner.config, "quantization_config", None)
    return bool(getattr(settings, "load_in_4bit", False))


@dataclass(frozen=True)
class Named:
    """What a model that is given by name is loaded with; of the name itself: which revision of it,
    and whether Python that comes with it is run.
    """

    options: LoadOptions = FP32
    revision: str | None = None
    trust_remote_code: bool = False


def read_load_options(given: Mapping[str, Any] | None) -> Named:
    """`model_init_kwargs` of a configuration. Raises ConfigError for other names and values."""
    values = dict(given or {})
    if isinstance(values.get("dtype"), torch.dtype):
        values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    for name, value in values.items():
        if name not in _KINDS:
            raise ConfigError(
                f"model_init_kwargs has {name!r}; it may have {', '.join(_KINDS)}. For anything "
                "else load the model yourself and pass it (load_in_4bit: true is bitsandbytes' NF4)"
            )
        if not isinstance(value, _KINDS[name]):
            said = "true or false" if _KINDS[name] == (bool,) else "text"
            raise ConfigError(f"model_init_kwargs has {name}: {value!r}; it must be {said}")
    of_name = {k: values.pop(k) for k in ("revision", "trust_remote_code") if k in values}
    try:
        return Named(LoadOptions(**values), **of_name)
    except ConfigError as error:
        raise ConfigError(f"model_init_kwargs: {error}") from error
