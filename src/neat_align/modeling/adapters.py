"""Adapter folders: what they hold, put on the base model that they name.

An adapter that came with new tokens was trained on a base with a larger vocabulary, and holds the
rows of it: the base is resized to them, as peft's own `AutoPeftModel` does.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

from neat_align.errors import ConfigError
from neat_align.modeling.merging import (
    CannotMergeError,
    adapter_logprobs,
    merged,
    probed_tokens,
)
from neat_align.modeling.shared_prefix import adds_virtual_tokens
from neat_align.modeling.text_config import text_config

logger = logging.getLogger(__name__)
# What loading a model, adapter or tokenizer that is not what it should be has been seen to raise.
LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    SafetensorError,
)
# Tasks of peft whose adapters come with a head of their own, which is no language model's.
_OTHER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")
# Under which names, behind an embedding's or a head's own, an adapter holds all of its rows.
_WHOLE = (
    "weight",
    "base_layer.weight",
    "modules_to_save.weight",
    "token_adapter.base_layer.weight",
)
_TWICE = re.compile(r"\.(modules_to_save|original_module)\.")
_ANOTHER = (
    "it was trained on another one: correct base_model_name_or_path in its adapter_config.json, or "
    "choose another adapter"
)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder: its settings, and the file with its weights.

    `shapes` are those of its tensors, by their names in the file.
    """

    name: str
    revision: str | None
    config: Any
    base_name: str
    shapes: Mapping[str, tuple[int, ...]]


def read_adapter(name: str, revision: str | None) -> SavedAdapter:
    """What a folder or a hub repository with an adapter holds. Raises ConfigError."""
    config = _read_config(name, revision)
    base_name = config.base_model_name_or_path
    if not base_name:
        raise ConfigError(
            f"the adapter {name} does not say which model it belongs to: set "
            "base_model_name_or_path in adapter_config.json"
        )
    try:
        file = cached_file(name, "adapter_model.safetensors", revision=revision)
    except OSError as error:
        raise ConfigError(
            f"the adapter {name} has no adapter_model.safetensors, and weights are read from "
            "safetensors only: load it with peft and write it again with save_pretrained"
        ) from error
    try:
        with safe_open(str(file), framework="pt") as weights:
            shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(
            f"the adapter {name} cannot be loaded: its adapter_model.safetensors is damaged "
            f"({error}): download or save it again"
        ) from error
    return SavedAdapter(name, revision, config, str(base_name), shapes)


def _read_config(name: str, revision: str | None) -> Any:
    import peft

    broken = f"the adapter {name} cannot be loaded: its adapter_config.json is broken"
    try:
        file = cached_file(name, "adapter_config.json", revision=revision)
        with open(str(file), encoding="utf-8") as opened:  # noqa: PTH123
            settings = json.load(opened)
        kind, task = settings.get("peft_type"), settings.get("task_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{broken} ({error}): save it again") from error
    known = sorted(str(k.value) for k in peft.PeftType)
    if kind is not None and kind not in known:
        raise ConfigError(
            f"the adapter {name} is of the kind {kind}, which peft {peft.__version__} does not "
            f"have (it has {', '.join(known)}): upgrade peft, or choose another adapter"
        )
    if task in _OTHER_TASKS:
        raise ConfigError(
            f"the adapter {name} was trained for the task {task}, and a policy continues text: "
            "choose an adapter of a causal language model (task_type: CAUSAL_LM)"
        )
    try:
        return peft.PeftConfig.from_pretrained(name, revision=revision)
    except ImportError as error:
        raise ConfigError(
            f"the adapter {name} is of the kind {kind}, which needs a package that cannot be "
            f"imported ({error}): install it"
        ) from error
    except LOAD_ERRORS as error:
        raise ConfigError(
            f"{broken}, or of another version of peft than {peft.__version__} ({error}): save it "
            "again, or install the version that wrote it"
        ) from error


def adapted(saved: SavedAdapter, base: PreTrainedModel) -> Any:
    """The base with the adapter on it, a PEFT model. Raises ConfigError where it does not fit."""
    _resize(saved, base)
    return _adapted(saved, base)


def stays_adapter(saved: SavedAdapter, model: Any, reason: str) -> torch.nn.Module:
    """What becomes of an adapter that cannot be merged: it stays one, and a warning says so."""
    logger.warning(
        "the adapter %s is not merged into %s: %s. It stays an adapter, which is correct but "
        "slower",
        saved.name,
        saved.base_name,
        reason,
    )
    if adds_virtual_tokens(model):
        model.prompt_encoder[model.active_adapter].embedding.weight.requires_grad_(True)
    model.config.name_or_path = saved.name
    return cast("torch.nn.Module", model)


