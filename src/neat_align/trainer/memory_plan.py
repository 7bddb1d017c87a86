"""What a run will take of this machine's memory: checkpointing is decided by it, and it is said."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel

from neat_align.config import NEATConfig
from neat_align.config.sharding import Sharding, asked_sharding
from neat_align.modeling.device import free_bytes
from neat_align.modeling.load_options import is_in_4_bits
from neat_align.modeling.memory_estimate import (
    ADAMW_BYTES,
    GIB,
    NF4_BYTES,
    Divided,
    MemoryEstimate,
    RunShape,
    estimate_memory,
)
from neat_align.modeling.model_shape import (
    ModelShape,
    bytes_of_weights,
    shape_of,
    shape_of_model,
)
from neat_align.modeling.reference import is_part_of, not_kept
from neat_align.modeling.requirements import is_trained
from neat_align.modeling.shared_prefix import unwrapped, why_not_packed
from neat_align.prompts.rows import PromptRow
from neat_align.trainer.setup import PolicySetup, TrainingData, autocast_dtype

logger = logging.getLogger(__name__)

# What processes divide of a training state, by the way in which they do.
_DIVIDED: Mapping[Sharding, Divided] = {
    "none": "none",
    "fsdp2": "weights",
    "zero0": "none",
    "zero1": "optimizer",
    "zero2": "gradients",
    "zero3": "weights",
}
# Bytes of an optimizer's state for a parameter, by parts of its name; AdamW's otherwise.
_OPTIMIZERS = (
    ("lion_8bit", 1.0),
    ("lion", 4.0),
    ("8bit", 2.0),
    ("4bit", 1.0),
    ("adafactor", 0.0),
    ("sgd", 0.0),
    ("rmsprop", 4.0),
    ("adagrad", 4.0),
)


@dataclass(frozen=True)
class Loading:
    """What loading takes of this machine's own memory before weights go to devices or are divided.

    `processes` of this machine hold the whole model then, and a start policy beside it, at most
    `size` bytes together: what has the type that its file has is mapped from it, and shared. `room`
    is free, None where nobody can say. `may_be_one`: FSDP2 would let one process load it.
    """

    processes: int
    size: float
    room: int | None
    may_be_one: bool

    def rows(self) -> list[tuple[str, float, str]]:
        """Lines of the estimate's table: name, bytes, note."""
        who = f"{self.processes} processes hold" if self.processes > 1 else "one process holds"
        found = [("loading", self.size, f"at most, of the machine's: {who} the whole model")]
        if self.room is not None:
            note = "" if self.size <= self.room else "less than that"
            if note and self.may_be_one:
                note += "; cpu_ram_efficient_loading: true has one process load it"
            found.append(("free there", float(self.room), note))
        return found


