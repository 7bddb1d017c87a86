"""Giving a vLLM server a policy's weights, each version once.

All weights go through a folder that the server sees under the same path; an adapter goes alone, as
an adapter of its own name for every version, so that nothing that was cached for another one is
used. Rank 0 writes and loads while the others wait. Weights that ranks hold parts of are gathered
first, one after the other; rank 0 keeps them in the CPU's memory, in the type they are written in.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from neat_align.errors import ConfigError
from neat_align.files.atomic import write_folder
from neat_align.modeling.shared_prefix import unwrapped
from neat_align.modeling.whole_weights import weight_forms, whole_weights
from neat_align.sampling.policy_now import PolicyNow
from neat_align.sampling.vllm_client import ServedModel, VllmClient
from neat_align.sampling.vllm_nccl import VllmNccl

logger = logging.getLogger(__name__)
# Runs something on rank 0 alone and gives what it gave to every rank; all of them call it.
OnRankZero: TypeAlias = Callable[[Callable[[], str]], str]
# What a state dict holds, on the CPU.
Weights: TypeAlias = dict[str, torch.Tensor]


def _alone(work: Callable[[], str]) -> str:
    """What a run of one process does."""
    return work()


@dataclass
class VllmWeights:
    """Which weights a server has, and how it gets others.

    `folder` is written to and read by the server; `dtype` is what whole weights are written in
    (None: their own type). `on_rank_zero` is where the server is given them; `writes`: this process
    is rank 0. In a run of several processes every one of them calls `serve`, at the same time. With
    `nccl` whole weights go by it, and not through the folder.
    """

    client: VllmClient
    folder: Path
    dtype: torch.dtype | None
    writes: bool = True
    on_rank_zero: OnRankZero = _alone
    nccl: VllmNccl | None = None
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
        if _has_adapter(policy.model):
            _check_adapter(policy.model)
        version, name = self._served.get(policy.which, ("", ""))
        if version != policy.version:
            if self.nccl is not None:
                name = self._send(policy, self.nccl)
            else:
                weights = self._weights(policy)
                name = self.on_rank_zero(lambda: self._give(policy, weights))
            self._served[policy.which] = policy.version, name
        return name

    def _send(self, policy: PolicyNow, nccl: VllmNccl) -> str:
        """Have rank 0 send all weights as they are gathered, one after the other."""
        model = unwrapped(policy.model)
        what = (model, untied(model), self.dtype)
        device = next(model.parameters()).device
        name = self.on_rank_zero(lambda: nccl.begin(device))
        failure: Exception | None = None
        if self.writes:
            failure = nccl.send(weight_forms(*what), whole_weights(*what))
        elif policy.is_sharded:
            for _ in whole_weights(*what):
                pass

        def finish() -> str:
            nccl.finish(policy.version, failure)
            return name

        return self.on_rank_zero(finish)

    def _weights(self, policy: PolicyNow) -> Weights:
        """What the server needs of the policy, on the CPU; nothing on a rank that only waits."""
        if not self.writes and not policy.is_sharded:
            return {}
        if _has_adapter(policy.model):
            given = whole_weights(policy.model, _of_adapters(policy.model))
        else:
            model = unwrapped(policy.model)
            given = whole_weights(model, untied(model), self.dtype)
        return {name: value.cpu() for name, value in given if self.writes}

    def _give(self, policy: PolicyNow, weights: Weights) -> str:
        started, served = time.monotonic(), self.client.model()
        path = self.folder / f"{policy.which}-{policy.version}"
        if _has_adapter(policy.model):
            name = self._give_adapter(policy, weights, path, served)
        else:
            whole = unwrapped(policy.model)
            write_folder(path, lambda to: whole.save_pretrained(str(to), state_dict=weights))
            self.client.load_weights(str(path))
            name = served.name
        for other in self.folder.glob(f"{policy.which}-*"):
            if other != path:
                shutil.rmtree(other, ignore_errors=True)
        seconds = time.monotonic() - started
        logger.info("%s has weights %s after %.1f s", self.client.said, policy.version, seconds)
        return name

    def _give_adapter(
        self, policy: PolicyNow, weights: Weights, path: Path, served: ServedModel
    ) -> str:
        adapter = _check_adapter(policy.model)
        write_folder(path, lambda to: _write_adapter(policy.model, weights, to))
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


def _write_adapter(model: Any, weights: Weights, folder: Path) -> None:
    model.save_pretrained(
        str(folder),
        selected_adapters=list(model.active_adapters),
        save_embedding_layers=False,
        state_dict=weights,
    )


def _of_adapters(model: torch.nn.Module) -> Collection[str]:
    """The names of LoRA's weights, all adapters'."""
    return {name for name, _ in model.named_parameters() if "lora_" in name}


def untied(model: Any) -> Collection[str]:
    """The names of a model's weights, each once: safetensors does not write one under two names."""
    names = set(model.state_dict())
    is_tied = model.config.get_text_config().tie_word_embeddings
    return names - set(model._tied_weights_keys or ()) if is_tied else names
