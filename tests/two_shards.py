"""What ranks do with a model whose weights they share; run by modeling/test_lockstep.py and others:
torchrun --nproc-per-node 2 two_shards.py FOLDER. Each rank writes FOLDER/RANK.pt.
"""

from __future__ import annotations

import copy
import os
import sys
import time
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
from neat_align.modeling.lockstep import is_sharded, lockstep, wait_at_most
from neat_align.modeling.logprobs import score_completions
from neat_align.modeling.packing import Layout
from neat_align.modeling.reference import _adapter_off, start_policy
from neat_align.modeling.shared_prefix import unwrapped
from neat_align.modeling.whole_weights import whole_weights
from neat_align.sampling.policy_now import weights_version
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
# Name, family, and whether it has an adapter: head apart, head tied to the embeddings, LoRA.
CASES = (("llama", "llama", False), ("gpt2", "gpt2", False), ("lora", "qwen2", True))
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


def turns(model: Any, reference: Any, rank: int) -> tuple[list[Any], list[Any]]:
    """A completion under the policy and the start policy, in an order that depends on the rank."""

    def of_start() -> list[Any]:
        with reference() as start:
            return list(scored(start, [1], "padded")[0])

    def of_policy() -> list[Any]:
        return list(scored(model, [1], "padded")[0])

    with reference() as start:
        stepped = lockstep(model, start)
    first, second = (of_policy, of_start) if rank == 0 else (of_start, of_policy)
    with stepped:
        return first(), second()


def gathered(model: Any) -> dict[str, Any]:
    """Every weight, whole, after a pass: which leaves some of FSDP2's gathered."""
    scored(model, [0], "packed")
    return {
        "weights": {name: value.clone() for name, value in whole_weights(model)},
        "halves": {name: value.clone() for name, value in whole_weights(model, None, torch.half)},
        "version": weights_version(model),
    }


def case(family: str, *, adapter: bool) -> tuple[Any, Any]:
    """How to open a start policy, and the policy, which is another."""
    model = policy(family, adapter=adapter)
    if adapter:
        return _adapter_off(model), model
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.05)
    return start_policy(model, None, other)


def sharded_case(family: str, *, adapter: bool) -> tuple[Any, Any]:
    """The same, with the weights divided."""
    reference, model = case(family, adapter=adapter)
    model.eval()
    shard(model)
    with reference() as start:
        if start is not model:
            shard(start)
        assert is_sharded(start)
    return reference, model


def leave(folder: Path, *, stuck: bool) -> None:
    """The second rank is gone, or stuck, while the first scores."""
    _, model = sharded_case("llama", adapter=False)
    if stuck:
        wait_at_most(2)
    if dist.get_rank() == 1:
        with lockstep(model):
            scored(model, [0], "padded")
            while stuck and not (folder / "gone.txt").exists():
                time.sleep(0.1)
            os._exit(0)
    try:
        scored(model, [0, 1, 2, 3], "padded")
    except NEATError as error:
        (folder / "gone.txt").write_text(str(error))
    os._exit(0)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), Path(sys.argv[1])
    torch.set_num_threads(1)
    if "gone" in sys.argv or "stuck" in sys.argv:
        leave(folder, stuck="stuck" in sys.argv)
    out: dict[str, Any] = {}
    for name, family, adapter in CASES:
        reference, model = sharded_case(family, adapter=adapter)
        out[name] = leaves(model, reference, lambda shares: SHARES[shares][rank])
        out[f"{name} error"] = failing(model, rank)
        out[f"{name} gathered"] = gathered(model)
        out[f"{name} turns"] = turns(model, reference, rank)
    torch.save(out, folder / f"{rank}.pt")
    dist.barrier()