@dataclass(frozen=True)
class MemoryPlan:
    """An estimate, and the room for it: what is free on the device, and what the run holds there
    already; None where nobody can say. `loading` where that is not on the device.
    """

    shape: ModelShape
    run: RunShape
    device: torch.device
    room: int | None
    loading: Loading | None = None

    @property
    def estimate(self) -> MemoryEstimate:
        """What the run will take."""
        return estimate_memory(self.shape, self.run)

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.room is None or self.estimate.total <= self.room

    def with_checkpointing(self) -> MemoryPlan:
        """The same with activations that are computed again."""
        return replace(self, run=replace(self.run, checkpointing=True))

    @property
    def wants_checkpointing(self) -> bool:
        """Whether the run would need less, and has not enough room. Weights that the ranks divide
        have a checkpointing of their own (FSDP's), which is asked for by name.
        """
        if self.fits or self.run.checkpointing or self.run.sharding == "weights":
            return False
        return self.with_checkpointing().estimate.total < 0.95 * self.estimate.total

    def lines(self) -> list[str]:
        """The estimate as a table."""
        e, run = self.estimate, self.run
        tokens = run.groups_at_once * run.group_tokens
        again = ", computed again in the backward pass" if run.checkpointing else ""
        one_of = f", each of {run.world_size} processes" if run.world_size > 1 else ""
        rows = [
            ("weights", e.weights, ""),
            ("optimizer", e.optimizer, ""),
            ("start policy", e.reference, "" if e.reference else "no copy is needed"),
            ("gradients", e.gradients, "in training"),
            ("activations", e.activations, f"in training, of {tokens:,} tokens{again}"),
            ("logits", e.logits, "in training"),
            ("sampling", e.sampling, "while a round is made: copy, cache, logits, scoring"),
            ("at most", e.total, f"in {'training' if e.training >= e.total else 'sampling'}"),
        ]
        if self.room is not None:
            rows.append(("free", float(self.room), "" if self.fits else "less than that"))
        rows += self.loading.rows() if self.loading is not None else []
        lines = [f"memory, estimated ({self.device}{one_of}):"]
        return lines + [
            f"  {name:<13}{size / GIB:>9.3f} GiB{f'  {note}' if note else ''}"
            for name, size, note in rows
        ]

    def advice(self) -> str:
        """What would make the run smaller."""
        run = self.run
        ways = [] if run.checkpointing else ["set activation_checkpointing: true"]
        ways.append("lower max_tokens_per_micro_batch")
        if run.trained is None:
            ways.append("train an adapter (use_peft: true)")
        elif run.linear_bytes > 2:
            ways.append("hold the frozen weights in bf16 (dtype: bfloat16)")
        elif run.linear_bytes > 1 and self.device.type == "cuda":
            ways.append("hold the frozen weights in 4 bits (load_in_4bit: true)")
        if self.estimate.sampling > self.estimate.in_step:
            ways.insert(0, "lower generation_batch_size")
        return ", or ".join(ways)


def plan_memory(
    args: NEATConfig,
    model: Any,
    rows: Sequence[PromptRow],
    prompt_lengths: Sequence[int],
    *,
    evaluates: bool,
    keeps_copy: bool | None = None,
    in_4_bits: bool | None = None,
) -> MemoryPlan:
    """The plan of a run of this model, which may be on the meta device.

    Nothing of it is taken to be on the device yet. `keeps_copy` says whether the start policy is a
    model of its own; None: as for a model whose adapter, if it has one, is new. `in_4_bits` None:
    as the model is.
    """
    quantised = is_in_4_bits(model) if in_4_bits is None else in_4_bits
    shape = shape_of(unwrapped(model).config) if quantised else shape_of_model(model)
    linear, others = bytes_of_weights(model)
    is_adapter = isinstance(model, PeftModel)
    on_cpu = args.device.type == "cpu"
    dtype = autocast_dtype(args)
    computes_in_half = dtype is not None or linear == 2
    sampled = args.groups_per_round(len(rows)) * args.num_generations
    run = RunShape(
        trained=_trained(model) if is_adapter else None,
        linear_bytes=NF4_BYTES if quantised else linear,
        other_bytes=others,
        compute_bytes=2 if computes_in_half else 4,
        optimizer_bytes=_optimizer_bytes(args) if is_trained(model) else 0.0,
        keeps_copy=_will_copy(args, model, evaluates) if keeps_copy is None else keeps_copy,
        checkpointing=bool(args.activation_checkpointing),
        prompt_tokens=max(prompt_lengths, default=args.max_prompt_length),
        completion_tokens=args.max_completion_length,
        completions=_completions(args, rows),
        groups=args.per_device_train_batch_size,
        micro_batch_tokens=args.max_tokens_per_micro_batch,
        packed=args.prefix_sharing != "off" and why_not_packed(model) is None,
        sampled_at_once=max(1, min(args.generation_batch_size, sampled)),
        sampling_copy=dtype is not None and args.samples_from_copy,
        on_cpu=on_cpu,
        world_size=args.world_size,
        sharding=_DIVIDED[asked_sharding(args)],
    )
    more = args.gradient_accumulation_steps > 1
    more |= run.groups * run.group_tokens > run.micro_batch_tokens and run.groups > 1
    free = free_bytes(args.device)
    room = None if free is None else free // (_local_processes() if on_cpu else 1)
    run = replace(run, accumulates=more)
    return MemoryPlan(shape, run, args.device, room, _loading(args, shape, run))


