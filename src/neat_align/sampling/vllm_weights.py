"""Giving a vLLM server a policy's weights, each version once.

All weights go through a folder that the server sees under the same path; an adapter goes alone, as
an adapter of its own name for every version, so that nothing that was cached for another one is
used. Rank 0 writes and loads; the others wait for the note that it leaves in the folder.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from neat_align.errors import ConfigError, SamplerUnavailableError
from neat_align.files.atomic import read_json, write_folder, write_json
from neat_align.modeling.shared_prefix import unwrapped
from neat_align.sampling.policy_now import PolicyNow
from neat_align.sampling.vllm_client import ServedModel, VllmClient

logger = logging.getLogger(__name__)
_LOOK_SECONDS = 0.2


@dataclass
class VllmWeights:
    """Which weights a server has, and how it gets others.

    `folder` is written to and read by the server; `dtype` is what whole weights are written in
    (None: their own type). `writes`: this process gives the server its weights (rank 0); another
    one waits for that, at most `timeout` seconds.
    """

    client: VllmClient
    folder: Path
    dtype: torch.dtype | None
    writes: bool
    timeout: float
    # Of the current and of the start policy: the version that is served, and its name.
    _served: dict[str, tuple[str, str]] = field(default_factory=dict, init=False)

    def serve(self, policy: PolicyNow) -> str:
        """Have the server serve this policy; the name under which it does.

        Raises ConfigError for a policy that vLLM cannot serve, and what the client raises.
        """
        if policy.adapter_is_off:
            return self.client.model().name
        if policy.which == "start" and not _has_adapter(policy.model):
            raise ConfigError(
                "negative_policy is initial and sampler is vllm, and the start policy is not the "
                "trained model with its adapter switched off: the server has room for one set of "
                "weights. Train an adapter (use_peft, without ref_model), whose base the server "
                "keeps, or set negative_policy: current or sampler: transformers"
            )
        served = self._served.get(policy.which)
        if served is None or served[0] != policy.version:
            served = self._give(policy) if self.writes else self._wait_for(policy)
            self._served[policy.which] = served
        return served[1]

    def _give(self, policy: PolicyNow) -> tuple[str, str]:
        started, served = time.monotonic(), self.client.model()
        path = self.folder / f"{policy.which}-{policy.version}"
        if _has_adapter(policy.model):
            name = self._give_adapter(policy, path, served)
        else:
            write_folder(path, lambda to: _write_weights(policy.model, to, self.dtype))
            self.client.load_weights(str(path))
            name = served.name
        for other in self.folder.glob(f"{policy.which}-*"):
            if other != path:
                shutil.rmtree(other, ignore_errors=True)
        write_json(self._note(policy), {"version": policy.version, "model": name})
        seconds = time.monotonic() - started
        logger.info("%s has weights %s after %.1f s", self.client.said, policy.version, seconds)
        return policy.version, name

    def _give_adapter(self, policy: PolicyNow, path: Path, served: ServedModel) -> str:
        adapter = _check_adapter(policy.model)
        write_folder(path, lambda to: _write_adapter(policy.model, to))
        prefix = self._prefix(policy)
        name = f"{prefix}{policy.version}"
        if name in served.adapters:  # an earlier process of this run
            self.client.unload_adapter(name)
        where = path if adapter == "default" else path / adapter
        self.client.load_adapter(name, str(where))
        for old in served.adapters:
            if old.startswith(prefix) and old != name:
                self.client.unload_adapter(old)
        return name

    def _prefix(self, policy: PolicyNow) -> str:
        """Of the names of this run's adapters: other runs may use the same server."""
        run = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        return f"neat-align-{run}-{policy.which}-"

    def _note(self, policy: PolicyNow) -> Path:
        """Where rank 0 writes what the server has."""
        return self.folder / f"served-{policy.which}.json"

    def _wait_for(self, policy: PolicyNow) -> tuple[str, str]:
        note, deadline = self._note(policy), time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            said = read_json(note) if note.is_file() else {}
            if said.get("version") == policy.version:
                return policy.version, str(said["model"])
            time.sleep(_LOOK_SECONDS)
        raise SamplerUnavailableError(
            f"rank 0 has not given {self.client.said} the weights {policy.version} within "
            f"{self.timeout:g} s, by {note}: all ranks have to see the run directory, and to hold "
            "the same weights; a large model may need a higher vllm_timeout"
        )


def _has_adapter(model: torch.nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _check_adapter(model: Any) -> str:
    """The name of the adapter that is on. Raises ConfigError for one that vLLM cannot serve."""
    from peft import LoraConfig

    active = list(model.active_adapters)
    config = model.peft_config[active[0]]
    wrong = [f"{len(active)} adapters are on"] if len(active) > 1 else []
    if not isinstance(config, LoraConfig):
        wrong.append(f"it is {type(config).__name__}, and not LoRA")
    else:
        wrong += [
            f"{name} is {value!r}"
            for name, value, plain in (
                ("use_dora", config.use_dora, False),
                ("bias", config.bias, "none"),
                ("lora_bias", config.lora_bias, False),
                ("modules_to_save", config.modules_to_save, None),
                ("trainable_token_indices", config.trainable_token_indices, None),
                ("target_parameters", config.target_parameters, None),
                ("layer_replication", config.layer_replication, None),
            )
            if value != plain and value
        ]
    if wrong:
        raise ConfigError(
            f"the adapter is not one that vLLM serves ({'; '.join(wrong)}): use plain LoRA, or "
            "sampler: transformers"
        )
    return str(active[0])


def _write_adapter(model: Any, folder: Path) -> None:
    active = list(model.active_adapters)
    model.save_pretrained(str(folder), selected_adapters=active, save_embedding_layers=False)


def _write_weights(model: torch.nn.Module, folder: Path, dtype: torch.dtype | None) -> None:
    whole = cast("Any", unwrapped(model))
    save: Callable[..., Any] = whole.save_pretrained
    if dtype is None:
        save(str(folder))
        return
    tied = set(cast("Any", whole)._tied_weights_keys or ())
    shared = whole.state_dict()
    state = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
        for name, value in shared.items()
        if name not in tied or not whole.config.get_text_config().tie_word_embeddings
    }
    save(str(folder), state_dict=state)
