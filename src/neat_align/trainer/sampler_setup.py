"""Who samples, where it is another engine: a vLLM server, or what a script gives the trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch

from neat_align.config import NEATConfig
from neat_align.config.sampler_options import SAMPLER_TOLERANCE
from neat_align.errors import ConfigError, DataError, SamplerError
from neat_align.modeling.requirements import context_of
from neat_align.modeling.shared_prefix import unwrapped
from neat_align.modeling.whole_weights import weight_forms
from neat_align.runs.ranks import Ranks
from neat_align.sampling.nccl import Nccl
from neat_align.sampling.policy_now import MakeSampler, PolicyNow
from neat_align.sampling.protocol import Sampler
from neat_align.sampling.vllm_client import VllmClient
from neat_align.sampling.vllm_nccl import VllmNccl, check_sendable
from neat_align.sampling.vllm_sampler import VllmEngine
from neat_align.sampling.vllm_weights import VllmWeights, untied
from neat_align.trainer.setup import PolicySetup, TrainingData, autocast_dtype

# What NEATTrainer takes: a sampler, or a function that gives one of the policy as it is now.
GivenSampler: TypeAlias = Sampler | MakeSampler | None


def sampler_maker(
    args: NEATConfig,
    setup: PolicySetup,
    data: TrainingData,
    given: GivenSampler,
    ranks: Ranks,
) -> MakeSampler | None:
    """Who gives samplers of the policies; None: the policies themselves sample.

    Raises ConfigError, and SamplerError for a vLLM server that does not answer or has no room for
    the run's rows.
    """
    if given is None and args.sampler == "transformers":
        if args.sampler_tolerance != SAMPLER_TOLERANCE:
            raise ConfigError(
                f"sampler_tolerance is {args.sampler_tolerance:g}, and this process samples from "
                "the policy itself: remove it, or set sampler: vllm"
            )
        return None
    if given is None:
        return _vllm(args, setup, data, ranks)
    if args.sampler != "transformers":
        raise ConfigError(
            f"NEATTrainer was given a sampler and args.sampler is {args.sampler}: leave one out"
        )
    if args.generation_copy != "auto":
        raise ConfigError(
            f"NEATTrainer was given a sampler and generation_copy is {args.generation_copy}, which "
            "it does not read: leave it out"
        )
    return _maker(given)


def _maker(given: Sampler | MakeSampler) -> MakeSampler:
    if isinstance(given, type) or not (isinstance(given, Sampler) or callable(given)):
        raise ConfigError(
            f"sampler is {given!r}: pass an object with sample(requests, params, *, progress), or "
            "a function of a PolicyNow that returns one"
        )
    if not isinstance(given, Sampler):
        return given
    one = given

    def the_one(policy: PolicyNow) -> Sampler:
        if policy.which == "start":
            raise ConfigError(
                "negative_policy is initial, and the sampler that was given draws from one policy: "
                "pass a function of a PolicyNow, which says whether the current or the start "
                "policy is meant, or set negative_policy: current"
            )
        return one

    return the_one


def _vllm(args: NEATConfig, setup: PolicySetup, data: TrainingData, ranks: Ranks) -> VllmEngine:
    client = VllmClient(
        str(args.vllm_server),
        timeout=args.vllm_timeout,
        allow_http_hosts=args.allow_http_hosts or (),
    )
    served = client.model()
    _check_room(args, setup, data, client.said, served.max_model_len)
    folder = args.vllm_sync_folder or Path(str(args.output_dir)) / "vllm-weights"
    weights = VllmWeights(
        client,
        Path(folder).absolute(),
        autocast_dtype(args),
        writes=ranks.is_rank_zero,
        on_rank_zero=functools.partial(_on_rank_zero, ranks),
        nccl=_nccl(args, setup, client) if args.vllm_sync_backend == "nccl" else None,
    )
    return VllmEngine(client, weights, args.vllm_concurrency)


def _nccl(args: NEATConfig, setup: PolicySetup, client: VllmClient) -> VllmNccl:
    """Raises ConfigError and SamplerError where weights cannot go to the server by NCCL."""
    from peft import PeftModel

    if isinstance(setup.model, PeftModel):
        raise ConfigError(
            "vllm_sync_backend is nccl, by which all weights go, and an adapter is trained, which "
            "goes alone, through a folder: set vllm_sync_backend: folder"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            "vllm_sync_backend is nccl, which goes from GPU to GPU, and torch sees none here: set "
            "vllm_sync_backend: folder"
        )
    model = unwrapped(setup.model)
    check_sendable(model, weight_forms(model, untied(model), autocast_dtype(args)))
    client.check_takes_nccl()
    return VllmNccl(client, Nccl(), args.vllm_timeout)


def _on_rank_zero(ranks: Ranks, give: Callable[[], str]) -> str:
    """What `give` gave on rank 0; it ends all ranks when it raises."""
    given = list[str]()
    ranks.run_on_rank_zero(
        lambda: given.append(give()), "while vLLM was given the policy's weights"
    )
    return ranks.from_rank_zero(given[0] if given else "")


def _check_room(
    args: NEATConfig, setup: PolicySetup, data: TrainingData, server: str, room: int
) -> None:
    """Refuse rows for which the server has no room, where the model itself has.

    Raises SamplerError.
    """
    context = context_of(setup.model)
    limit = setup.instructed.training
    for row, length in zip(data.rows, data.prompt_lengths, strict=False):
        needed = length + args.max_completion_length
        if needed > room:
            raise SamplerError(
                f"{server} takes rows of {room} tokens, and {row.where} with its completion may "
                f"have {needed}: start it with --max-model-len {needed} or more, or lower "
                "max_completion_length or max_prompt_length"
            )
        if limit is not None and (context is None or room < context):
            try:
                replace(limit, context=room).check(row, setup.tokenizer, length)
            except DataError as error:
                raise SamplerError(
                    f"{server} takes rows of {room} tokens (--max-model-len): {row.where}: {error}"
                ) from error
