"""An adapter merged into its base, as a folder that plain transformers loads.

The merged folder counts only when it says what the adapter said: it is read back from the disk as
anybody would read it, and its log-probabilities are compared with those of the base with the
adapter on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from neat_align.errors import ConfigError, one_line
from neat_align.files.atomic import write_folder
from neat_align.modeling.adapters import (
    LOAD_ERRORS,
    SavedAdapter,
    adapted,
    put_on_base,
    read_adapter,
)
from neat_align.modeling.load_options import FP32
from neat_align.modeling.loading import check_source, load_whole_model
from neat_align.modeling.merging import adapter_logprobs, probed_tokens
from neat_align.modeling.rounding import rounding_limit
from neat_align.modeling.shared_prefix import adds_virtual_tokens
from neat_align.modeling.text_config import text_config

ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class MergedFolder:
    """What a merged folder is made of, and how far it is from the adapter.

    `difference` is in nats per token, over `tokens` tokens and the whole vocabulary: at the worst
    where weights are fp32, else on average (`is_worst`); up to `limit` it is rounding. `parted`:
    embeddings and head shared a weight, and have one each now.
    """

    base: str
    revision: str | None
    kind: str
    dtype: str
    parameters: int
    parted: bool
    tokens: int
    difference: float
    limit: float
    is_worst: bool


def write_merged(
    adapter: Path,
    output: Path,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    beside: Callable[[Path, str, str | None], Any] | None = None,
) -> MergedFolder:
    """Write the adapter's base with the adapter merged in: weights, configurations, tokenizer.

    `dtype` is the type of the weights (auto: that of the base as it was saved); they are merged in
    fp32 and rounded once. One model at a time is in memory. `beside` writes what else goes into the
    folder, and is told the base's name and revision. Raises ConfigError where there is no adapter,
    one that cannot be merged, or where the merged model is another one; nothing is written then.
    """
    _check_folders(adapter, output)
    saved = read_adapter(str(adapter), None)
    base = _Base(saved.base_name, saved.config.revision, trust_remote_code)
    tokens, expected = _as_adapter(saved, base.load())
    found: list[MergedFolder] = []

    def write(folder: Path) -> None:
        made = _save(folder, saved, base, dtype)
        _tokenizer(adapter, trust_remote_code).save_pretrained(folder)
        apart = _compare(folder, tokens, expected, trust_remote_code)
        kind = str(getattr(saved.config.peft_type, "value", saved.config.peft_type))
        found.append(MergedFolder(base.name, base.revision, kind, *made, len(tokens), *apart))
        if beside is not None:
            beside(folder, base.name, base.revision)

    if output.exists():
        output.rmdir()
    write_folder(output, write)
    return found[0]


@dataclass(frozen=True)
class _Base:
    """The model that an adapter belongs to, by its name."""

    name: str
    revision: str | None
    trust_remote_code: bool

    def __post_init__(self) -> None:
        check_source(self.name, self.revision, self.trust_remote_code)

    def load(self) -> PreTrainedModel:
        return load_whole_model(self.name, FP32, self.revision, self.trust_remote_code)

    def config(self) -> Any:
        return AutoConfig.from_pretrained(
            self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
        )


def _check_folders(adapter: Path, output: Path) -> None:
    if not (adapter / ADAPTER_FILE).is_file():
        raise ConfigError(
            f"{adapter} holds no adapter ({ADAPTER_FILE}): there is nothing to merge. Whole "
            "weights are used as they are"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there and not an empty folder: choose another --output")


def _save(folder: Path, saved: SavedAdapter, base: _Base, dtype: str) -> tuple[str, int, bool]:
    """Save the merged model.

    Gives the type of its weights, how many there are, and whether embeddings and head were parted.
    """
    model: Any = put_on_base(saved, base.load, otherwise=_refuse)
    config = base.config()
    count = sum(p.numel() for p in model.parameters())
    was_tied, is_tied = (text_config(c).tie_word_embeddings for c in (config, model.config))
    type_ = _type_of(dtype, config)
    model.to(type_).save_pretrained(folder)
    return str(type_).removeprefix("torch."), count, bool(was_tied and not is_tied)


def _as_adapter(
    saved: SavedAdapter, base: PreTrainedModel
) -> tuple[Tensor, Float[Tensor, "tokens vocab"]]:
    """What the base with the adapter on says. Raises ConfigError where it cannot be merged."""
    model = adapted(saved, base)
    if adds_virtual_tokens(model):
        _refuse(saved, model, "it adds virtual tokens, which no weight can hold")
    tokens = probed_tokens(model)
    try:
        return tokens, adapter_logprobs(model, tokens)
    except LOAD_ERRORS as error:
        _refuse(saved, model, one_line(error, 200))


def _refuse(saved: SavedAdapter, model: Any, reason: str) -> NoReturn:
    raise ConfigError(
        f"the adapter {saved.name} cannot be merged into {saved.base_name} ({reason}): use it as "
        "it is, with peft's AutoPeftModelForCausalLM.from_pretrained, or, if it is a LoRA, with "
        "vLLM's --enable-lora --lora-modules NAME=FOLDER"
    )


def _type_of(dtype: str, config: Any) -> torch.dtype:
    """The type that was asked for; auto: the one in which the base was saved."""
    found = getattr(torch, dtype) if dtype != "auto" else config.dtype or text_config(config).dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def _tokenizer(adapter: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise ConfigError(
            f"the tokenizer beside the adapter {adapter} cannot be loaded "
            f"({one_line(error, 200)}): save the one that it was trained with into that folder"
        ) from error


def _compare(
    folder: Path,
    tokens: Tensor,
    expected: Float[Tensor, "tokens vocab"],
    trust_remote_code: bool,
) -> tuple[float, float, bool]:
    """How far the folder's model is from what was expected, the limit, and whether at the worst.

    Raises ConfigError past the limit.
    """
    again: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    limit = rounding_limit(again)
    difference = limit.measure(adapter_logprobs(again, tokens) - expected)
    if not difference <= limit.nats:
        raise ConfigError(
            f"the merged model says something else than the adapter ({difference:.2g} nats per "
            f"token apart, and rounding explains {limit.nats:g}): nothing was written. Try --dtype "
            "float32, or use the adapter as it is"
        )
    return difference, limit.nats, limit.exact
