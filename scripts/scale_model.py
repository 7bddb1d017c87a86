"""How long a round takes and what it needs, predicted: 1B, 8B and 70B on 1 to 512 GPUs.

    python scripts/scale_model.py                                        the tables of docs/scale.md
    python scripts/scale_model.py --check docs/results/scale-check.json  predicted against measured

Pure arithmetic over the shape of a model, a machine and a round: FLOPs, bytes read, bytes sent.
Every phase takes as long as the slowest of the three. Nothing here was measured on a GPU: the
figures of a machine are its maker's, and the shares of them that software reaches are assumptions
(`Machine`), which benchmarks/gpu_check.py is there to replace.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Llama: `heads` query heads and `kv_heads` of keys and values, `head_dim` wide."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of one layer."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        """Weights in the output head."""
        return self.hidden * self.vocabulary

    @property
    def trunk_weights(self) -> int:
        """Weights in the matrices of all layers."""
        return self.layers * self.layer_weights

    @property
    def weights(self) -> int:
        """All weights; norms, under a thousandth of a percent, are left out."""
        return self.trunk_weights + self.head_weights * (1 if self.tied else 2)

    @property
    def cache_width(self) -> int:
        """Numbers that one token adds to the cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def attention_flops(self, context: float) -> float:
        """FLOPs of one token's attention over so many: scores, and values weighed by them."""
        return 4 * self.layers * self.heads * self.head_dim * context


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, from their maker's data sheet, and what software reaches of it (assumed).

    `flops` are dense bf16 FLOP/s, `bandwidth` and links bytes/s, each way; links are a GPU's own,
    `node_link` within a node of `node_size`. `compute`, `read` and `link` are the shares that are
    reached; `step_seconds` is what one decoding step costs on top, `hop_seconds` one all-reduce.
    """

    flops: float
    bandwidth: float
    memory: float
    node_link: float
    network: float
    node_size: int = 8
    compute: float = 0.40
    read: float = 0.60
    link: float = 0.70
    step_seconds: float = 1e-3
    hop_seconds: float = 15e-6
    usable: float = 0.90
    number_bytes: int = 2

    def link_speed(self, gpus: int) -> float:
        """Bytes/s that a GPU sends among so many: the network's, once they are on several nodes."""
        return self.link * (self.node_link if gpus <= self.node_size else self.network)


