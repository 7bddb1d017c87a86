"""Models and tokenizers by name or path: safetensors only, remote code pinned.

What an adapter folder holds is put on its base by `adapters.py`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState, init_empty_weights
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    find_adapter_config_file,
)

from neat_align.errors import ConfigError, one_line
from neat_align.files.paths import is_likely_path, is_surely_path, no_such_path
from neat_align.modeling.adapters import LOAD_ERRORS, put_on_base, read_adapter
from neat_align.modeling.load_options import FP32, LoadOptions
from neat_align.modeling.requirements import check_causal

logger = logging.getLogger(__name__)
_CONVERT = (
    "load it once with AutoModelForCausalLM.from_pretrained on a machine where you trust the "
    "file, and write it again with save_pretrained, which writes safetensors"
)


def check_source(name: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse code that comes with a model and is not pinned, and a revision of a folder.

    Pinned: `revision` is a full commit. And a path at which there is nothing. Raises ConfigError.
    """
    if is_surely_path(name) and not Path(name).expanduser().exists():
        raise ConfigError(f"the model {no_such_path(name)}")
    if Path(name).is_dir():
        if revision is not None:
            raise ConfigError(
                f"model_revision is {revision!r} but the model {name} is a folder and has no "
                "revisions: remove it"
            )
    elif trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ConfigError(
            f"trust_remote_code is true for {name}, and model_revision is {revision!r}: code from "
            "the hub can change at any time, so set model_revision to the full commit (40 hex "
            "digits) whose code you have read"
        )


def load_policy(
    name: str,
    options: LoadOptions = FP32,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    once: bool = False,
) -> torch.nn.Module:
    """A causal language model by name or path, in the number type of `options` (fp32).

    With `once` the first process of the run alone loads the weights; on the others they are on the
    meta device. Raises ConfigError for an adapter folder then.

    The adapter in an adapter folder is merged into its base. Merged, it is a model like any other:
    a run that trained an adapter can be evaluated, and trained on. An adapter that cannot be
    merged, or would be another one merged, stays an adapter on its base: a PEFT model, in which the
    adapter is what learns. Weights are read from safetensors only. Raises ConfigError for what is
    no causal language model, is incomplete, or comes with code of its own, and for 4 bits where
    they cannot be had.
    """
    check_source(name, revision, trust_remote_code)
    if once and options.load_in_4bit:
        raise ConfigError(
            "cpu_ram_efficient_loading is true, and load_in_4bit is: the first process cannot give "
            "weights in 4 bits to the others; set cpu_ram_efficient_loading to false"
        )
    options.quantization()  # refused before anything is read
    try:
        adapter = find_adapter_config_file(name, revision=revision)
    except LOAD_ERRORS as error:
        raise ConfigError(f"the model {name} cannot be loaded: {_advice(name, error)}") from error
    if adapter is None:
        processes: Any = PartialState() if once else None
        load = _without_weights if once and processes.process_index else load_whole_model
        return load(name, options, revision, trust_remote_code)
    if once:
        raise ConfigError(
            f"cpu_ram_efficient_loading is true, and {name} is an adapter, which every process has "
            "to merge into its base: set it to false, or name the merged model (the folder that "
            "merge_and_unload().save_pretrained wrote)"
        )
    saved = read_adapter(name, revision)
    base, its_revision = saved.base_name, saved.config.revision
    check_source(base, its_revision, trust_remote_code)
    return put_on_base(
        saved,
        lambda: load_whole_model(base, options, its_revision, trust_remote_code),
        may_merge=not options.load_in_4bit,
    )


