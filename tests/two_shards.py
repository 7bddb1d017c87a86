"""What ranks do with a model whose weights they share; run by modeling/test_lockstep.py and others:
torchrun --nproc-per-node 2 two_shards.py FOLDER. Each rank writes FOLDER/RANK.pt.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from neat_align.errors import NEATError
from neat_align.modeling.kl import exact_divergence
from neat_align.modeling.lockstep import is_sharded, lockstep
from neat_align.modeling.logprobs import score_completions
from neat_align.modeling.packing import Layout
from neat_align.modeling.reference import start_policy
from neat_align.modeling.shared_prefix import unwrapped
from neat_align.sampling.protocol import SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from tiny import tiny_model

VOCABULARY = 96
PROMPTS = [tuple(range(3 + i, 9 + 2 * i)) for i in range(5)]
COMPLETIONS = [tuple((7 * i + j) % VOCABULARY for j in range(4 + 3 * i)) for i in range(5)]
# Which of them each of the two ranks has; the second rank may have none.
SHARES: dict[str, tuple[list[int], list[int]]] = {
    "uneven": ([0, 1, 2, 3], [4]),
    "empty": ([0, 1, 2, 3, 4], []),
}
LAYOUTS: tuple[Layout, ...] = ("packed", "padded")


def policy(family: str, *, adapter: bool) -> Any:
    """A model in fp64, and the same with an adapter that changes something."""
    model: Any = tiny_model(family, VOCABULARY).double()  # type: ignore[arg-type]
    if not adapter:
        return model
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return adapted.double()


def shard(model: torch.nn.Module) -> None:
    """Divide the weights as accelerate does: each layer, the norm with the head, and the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = unwrapped(model)
    backbone = inner.base_model
    for layer in getattr(backbone, "layers", None) or backbone.h:
        fully_shard(layer, mesh=mesh)
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    norm = backbone.norm if hasattr(backbone, "norm") else backbone.ln_f
    tied = head.weight is embedding.weight
    if not tied:
        fully_shard(embedding, mesh=mesh)
    tail = [norm, embedding, head] if tied else [norm, head]
    fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def sampled(model: Any, which: Sequence[int]) -> list[Any]:
    """Completions of some prompts: tokens and log-probability."""
    sampler = TransformersSampler(model, (5,), 0, batch_size=2)
    requests = [SampleRequest(PROMPTS[i], seed=100 + i) for i in which]
    samples = sampler.sample(requests, SamplingParams(12, 1.0, 1.0, 0))
    return [(s.token_ids, s.logprob) for s in samples]


def scored(model: Any, which: Sequence[int], layout: Layout) -> list[tuple[float, ...]]:
    return score_completions(
        model,
        [PROMPTS[i] for i in which],
        [COMPLETIONS[i] for i in which],
        layout=layout,
        pad_token_id=0,
        autocast_dtype=None,
        max_tokens=24,
    )


def diverged(model: Any, reference: Any, which: Sequence[int], layout: Layout) -> list[float]:
    return list(
        exact_divergence(
            model,
            reference,
            [PROMPTS[i] for i in which],
            [COMPLETIONS[i] for i in which],
            layout=layout,
            pad_token_id=0,
            autocast_dtype=None,
            max_tokens=24,
        ).kl
    )


def leaves(model: Any, reference: Any, share: Callable[[str], list[int]]) -> dict[str, Any]:
    """Everything that ranks do without a gradient, by name."""
    found: dict[str, Any] = {}
    for name in SHARES:
        which = share(name)
        found[f"sample {name}"] = sampled(model, which)
        for layout in LAYOUTS:
            found[f"score {name} {layout}"] = scored(model, which, layout)
            found[f"divergence {name} {layout}"] = diverged(model, reference, which, layout)
    return found


def failing(model: Any, rank: int) -> str:
    """What each rank raises when the second fails between its passes."""
    try:
        with lockstep(model):
            for i in range(4):
                scored(model, [i], "padded")
                if rank == 1 and i == 1:
                    raise NEATError("the second rank fails")
    except NEATError as error:
        return str(error)
    return "went on"


def case(family: str, *, adapter: bool) -> tuple[Any, Any]:
    """A policy and how to open what it started from."""
    model = policy(family, adapter=adapter)
    if adapter:
        from neat_align.modeling.reference import _adapter_off

        return _adapter_off(model), model
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.05)
    return start_policy(model, None, other)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    out: dict[str, Any] = {}
    for family, adapter in (("llama", False), ("gpt2", False), ("qwen2", True)):
        reference, model = case(family, adapter=adapter)
        model.eval()
        shard(model)
        with reference() as start:
            if start is not model:
                shard(start)
        assert is_sharded(model)
        out[family] = leaves(model, reference, lambda name: SHARES[name][rank])
        out[f"{family} error"] = failing(model, rank)
    torch.save(out, Path(sys.argv[1]) / f"{rank}.pt")
    dist.barrier()