@dataclass(frozen=True)
class Round:
    """One round: `prompts` of `prompt` tokens, `completions` each, of `completion` tokens on
    average and `longest` at most; an instruction adds `instruction` tokens.
    """

    prompts: int = 4096
    prompt: int = 256
    instruction: int = 32
    completions: int = 8
    origins: int = 3
    completion: int = 256
    longest: int = 512
    groups_per_step: int = 512
    micro_batch_tokens: int = 8_192
    scoring_passes: int = 2
    checkpointing: bool = True

    @property
    def group_tokens(self) -> int:
        """Tokens of one packed group: the prompt once."""
        return self.prompt + self.completions * self.completion

    @property
    def steps(self) -> int:
        """Optimizer steps in the round."""
        return -(-self.prompts // self.groups_per_step)


LLAMA_1B = Shape("1B", 2048, 16, 32, 8, 64, 8192, 128_256, tied=True)
LLAMA_8B = Shape("8B", 4096, 32, 32, 8, 128, 14_336, 128_256)
LLAMA_70B = Shape("70B", 8192, 80, 64, 8, 128, 28_672, 128_256)
# H100 SXM: 1,979 TFLOP/s with sparsity, half of that dense; 3.35 TB/s; 80 GB; NVLink 900 GB/s, both
# ways together. DGX H100: one 400 Gbit/s adapter a GPU.
H100 = Machine(989.5e12, 3.35e12, 80e9, 450e9, 50e9)


Sharding: TypeAlias = Literal["no", "all", "node"]


@dataclass(frozen=True)
class Plan:
    """How a model is trained: `trained` all weights (full) or LoRA; weights whole on each GPU, or
    `sharded` over all of them or over those of a `node`; bytes of a frozen weight; whether an
    engine of its own samples, with its own weights.
    """

    name: str
    trained: str
    sharded: Sharding
    frozen_bytes: float = 2.0
    own_engine: bool = True

    def trained_weights(self, shape: Shape) -> float:
        """Weights that learn, and are given to who samples."""
        return shape.weights * (1.0 if self.trained == "full" else LORA_SHARE)

    def shards(self, gpus: int, node: int) -> int:
        """Over how many GPUs a weight is divided."""
        return {"no": 1, "all": gpus, "node": min(gpus, node)}[self.sharded]


# In the order of choice: the first that fits.
PLANS = (
    Plan("full, DDP", "full", "no"),
    Plan("full, FSDP2", "full", "all"),
    Plan("LoRA, DDP", "lora", "no"),
    Plan("LoRA, FSDP2", "lora", "all"),
    Plan("LoRA, 4-bit base", "lora", "no", frozen_bytes=0.55, own_engine=False),
)
# fp32 weights and gradients, two fp32 moments (Adam).
TRAINED_BYTES = 16
# LoRA r = 16 on every matrix of Llama 8B is 0.5 % of its weights.
LORA_SHARE = 0.005
# Of `sampling_in_place`: completions at once, and the host's time for one layer (assumed).
IN_PLACE_BATCH = 64
LAYER_SECONDS = 5e-4


# ---- FLOPs ---------------------------------------------------------------------------------------


def forward_flops(shape: Shape, work: Round) -> float:
    """One packed group forward: all tokens through the trunk, completions through the head."""
    answers = work.completions * work.completion
    attended = work.prompt * work.prompt / 2 + answers * (work.prompt + work.completion / 2)
    matrices = work.group_tokens * shape.trunk_weights + answers * shape.head_weights
    return 2 * matrices + shape.attention_flops(1) * attended


def training_passes(trained: str, *, checkpointing: bool) -> int:
    """Forward passes that a training step is worth.

    Forward, again for checkpointing, gradients of activations, and those of weights unless LoRA.
    """
    return 2 + checkpointing + (trained == "full")


# ---- bytes ---------------------------------------------------------------------------------------


def activation_bytes(shape: Shape, work: Round) -> float:
    """Of one micro-batch with gradient checkpointing: layers' inputs, and one layer's inside."""
    inside = 10 * shape.hidden + 4 * shape.intermediate
    return 2.0 * work.micro_batch_tokens * (shape.hidden * shape.layers + inside)


def state_bytes(shape: Shape, plan: Plan, machine: Machine, gpus: int) -> float:
    """Weights, gradients, moments and the start policy that one GPU keeps."""
    if plan.trained == "full":
        total = shape.weights * (TRAINED_BYTES + plan.frozen_bytes)  # the start policy, frozen
    else:  # the adapter switched off is the start policy
        total = shape.weights * (plan.frozen_bytes + LORA_SHARE * TRAINED_BYTES)
    return total / plan.shards(gpus, machine.node_size)


def training_bytes(shape: Shape, plan: Plan, work: Round, machine: Machine, gpus: int) -> float:
    """What one GPU holds at the most while it trains."""
    layer = 2.0 * (shape.layer_weights + shape.head_weights) if plan.sharded != "no" else 0.0
    return state_bytes(shape, plan, machine, gpus) + activation_bytes(shape, work) + layer


def cache_room(shape: Shape, plan: Plan, machine: Machine, gpus: int, split: int) -> float:
    """Bytes of a GPU that are left for the cache while it samples; `split`: GPUs to a replica."""
    weights = shape.weights * machine.number_bytes / split if plan.own_engine else 0.0
    return machine.usable * machine.memory - state_bytes(shape, plan, machine, gpus) - weights


# ---- seconds -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase by what takes them; `bound` says which of them is the slowest."""

    parts: Mapping[str, float]
    more: float = 0.0

    @property
    def bound(self) -> str:
        """What the phase waits for."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def seconds(self) -> float:
        """The slowest part, and what nothing overlaps."""
        return max(self.parts.values()) + self.more


def decode_step(
    shape: Shape, work: Round, machine: Machine, *, batch: float, split: int, weight_bytes: float
) -> dict[str, float]:
    """Seconds, by cause, of one token for each of `batch` sequences on `split` GPUs."""
    context = work.prompt + work.instruction + work.completion / 2
    reading = machine.bandwidth * machine.read * split
    cache = batch * context * shape.cache_width * machine.number_bytes
    matrices = 2 * (shape.trunk_weights + shape.head_weights)
    flops = batch * (matrices + shape.attention_flops(context))
    weights = (shape.trunk_weights + shape.head_weights) * weight_bytes
    memory = "reading weights" if weights > cache else "reading the cache"
    return {
        memory: (weights + cache) / reading,
        "arithmetic": flops / (machine.flops * machine.compute * split),
    }


def sampling(shape: Shape, plan: Plan, work: Round, machine: Machine, gpus: int) -> Phase:
    """All completions of a round, places refilled as completions end.

    Raises ValueError when the model fits in no replica.
    """
    split, batch, waiting = replica(shape, plan, work, machine, gpus)
    replicas = gpus // split
    here = math.ceil(work.prompts / replicas) * work.completions
    # The last place to be filled is not done before its longest answer.
    steps = max(float(work.longest), work.completion * here / batch)
    weight_bytes = machine.number_bytes if plan.own_engine else plan.frozen_bytes
    step = decode_step(shape, work, machine, batch=batch, split=split, weight_bytes=weight_bytes)
    if steps == work.longest:  # the batch thins out: the last answers alone decide
        step = {f"the longest answer ({cause})": s for cause, s in step.items()}
    prefill = work.origins * math.ceil(work.prompts / replicas)
    prompt = work.prompt + work.instruction
    flops = 2 * prompt * shape.trunk_weights + shape.attention_flops(prompt / 2) * prompt
    more = prefill * flops / (machine.flops * machine.compute * split)
    return Phase({cause: steps * s for cause, s in step.items()}, more + steps * waiting)


def replica(
    shape: Shape, plan: Plan, work: Round, machine: Machine, gpus: int
) -> tuple[int, float, float]:
    """GPUs of one sampling replica, sequences at once, and seconds a step that nothing overlaps.

    The fewest GPUs that leave room for 16 sequences of the longest kind, or, sharing nothing, one.
    """
    sequence = (work.prompt + work.instruction + work.longest) * shape.cache_width
    for split in (1, 2, 4, 8):
        room = cache_room(shape, plan, machine, gpus, split) * split
        fits = room / (sequence * machine.number_bytes)
        if split <= min(gpus, machine.node_size) and fits >= 16:
            here = math.ceil(work.prompts / (gpus // split)) * work.completions
            batch = min(fits, float(here))
            sent = 2 * (split - 1) / split * batch * shape.hidden * machine.number_bytes
            hop = machine.hop_seconds + sent / machine.link_speed(split)
            talk = 2 * shape.layers * hop if split > 1 else 0.0
            return split, batch, talk + machine.step_seconds
    raise ValueError(f"{shape.name} does not fit on {gpus} GPUs to sample from")


def sampling_in_place(shape: Shape, plan: Plan, work: Round, machine: Machine, gpus: int) -> Phase:
    """The same from the policy that trains, through transformers, which needs no second weights.

    Batches of `IN_PLACE_BATCH` that wait for their longest, a kernel at a time; sharded weights are
    gathered for every token.
    """
    here = math.ceil(work.prompts / gpus) * work.completions
    batch = min(here, IN_PLACE_BATCH)
    steps = math.ceil(here / batch) * work.longest
    step = decode_step(shape, work, machine, batch=batch, split=1, weight_bytes=plan.frozen_bytes)
    step["launching kernels"] = shape.layers * LAYER_SECONDS
    step["gathering weights"] = gather_seconds(shape, plan, machine, gpus)
    return Phase({cause: steps * s for cause, s in step.items()})


def scoring(shape: Shape, plan: Plan, work: Round, machine: Machine, gpus: int) -> Phase:
    """Log-probabilities of the round's completions under the current and the start policy."""
    groups = math.ceil(work.prompts / gpus)
    flops = work.scoring_passes * groups * forward_flops(shape, work)
    micro_batches = math.ceil(groups * work.group_tokens / work.micro_batch_tokens)
    gathers = work.scoring_passes * micro_batches
    return Phase(
        {
            "arithmetic": flops / (machine.flops * machine.compute),
            "the network": gathers * gather_seconds(shape, plan, machine, gpus),
        }
    )


def gather_seconds(shape: Shape, plan: Plan, machine: Machine, gpus: int) -> float:
    """Seconds for a GPU to receive all weights, once, from those that hold parts of them."""
    shards = plan.shards(gpus, machine.node_size)
    sent = shape.weights * machine.number_bytes * (shards - 1) / shards
    return sent / machine.link_speed(shards)


def gradient_seconds(trained: float, plan: Plan, machine: Machine, gpus: int) -> float:
    """Seconds to add so many gradients up: within those that share the weights, then over them."""
    shards = plan.shards(gpus, machine.node_size)
    copies = gpus // shards
    within = 4 * trained * (shards - 1) / shards / machine.link_speed(shards)
    return within + 2 * 4 * trained / shards * (copies - 1) / copies / machine.link_speed(gpus)


def training(shape: Shape, plan: Plan, work: Round, machine: Machine, gpus: int) -> Phase:
    """All optimizer steps of a round."""
    groups = math.ceil(min(work.groups_per_step, work.prompts) / gpus)
    passes = training_passes(plan.trained, checkpointing=work.checkpointing)
    flops = groups * forward_flops(shape, work) * passes
    trained = plan.trained_weights(shape)
    # Weights are gathered forward and backward for each micro-batch, gradients added up once.
    micro_batches = math.ceil(groups * work.group_tokens / work.micro_batch_tokens)
    gathering = 2 * micro_batches * gather_seconds(shape, plan, machine, gpus)
    # Adam reads weights, gradients and moments, and writes all but the gradients, in fp32.
    mine = trained / plan.shards(gpus, machine.node_size)
    update = 28 * mine / (machine.bandwidth * machine.read)
    step = {
        "arithmetic": flops / (machine.flops * machine.compute),
        "the network": gathering + gradient_seconds(trained, plan, machine, gpus),
    }
    return Phase({cause: work.steps * s for cause, s in step.items()}, work.steps * update)


def syncing(shape: Shape, plan: Plan, machine: Machine, gpus: int) -> float:
    """Seconds to give the sampling engine the new weights, a GPU receiving all or the adapter."""
    if not plan.own_engine:
        return 0.0
    sent = plan.trained_weights(shape) * machine.number_bytes
    shards = plan.shards(gpus, machine.node_size)
    if shards == 1:  # from the memory of the same GPU
        return 2 * sent / (machine.bandwidth * machine.read)
    return sent / machine.link_speed(shards)


# ---- a row ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One model on so many GPUs."""

    shape: Shape
    gpus: int
    plan: Plan
    bytes_used: float
    sampling: Phase
    scoring: Phase
    training: Phase
    sync: float

    @property
    def learning(self) -> float:
        """Seconds of everything that is not sampling."""
        return self.scoring.seconds + self.training.seconds

    @property
    def seconds(self) -> float:
        """One after the other."""
        return self.sampling.seconds + self.learning + self.sync


def plan_for(shape: Shape, work: Round, machine: Machine, gpus: int) -> Plan:
    """The first plan whose training and sampling fit. Raises ValueError when none does."""
    for plan in PLANS:
        fits = training_bytes(shape, plan, work, machine, gpus) <= machine.usable * machine.memory
        try:
            replica(shape, plan, work, machine, gpus)
        except ValueError:
            fits = False
        if fits and (gpus > 1 or plan.sharded == "no"):
            return plan
    raise ValueError(f"no plan fits {shape.name} on {gpus} GPUs")


def row(shape: Shape, work: Round, machine: Machine, gpus: int, plan: Plan | None = None) -> Row:
    """Everything about one model on so many GPUs."""
    plan = plan or plan_for(shape, work, machine, gpus)
    split, batch, _ = replica(shape, plan, work, machine, gpus)
    mean = work.prompt + work.instruction + work.completion / 2
    cache = batch * mean * shape.cache_width * machine.number_bytes / split
    sampled = state_bytes(shape, plan, machine, gpus) + cache
    sampled += shape.weights * machine.number_bytes / split if plan.own_engine else 0.0
    return Row(
        shape,
        gpus,
        plan,
        max(training_bytes(shape, plan, work, machine, gpus), sampled),
        (sampling if plan.own_engine else sampling_in_place)(shape, plan, work, machine, gpus),
        scoring(shape, plan, work, machine, gpus),
        training(shape, plan, work, machine, gpus),
        syncing(shape, plan, machine, gpus),
    )


def bottleneck(found: Row) -> str:
    """The longest phase, and what it waits for."""
    phases = {
        "sampling": found.sampling,
        "log-probabilities": found.scoring,
        "training": found.training,
    }
    name = max(phases, key=lambda n: phases[n].seconds)
    return f"{name}: {phases[name].bound}"


def setting(found: Row) -> str:
    """What to choose for the row, beyond how it is trained."""
    waits = bottleneck(found)
    if "network" in waits and found.plan.sharded == "all":
        return "shards within a node where they fit; more groups a step"
    if "network" in waits:
        return "more groups a step (gradient_accumulation_steps)"
    if "longest" in waits:
        return "more prompts a round"
    if not found.plan.own_engine:
        return "a smaller model, or more GPUs"
    if found.gpus == 1 and found.plan.trained == "lora":
        return "sample in turn with training, the base shared"
    return "larger micro-batches; more GPUs help in proportion"


# ---- sampling ahead ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ahead:
    """Sampling of the next round on `samplers` GPUs while the others learn from this one."""

    samplers: int
    seconds: float
    gain: float


def sampling_ahead(shape: Shape, work: Round, machine: Machine, gpus: int) -> Ahead | None:
    """The best split of the GPUs; None where no split fits.

    `gain` is the time of a round one after the other over the time with the split.
    """
    together = row(shape, work, machine, gpus).seconds
    best: Ahead | None = None
    for samplers in _splits(gpus, machine.node_size):
        try:
            plan = plan_for(shape, work, machine, gpus - samplers)
            emptied = _emptied(machine, shape, plan, samplers)
            sampled = sampling(shape, plan, work, emptied, samplers)
        except ValueError:
            continue
        learned = row(shape, work, machine, gpus - samplers, plan).learning
        sent = plan.trained_weights(shape) * machine.number_bytes
        seconds = max(sampled.seconds, learned) + sent / machine.link_speed(gpus)
        if best is None or seconds < best.seconds:
            best = Ahead(samplers, seconds, together / seconds)
    return best


def _emptied(machine: Machine, shape: Shape, plan: Plan, gpus: int) -> Machine:
    """GPUs that keep nothing of the training: with as much more memory as its state would take."""
    state = state_bytes(shape, plan, machine, gpus)
    return replace(machine, memory=machine.memory + state / machine.usable)


def _splits(gpus: int, node: int) -> Sequence[int]:
    if gpus <= node:
        return range(1, gpus)
    return range(node, gpus, node)


# ---- tables --------------------------------------------------------------------------------------

SIZES = tuple(itertools.product((LLAMA_1B, LLAMA_8B, LLAMA_70B), (1, 8, 64, 512)))


def show(seconds: float) -> str:
    """Two digits that mean something."""
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def round_table(work: Round, machine: Machine) -> list[str]:
    """Time and memory of a round."""
    lines = [
        "| model | GPUs | trained | GB a GPU | sampling s | log-probs s | training s | sync s "
        "| round s | sampling share | waits for | choose |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, gpus in SIZES:
        r = row(shape, work, machine, gpus)
        times = [r.sampling.seconds, r.scoring.seconds, r.training.seconds, r.sync, r.seconds]
        lines.append(
            f"| {shape.name} | {gpus} | {r.plan.name} | {r.bytes_used / GB:.0f} | "
            f"{' | '.join(map(show, times))} | {r.sampling.seconds / r.seconds:.0%} | "
            f"{bottleneck(r)} | {setting(r)} |"
        )
    return lines


def ahead_table(work: Round, machine: Machine) -> list[str]:
    """What sampling a round ahead would gain."""
    lines = [
        "| model | GPUs | one after the other s | sampling ahead s | GPUs that sample | gain |",
        "|---|---|---|---|---|---|",
    ]
    for shape, gpus in SIZES:
        together, ahead = row(shape, work, machine, gpus), None
        if gpus > 1:
            ahead = sampling_ahead(shape, work, machine, gpus)
        told = ["–", "–", "–"]
        if ahead is not None:
            told = [show(ahead.seconds), str(ahead.samplers), f"{ahead.gain:.2f}x"]
        lines.append(f"| {shape.name} | {gpus} | {show(together.seconds)} | {' | '.join(told)} |")
    return lines


def engine_table(work: Round, machine: Machine) -> list[str]:
    """Who samples: an engine of its own, or the policy that trains."""
    lines = [
        "| model | GPUs | trained | vLLM s | transformers s | times | waits for |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, gpus in SIZES:
        if gpus > machine.node_size:
            continue
        plan = plan_for(shape, work, machine, gpus)
        engine = sampling(shape, plan, work, machine, gpus).seconds
        here = sampling_in_place(shape, plan, work, machine, gpus)
        told, times = show(engine), f"{here.seconds / engine:.1f}x"
        if not plan.own_engine:  # the engine's weights do not fit beside the policy
            told = times = "–"
        lines.append(
            f"| {shape.name} | {gpus} | {plan.name} | {told} | {show(here.seconds)} | {times} | "
            f"{here.bound} |"
        )
    return lines


def network_table(work: Round, machine: Machine) -> list[str]:
    """Rows that wait for the network: fewer steps in a round, or weights shared in a node only."""
    lines = [
        "| model | GPUs | round s | with 4 times the groups a step | with shards within a node |",
        "|---|---|---|---|---|",
    ]
    larger = replace(work, groups_per_step=4 * work.groups_per_step)
    for shape, gpus in SIZES:
        r = row(shape, work, machine, gpus)
        if "network" not in bottleneck(r):
            continue
        told = [show(row(shape, larger, machine, gpus, r.plan).seconds)]
        within = replace(r.plan, sharded="node")
        fits = training_bytes(shape, within, work, machine, gpus)
        fits += shape.weights * machine.number_bytes / machine.node_size
        if r.plan.sharded != "all" or fits > machine.usable * machine.memory:
            told.append("–" if r.plan.sharded != "all" else "does not fit")
        else:
            told.append(show(row(shape, work, machine, gpus, within).seconds))
        lines.append(f"| {shape.name} | {gpus} | {show(r.seconds)} | {' | '.join(told)} |")
    return lines


def size_table(work: Round, machine: Machine) -> list[str]:
    """The 8B model on 512 GPUs as rounds grow: what is fixed is spread over more."""
    lines = [
        "| prompts a round | sampling s | learning s | round s | completions/s | sampling ahead |",
        "|---|---|---|---|---|---|",
    ]
    for prompts in (1024, 4096, 16_384, 65_536):
        sized = replace(work, prompts=prompts)
        r, ahead = row(LLAMA_8B, sized, machine, 512), sampling_ahead(LLAMA_8B, sized, machine, 512)
        gain = "–" if ahead is None else f"{ahead.gain:.2f}x"
        lines.append(
            f"| {prompts:,} | {show(r.sampling.seconds)} | {show(r.learning)} | {show(r.seconds)} "
            f"| {prompts * work.completions / r.seconds:,.0f} | {gain} |"
        )
    return lines


def check_table(found: Mapping[str, Any]) -> list[str]:
    """Predicted against measured, of a result of benchmarks/scale_check.py."""
    lines = ["| phase | predicted s | measured s | predicted / measured |", "|---|---|---|---|"]
    for phase, seconds in found["measured_seconds"].items():
        predicted = found["predicted_seconds"][phase]
        lines.append(f"| {phase} | {predicted:.2f} | {seconds:.2f} | {predicted / seconds:.2f} |")
    shares = [share(found[f"{side}_seconds"]) for side in ("predicted", "measured")]
    lines.append(
        f"| sampling share | {shares[0]:.0%} | {shares[1]:.0%} | {shares[0] / shares[1]:.2f} |"
    )
    return lines


def share(seconds: Mapping[str, float]) -> float:
    """What sampling takes of a round."""
    return seconds["sampling"] / sum(seconds.values())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", type=Path, help="a result of benchmarks/scale_check.py")
    args = parser.parse_args()
    if args.check is not None:
        print("\n".join(check_table(json.loads(args.check.read_text(encoding="utf-8")))))
        return
    tables: tuple[Callable[[Round, Machine], list[str]], ...] = (
        round_table,
        engine_table,
        network_table,
        ahead_table,
        size_table,
    )
    print("\n\n".join("\n".join(table(Round(), H100)) for table in tables))


if __name__ == "__main__":
    main()