def load_whole_model(
    name: str, options: LoadOptions, revision: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """A model that is no adapter; `load_policy` says what is refused. Raises ConfigError."""
    attention: dict[str, Any] = {}
    if options.attn_implementation is not None:
        attention = {"attn_implementation": options.attn_implementation}
    try:
        if trust_remote_code:
            settings, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
            _check_code_is_its_own(name, settings)
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
        check_causal(config, name)
        load: Any = AutoModelForCausalLM.from_pretrained
        model, info = load(
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=options.torch_dtype,
            use_safetensors=True,
            output_loading_info=True,
            **attention,
            **options.quantization(),
        )
    except ConfigError:
        raise
    except LOAD_ERRORS as error:
        _check_attention(options, name, error)
        raise ConfigError(f"the model {name} cannot be loaded: {_advice(name, error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"the model {name} has no weights for {', '.join(missing[:3])}: they would be random. "
            "Name a trained causal language model"
        )
    return cast("PreTrainedModel", model)


def _without_weights(
    name: str, options: LoadOptions, revision: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The model that `load_whole_model` gives another process; its weights are on meta."""
    try:
        config: Any = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
        make: Any = AutoModelForCausalLM.from_config
        asked = {"attn_implementation": options.attn_implementation}
        with init_empty_weights(include_buffers=False):
            model = make(
                config,
                dtype=config.dtype if options.dtype == "auto" else options.torch_dtype,
                trust_remote_code=trust_remote_code,
                **{key: value for key, value in asked.items() if value is not None},
            )
        model.tie_weights()  # each was put on the meta device by itself
        with contextlib.suppress(OSError):  # it has none
            read: Any = GenerationConfig.from_pretrained
            model.generation_config = read(name, revision=revision)
    except LOAD_ERRORS as error:
        raise ConfigError(f"the model {name} cannot be made: {_advice(name, error)}") from error
    return cast("PreTrainedModel", model.eval())


def load_renamed_weights(model: torch.nn.Module, folder: Path) -> bool:
    """Load a checkpoint's weights where they have other names there than in the model.

    `save_pretrained` writes some models (mixtures of experts, Gemma 3, LLaVA) under the names of
    their first version, and Trainer, which looks for the model's own, goes on with the weights that
    it does not find as they were. Gives whether it was so; nothing is done where it was not, or
    where `folder` holds an adapter. Raises ConfigError when weights of the model are not there.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    saved, own = _saved_names(folder), model.state_dict()
    there = {own[name].data_ptr() for name in saved & own.keys()}  # tied weights are saved once
    if not saved or (saved <= own.keys() and all(w.data_ptr() in there for w in own.values())):
        return False
    loaded, info = cast("Any", type(model)).from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    lost = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if lost or info["mismatched_keys"]:
        raise ConfigError(
            f"the checkpoint {folder} does not hold the weights of this {type(model).__name__}: "
            f"{', '.join(lost[:3]) or 'their shapes differ'}. Go on from another checkpoint, or "
            "with the version of transformers that wrote it"
        )
    model.load_state_dict(loaded.state_dict())
    return True


def _saved_names(folder: Path) -> set[str]:
    """The names of the weights that `save_pretrained` wrote into a folder."""
    index, whole = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not whole.is_file():
        return set()
    with safe_open(whole, "pt") as file:
        return set(file.keys())


def weights_are_here(name: str, revision: str | None = None) -> bool:
    """Whether a model's weights are on this machine: in that folder, or in the hub's cache."""
    if Path(name).is_dir():
        return any(Path(name).glob("*.safetensors"))
    files = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    return any(
        isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files
    )


def _check_code_is_its_own(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse code that lies in another repository: the model's revision does not pin it."""
    code = settings.get("auto_map") or {}
    entries = code.values() if isinstance(code, Mapping) else [code]
    for entry in entries:
        references = entry if isinstance(entry, list | tuple) else [entry]
        for reference in references:
            repository, mark, _ = str(reference).partition("--")
            if mark and repository != name:
                raise ConfigError(
                    f"the code of {name} lies in {repository}, which model_revision does not pin: "
                    "use a copy that holds its own"
                )


def _check_attention(options: LoadOptions, name: str, error: BaseException) -> None:
    """Raise ConfigError where the attention that was asked for is what loading failed over."""
    asked = options.attn_implementation
    said = one_line(error, 300)
    words = ("attention", "Attention", "attn", "flash", "kernels", asked)
    if asked is not None and any(word in said for word in words if word):
        raise ConfigError(
            f"attn_implementation is {asked}, which cannot be used for the model {name} ({said}): "
            "install what it needs, or leave it out"
        ) from error


def _advice(name: str, error: BaseException) -> str:
    """What loading raised, and what to do about the cases that have an answer."""
    folder = Path(name)
    if is_likely_path(name) and not folder.exists():
        return f"there is no such folder in {folder.parent}, and no such model on the hub either"
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        return (
            f"it holds pickled weights ({next(folder.glob('*.bin')).name}), and weights are "
            f"read from safetensors only: {_CONVERT}"
        )
    said = one_line(error)
    if "trust_remote_code" in said:
        return (
            "it comes with Python of its own, which is not run unless trust_remote_code is "
            "true (read the code first)"
        )
    if "Unrecognized configuration class" in said:
        return (
            "its type has no causal language model in transformers: name a model that "
            "continues text (Llama, Qwen, …)"
        )
    if "safetensors" in said and ("no file named" in said or "not appear to have" in said):
        return f"{said[:400]}. Weights are read from safetensors only: {_CONVERT}"
    return f"{said[:400]}: check the name, or download the model again if its files are damaged"


def load_tokenizer(
    model: Any,
    tokenizer: Any = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The given tokenizer or the model's own; eos serves as pad where there is none.

    It may: masks go by length, not by token. Raises ConfigError for a tokenizer that cannot be
    loaded or has no eos.
    """
    if tokenizer is None:
        name = model.config.name_or_path
        try:
            if trust_remote_code:
                _check_code_is_its_own(name, get_tokenizer_config(name, revision=revision))
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code
            )
        except ConfigError:
            raise
        except LOAD_ERRORS as error:
            raise ConfigError(
                f"the tokenizer of {name or type(model).__name__} cannot be loaded "
                f"({one_line(error, 300)}): save it beside "
                "the model, or pass it as processing_class"
            ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no eos_token, so no answer could end: set tokenizer.eos_token"
        )
    if tokenizer.pad_token_id is None:
        logger.warning(
            "the tokenizer has no pad token: %r is used for padding", tokenizer.eos_token
        )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
