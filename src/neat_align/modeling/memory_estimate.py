"""How much memory a run takes: arithmetic on the model's shape and the run's options.

What is alive at once, in bytes on one device, by phase of a round:

    training    weights + optimizer + start policy + what the forward pass keeps + gradients
    sampling    weights + optimizer + start policy + a copy that samples + cache + logits

The forward pass keeps, for a token and a layer of a Llama-like model (c bytes of the compute type;
H hidden size, Q and K widths of all query heads and of all key heads, I of the MLP):

    norms       4 B x 4 H: each norm's input and what its weight is multiplied with; under an
                adapter, whose norms do not learn, 4 B x 2 H
    inputs      c x (5 H + Q): autocast casts the input of each linear layer anew; c x (2 H + Q)
                without autocast
    MLP         c x 4 I
    attention   c x (Q + 2 K); more in packed rows on a GPU and in small ones, which gather the
                prompt's keys and values for every completion and keep their mask

and once, the weights of the linear layers in the compute type where autocast casts them, and on a
CPU the gradients at the head's product where they are kept. With
checkpointing a layer keeps its input alone, and one layer at a time is computed again. A test holds
the sum within 15 % of what is measured; models of another make (mixtures of experts, state spaces)
may be further off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from neat_align.modeling.chunked_head import CPU_CHUNK_LOGITS, GPU_CHUNK_LOGITS, KEPT_BYTES
from neat_align.modeling.logprobs import HEAD_CHUNK, SCORING_TOKENS
from neat_align.modeling.model_shape import ModelShape
from neat_align.modeling.shared_prefix import SMALL_ROW

GIB = 2**30
# A weight in NF4: half a byte, and a fp32 scale for every 64.
NF4_BYTES = 0.5 + 4 / 64
# AdamW's two moments in fp32.
ADAMW_BYTES = 8.0
# Which parts of a training state the ranks divide: nothing (DDP), ZeRO-1, ZeRO-2, ZeRO-3 or FSDP2.
Divided: TypeAlias = Literal["none", "optimizer", "gradients", "weights"]


@dataclass(frozen=True)
class RunShape:
    """What a run's memory depends on besides the model.

    Attributes:
        trained: trained parameters of an adapter; None where all weights are trained.
        linear_bytes, other_bytes: of a weight of the linear layers, and of any other.
        compute_bytes: of a number in autocast's type; 4 without autocast.
        optimizer_bytes: of the optimizer's state for a trained parameter.
        keeps_copy: whether the start policy is a copy of the model.
        checkpointing: whether activations are computed again in the backward pass.
        prompt_tokens, completion_tokens: of the longest prompt and completion.
        completions: of a group that is trained on.
        groups: of a forward pass before it is cut into micro-batches.
        micro_batch_tokens: at which it is cut (a group that is larger goes alone).
        packed: whether a group's completions share their prompt.
        accumulates: whether gradients are there already when a micro-batch begins.
        sampled_at_once: completions.
        sampling_copy: whether a copy in the compute type samples.
        on_cpu: whether the device is one.
        world_size, sharding: how many ranks divide what.
    """

    trained: int | None = None
    linear_bytes: float = 4.0
    other_bytes: float = 4.0
    compute_bytes: int = 2
    optimizer_bytes: float = ADAMW_BYTES
    keeps_copy: bool = True
    checkpointing: bool = False
    prompt_tokens: int = 512
    completion_tokens: int = 256
    completions: int = 4
    groups: int = 4
    micro_batch_tokens: int = 4096
    packed: bool = True
    accumulates: bool = True
    sampled_at_once: int = 64
    sampling_copy: bool = False
    on_cpu: bool = False
    world_size: int = 1
    sharding: Divided = "none"

    @property
    def casts(self) -> bool:
        """Whether autocast computes in another type than the linear layers' weights have."""
        return self.compute_bytes < min(self.linear_bytes, 4)

    @property
    def chunk_logits(self) -> int:
        """Logits that are made at a time."""
        return CPU_CHUNK_LOGITS if self.on_cpu else GPU_CHUNK_LOGITS

    @property
    def attends_by_products(self) -> bool:
        """Whether packed rows keep queries, keys and values of their attention, and no more."""
        return self.on_cpu and self.groups_at_once * self.group_tokens >= SMALL_ROW

    @property
    def groups_at_once(self) -> int:
        """Groups of a micro-batch."""
        return max(1, min(self.groups, self.micro_batch_tokens // self.group_tokens))

    @property
    def group_tokens(self) -> int:
        """Tokens of a group, as the model is given them."""
        prompts = 1 if self.packed else self.completions
        return prompts * self.prompt_tokens + self.completions * self.completion_tokens


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device. `weights` to `reference` are there all the time.

    `activations` and `logits` are there in a training step beside the gradients, `sampling` (a copy
    that samples, cache and logits) while a round is made. Gradients grow while activations go:
    `training` is the most that both take together.
    """

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    logits: float
    sampling: float
    in_step: float

    @property
    def fixed(self) -> float:
        """What is there in every phase once an optimizer step was made."""
        return self.weights + self.optimizer + self.reference

    @property
    def training(self) -> float:
        """The most in a training step."""
        return self.fixed + self.in_step

    @property
    def total(self) -> float:
        """The most in any phase."""
        return self.fixed + max(self.in_step, self.sampling)


def estimate_memory(shape: ModelShape, run: RunShape) -> MemoryEstimate:
    """The memory of a run on each of its devices, in bytes."""
    trained = shape.parameters if run.trained is None else run.trained
    whole = run.world_size if run.sharding == "weights" else 1
    gradients = 4.0 * trained / (run.world_size if run.sharding in ("gradients", "weights") else 1)
    if run.world_size > 1 and run.sharding == "none":
        gradients *= 2  # DDP's buckets
    divided = 1 if run.sharding == "none" else run.world_size
    kept, again, logits = _kept(shape, run), _again(shape, run), _head(shape, run)
    return MemoryEstimate(
        weights=_weights(shape, run) / whole + _gathered(shape, run),
        gradients=gradients,
        optimizer=run.optimizer_bytes * trained / divided,
        reference=_reference(shape, run) / whole,
        activations=kept + (again if run.checkpointing else 0),
        logits=logits,
        sampling=_sampling(shape, run),
        in_step=_in_step(shape, run, gradients, kept, again, logits),
    )


# ---- what is there all the time ------------------------------------------------------------------


def _weights(shape: ModelShape, run: RunShape) -> float:
    others = shape.parameters - shape.linear
    held = run.linear_bytes * shape.linear + run.other_bytes * others
    return held + (0 if run.trained is None else 4.0 * run.trained)


def _gathered(shape: ModelShape, run: RunShape) -> float:
    """Sharded weights are whole for a layer at a time, and the next one's are fetched meanwhile."""
    if run.sharding != "weights" or run.world_size == 1:
        return 0.0
    layer = run.compute_bytes * shape.linear / shape.layers
    return max(2 * layer, layer + run.compute_bytes * shape.head)


def _reference(shape: ModelShape, run: RunShape) -> float:
    """A copy holds the linear layers in the compute type, and the head where it is one of them."""
    if not run.keeps_copy:
        return 0.0
    tied = shape.parameters - shape.linear < 2 * shape.head
    narrow = shape.linear + (0 if tied else shape.head)
    return run.compute_bytes * narrow + 4.0 * (shape.parameters - narrow)


# ---- a training step -----------------------------------------------------------------------------


def _kept(shape: ModelShape, run: RunShape) -> float:
    """What the forward pass over a micro-batch keeps."""
    tokens = run.groups_at_once * run.group_tokens
    completion = run.groups_at_once * run.completions * run.completion_tokens
    ends = tokens * shape.hidden * (8 if run.trained is None else 4)
    ends += completion * shape.hidden * 4  # states in front of the head
    if not run.checkpointing:
        return ends + _casts(shape, run) + shape.layers * _layer(shape, run)
    return ends + shape.layers * tokens * shape.hidden * min(4.0, run.other_bytes)


def _again(shape: ModelShape, run: RunShape) -> float:
    """What one layer takes while its gradient is computed, by itself or once more."""
    casts = _casts(shape, run)
    again = _layer(shape, run) + casts / shape.layers
    # autocast keeps the casts of weights that learn to the end of the forward pass.
    return max(again, casts) if run.checkpointing and run.trained is None else again


def _casts(shape: ModelShape, run: RunShape) -> float:
    """The weights of the linear layers in the compute type, where autocast casts them."""
    return run.compute_bytes * shape.linear if run.casts else 0.0


def _layer(shape: ModelShape, run: RunShape) -> float:
    """What one layer keeps of a micro-batch."""
    c, hidden, tokens = run.compute_bytes, shape.hidden, run.groups_at_once * run.group_tokens
    norms = 4 * hidden * (4 if run.trained is None else 2)
    inputs = c * ((5 if c < 4 else 2) * hidden + shape.query_width)
    mlp = c * 4 * shape.intermediate
    return tokens * (norms + inputs + mlp) + _attention(shape, run)


def _attention(shape: ModelShape, run: RunShape) -> float:
    c, groups = run.compute_bytes, run.groups_at_once
    rows, prompt, own = groups * run.completions, run.prompt_tokens, run.completion_tokens
    if run.packed and run.attends_by_products:
        tokens = groups * run.group_tokens
        return float(tokens * c * (shape.query_width + 2 * shape.key_width))
    if not run.packed:
        tokens = rows * (prompt + own)
        out = 0 if run.trained is None else c * shape.query_width
        return tokens * (c * (shape.query_width + 2 * shape.key_width) + 4 * shape.heads + out)
    sharing = shape.query_width // shape.key_width
    of_prompts = groups * prompt * c * 4 * shape.query_width
    queries = rows * own * c * 2 * shape.query_width
    keys = rows * (prompt + own) * c * 2 * shape.key_width
    mask = rows * sharing * own * (prompt + own) * c
    return float(of_prompts + queries + keys + mask)


def _head(shape: ModelShape, run: RunShape) -> float:
    """Logits, their gradient, and the head's weight in the compute type.

    Packed rows hold a chunk of logits at a time, and on a CPU gradients at the product of a head
    that learns. Padded rows hold the model's own, and a chunk of their log-softmax.
    """
    c, states = run.compute_bytes, run.groups_at_once * run.completions * run.completion_tokens
    if run.packed:
        # A CPU goes through the head's product in small blocks; elsewhere fp32 logits and another
        # table of them stand beside it.
        each = c if run.on_cpu else 8 + (c if c < 4 else 0)
        logits = min(states, max(1, run.chunk_logits // shape.vocabulary)) * each
    else:
        logits = states * 2 * c + min(states, HEAD_CHUNK) * 16
    casts = c < min(run.other_bytes, 4)
    of_weight = c * shape.head * (2 if run.trained is None else 1) if casts else 0
    learns_on_cpu = run.packed and run.on_cpu and run.trained is None
    kept = min(states * shape.vocabulary * c, KEPT_BYTES) if learns_on_cpu else 0
    return float(logits * shape.vocabulary + of_weight + kept)


def _in_step(
    shape: ModelShape, run: RunShape, gradients: float, kept: float, again: float, logits: float
) -> float:
    """The most that activations and gradients take together.

    The backward pass begins with the head, whose gradient is the first, and ends with the
    embeddings', which is a table of its own before it is added up. With checkpointing the logits
    are gone when the first layer is computed again.
    """
    of_head = 4.0 * shape.head if run.trained is None else 0.0
    at_start = kept + of_head + (max(logits, again) if run.checkpointing else logits)
    if run.accumulates:
        return at_start + gradients
    return max(at_start, gradients + of_head + again)


# ---- making a round ------------------------------------------------------------------------------


def _sampling(shape: ModelShape, run: RunShape) -> float:
    """The most of: making the copy that samples, drawing from it, and scoring what was drawn."""
    c, rows = run.compute_bytes, run.sampled_at_once
    kept = run.prompt_tokens + run.completion_tokens
    copied = c * shape.parameters if run.sampling_copy else 0.0
    copying = _weights(shape, run) if run.sampling_copy else 0.0  # it is cast once it is there
    cache = rows * kept * 2 * shape.key_width * shape.layers * c
    growing = cache / shape.layers  # a layer's cache is made anew with one token more
    logits = rows * shape.vocabulary * 4 * 3
    # An adapter computes the layer's output twice, and adds them.
    wide = 3 if run.trained is None else 5
    width = wide * shape.intermediate * c + 3 * shape.hidden * 4
    drawing = copied + cache + max(growing + logits, rows * run.prompt_tokens * width)
    return float(max(copying, drawing, copied + _scoring(shape, run, width)))


def _scoring(shape: ModelShape, run: RunShape, width: int) -> float:
    """A pass without gradients: the wider of attention and MLP of one layer, or the head.

    `width` is that of the MLP, in bytes a token.
    """
    c = run.compute_bytes
    groups = -(-run.sampled_at_once // run.completions)
    tokens = min(SCORING_TOKENS, groups * run.group_tokens)
    rows = tokens / run.group_tokens * run.completions
    seen = run.prompt_tokens + run.completion_tokens
    turned = 8 * shape.query_width / shape.heads  # the rotary embedding's two tables
    queries, keys = (
        shape.query_width * (12 + (2 * c if c < 4 else 4)),
        shape.key_width * (8 + 2 * c),
    )
    attention = tokens * (12 * shape.hidden + queries + keys + turned)
    if run.packed:
        sharing = shape.query_width // shape.key_width
        mask = sharing * run.completion_tokens * (c + 1)
        attention += rows * seen * (mask + shape.key_width * (4 + 2 * c))
    chunk = min(tokens, max(1, run.chunk_logits // shape.vocabulary)) * shape.vocabulary
    head = chunk * (c if run.on_cpu else 4 + c) + c * shape.head + tokens * shape.hidden * 4
    # autocast keeps the casts of weights that learn.
    casts = _casts(shape, run) if run.trained is None else 0.0
    return casts + max(tokens * width, attention, head)