def _loading(args: NEATConfig, shape: ModelShape, run: RunShape) -> Loading | None:
    """None on a CPU, where what is loaded stays."""
    if args.device.type == "cpu" and run.sharding != "weights":
        return None
    processes = 1 if args.loads_once else _local_processes()
    # Before autocast's casts and other devices: as many bytes as the weights have.
    others = shape.parameters - shape.linear
    size = run.linear_bytes * shape.linear + run.other_bytes * others
    return Loading(
        processes,
        processes * size * (2 if run.keeps_copy else 1),
        free_bytes(torch.device("cpu")),
        may_be_one=asked_sharding(args) == "fsdp2" and processes > 1,
    )


def settle_memory(args: NEATConfig, setup: PolicySetup, data: TrainingData) -> TrainingData:
    """Decide about checkpointing where nobody has, and warn where memory will not be enough.

    Before Trainer takes the model to its device. Every rank calls it; rank 0 decides. Gives `data`.
    """
    model, wants = setup.model, False
    plan = memory_now(args, setup, data)
    if args.activation_checkpointing is None:
        if plan is not None and unwrapped(model).supports_gradient_checkpointing:
            wants = plan.wants_checkpointing
        (wants,) = broadcast_object_list([wants])
        args.activation_checkpointing = args.gradient_checkpointing = wants
    if plan is None:
        return data
    if wants:
        less = plan.with_checkpointing()
        _say(
            args,
            f"activation checkpointing is on: the run would take about {_gib(plan)} without it, "
            f"{_gib(less)} with it, and {_room(plan)} is free (activation_checkpointing: false "
            "leaves it off)",
        )
        plan = less
    if not plan.fits:
        _say(
            args,
            f"this run is estimated to take {_gib(plan)} on {plan.device}, and {_room(plan)} is "
            f"free: {plan.advice()} (neat-align train --dry-run shows the estimate)",
        )
    return data


def memory_now(args: NEATConfig, setup: PolicySetup, data: TrainingData) -> MemoryPlan | None:
    """The plan of a run whose model is loaded; None for a model whose shape nobody knows."""
    model = setup.model
    if not (is_trained(model) and isinstance(unwrapped(model), PreTrainedModel)):
        return None
    plan = plan_memory(
        args,
        model,
        data.rows,
        data.prompt_lengths,
        evaluates=bool(data.eval_rows),
        keeps_copy=_has_copy(setup),
    )
    return replace(plan, room=_room_with(plan, model))


def _say(args: NEATConfig, text: str) -> None:
    if args.process_index == 0:
        logger.warning("%s", text)


def _gib(plan: MemoryPlan) -> str:
    return f"{plan.estimate.total / GIB:.1f} GiB"


def _room(plan: MemoryPlan) -> str:
    return f"{(plan.room or 0) / GIB:.1f} GiB"


def _room_with(plan: MemoryPlan, model: torch.nn.Module) -> int | None:
    """The room once the model, and the start policy beside it, are on the device already."""
    if plan.room is None:
        return None
    kind = plan.device.type
    here = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type == kind)
    return plan.room + here + (int(plan.estimate.reference) if here else 0)


def _will_copy(args: NEATConfig, model: Any, evaluates: bool) -> bool:
    is_start = isinstance(model, PeftModel) or not is_trained(model)  # with the adapter off
    return args.needs_start_policy(evaluates=evaluates) and not is_start


def _has_copy(setup: PolicySetup) -> bool:
    """Whether the start policy is no part of the model: one that was given, or a copy."""
    if setup.reference is not_kept:
        return False
    with setup.reference() as start:
        return not is_part_of(start, setup.model)


def _trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _completions(args: NEATConfig, rows: Sequence[PromptRow]) -> int:
    """Completions of a group that go through the model in training."""
    own = any(r.chosen is not None for r in rows) + any(r.rejected is not None for r in rows)
    every = args.num_generations + (own if args.use_human_completions else 0)
    return max(1, min(every, 2) if args.pair_selection == "best_worst" else every)


def _optimizer_bytes(args: Any) -> float:
    name = str(getattr(args.optim, "value", args.optim))
    return next((size for part, size in _OPTIMIZERS if part in name), ADAMW_BYTES)


def _local_processes() -> int:
    """Processes of this run on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