def put_on_base(
    saved: SavedAdapter,
    load_base: Callable[[], PreTrainedModel],
    *,
    may_merge: bool = True,
    otherwise: Callable[[SavedAdapter, Any, str], torch.nn.Module] = stays_adapter,
) -> torch.nn.Module:
    """The base with the adapter merged in; where merging changes the model, with the adapter on.

    Weights that embeddings and head share are parted first where that is what is in the way.
    `load_base` may be called again. `otherwise` is given the PEFT model that is not merged, and
    why. Raises ConfigError for an adapter that does not fit.
    """

    def sized_base() -> Any:
        base = load_base()
        _resize(saved, base)
        return base

    model = _adapted(saved, sized_base())
    if adds_virtual_tokens(model):
        return otherwise(saved, model, "it adds virtual tokens")
    if not may_merge:
        return otherwise(saved, model, "its base is held in 4 bits")
    try:
        expected = adapter_logprobs(model, probed_tokens(model))
    except LOAD_ERRORS as error:  # it needs more than token ids: whoever uses it will say so
        return otherwise(saved, model, _said(error))
    try:
        return _whole(saved, merged(model, expected))
    except CannotMergeError as error:
        reason = str(error)
    del model  # before the base is loaded again
    base = sized_base()
    if _part_embeddings(base):
        try:
            return _whole(saved, merged(_adapted(saved, base), expected))
        except CannotMergeError:
            base = sized_base()
    return otherwise(saved, _adapted(saved, base), reason)


def _whole(saved: SavedAdapter, model: Any) -> torch.nn.Module:
    model.requires_grad_(True)
    model.config.name_or_path = saved.name
    return cast("torch.nn.Module", model)


def _part_embeddings(base: Any) -> bool:
    """Give the head weights of its own, equal to the embeddings that it shared; False: it does."""
    head = base.get_output_embeddings()
    if head is None or head.weight is not base.get_input_embeddings().weight:
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    text_config(base.config).tie_word_embeddings = False
    return True


def _adapted(saved: SavedAdapter, base: PreTrainedModel) -> Any:
    """The PEFT model of a base and what was saved. Raises ConfigError."""
    import peft

    # What it can learn is marked by peft; of virtual tokens it saves the result alone, which only
    # a model for inference reads.
    saved.config.inference_mode = bool(saved.config.is_prompt_learning)
    does_not_fit = f"the adapter {saved.name} does not fit its base model {saved.base_name}"
    try:
        model: Any = peft.get_peft_model(base, saved.config)
    except LOAD_ERRORS as error:
        said = _said(error)
        is_another = "not found in the base model" in said or "size mismatch" in said
        advice = (
            _ANOTHER
            if is_another
            else f"peft {peft.__version__} cannot put an adapter of the kind "
            f"{saved.config.peft_type} on {type(base).__name__}: choose another adapter"
        )
        raise ConfigError(f"{does_not_fit} ({said}): {advice}") from error
    try:
        loaded = model.load_adapter(saved.name, "default", revision=saved.revision)
    except LOAD_ERRORS as error:
        raise ConfigError(f"{does_not_fit} ({_said(error)}): {_ANOTHER}") from error
    left_over = {key for key in loaded.unexpected_keys if not _is_read(key, saved)}
    unmatched = sorted({*loaded.missing_keys, *left_over})
    if unmatched:
        raise ConfigError(
            f"{does_not_fit} ({len(unmatched)} weights are missing or left over, such as "
            f"{unmatched[0]}): {_ANOTHER}"
        )
    return model


def _is_read(key: str, saved: SavedAdapter) -> bool:
    """Whether a weight that peft calls left over is not: it stands under another name, too.

    Virtual tokens are read apart. Where the vocabulary grew, modules that are trained whole are
    written twice, and single tokens once more for a head that shares them.
    """
    others = saved.shapes.keys() - {key}
    _, mark, part = key.rpartition(".token_adapter.")
    return (
        key == "prompt_embeddings"
        or _TWICE.sub(".", key) in others
        or (bool(mark) and any(other.endswith(mark + part) for other in others))
    )


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


# ---- added tokens --------------------------------------------------------------------------------


def _resize(saved: SavedAdapter, base: Any) -> None:
    """Give the base as many tokens as the adapter was trained with. Raises ConfigError.

    Only where the adapter holds all rows of them: a row of random numbers is no token.
    """
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    names = {id(module): name for name, module in base.named_modules()}
    parts = [embeddings]
    if head is not None and head.weight is not embeddings.weight:
        parts.append(head)
    given = [_tokens_of(names[id(part)], saved.shapes) for part in parts]
    if head is not None:
        given[-1] |= _tokens_of(names[id(head)], saved.shapes)
    rows, wanted = embeddings.weight.shape[0], {size for sizes in given for size in sizes}
    if wanted <= {rows}:
        return
    held = all(
        any(f".{names[id(part)]}.{key}" in f".{name}" for key in _WHOLE for name in saved.shapes)
        for part in parts
    )
    if len(wanted) > 1 or not held:
        raise ConfigError(
            f"the adapter {saved.name} was trained with a vocabulary of "
            f"{' and '.join(map(str, sorted(wanted)))} tokens, and its base model "
            f"{saved.base_name} has {rows}: it does not hold the embeddings of the added tokens "
            "and their rows of the head. Save the resized base model and name it in "
            "base_model_name_or_path of adapter_config.json, or save the adapter again with "
            "save_embedding_layers=True"
        )
    (size,) = wanted
    base.resize_token_embeddings(size, mean_resizing=False)


def _tokens_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> set[int]:
    """How many tokens an embedding or a head has in what an adapter saved of it."""
    sizes: set[int] = set()
    for key, shape in shapes.items():
        _, mark, part = f".{key}".rpartition(f".{name}.")
        if mark and len(shape) == 2 and part in (*_WHOLE, "lora_B.weight"):
            sizes.add(shape[0])
        elif mark and part == "lora_embedding_A":
            sizes.add(shape[1])
    return sizes
