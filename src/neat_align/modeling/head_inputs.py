"""A model cut in front of its head, so that logits are made a chunk at a time.

The head's inputs are small: 1/85 of the logits for a 135M model. Packed rows hand over the states
in front of the head. Padded rows hand over the logits themselves, which a model that is called as a
whole has made already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from neat_align.modeling.chunked_head import LogitTail, chunk_rows, wide_dtype
from neat_align.modeling.lockstep import class_of
from neat_align.modeling.outputs import forward
from neat_align.modeling.packing import PackedRows, PaddedRows, Rows
from neat_align.modeling.precision import autocast, casting_once
from neat_align.modeling.reference import Reference
from neat_align.modeling.shared_prefix import is_sharing, sharing_prefixes, unwrapped
from neat_align.modeling.text_config import text_config

# Tokens that go through a model at once in padded rows, whose logits are held.
PADDED_TOKENS = 1024


def head_inputs(model: torch.nn.Module, rows: Rows) -> Float[Tensor, "places width"]:
    """What the logits of each completion token are made from.

    Packed rows: the states that predict a completion token, completion by completion. Padded rows:
    the logits at all places of the table of completions, padding among them.
    """
    if isinstance(rows, PackedRows):
        return completion_states(model, rows)
    return completion_logits(model, rows).flatten(0, 1)


def head_outputs(
    model: torch.nn.Module, inputs: Float[Tensor, "n width"], rows: Rows
) -> Float[Tensor, "n vocab"]:
    """The final logits of some of the head's inputs."""
    if not isinstance(rows, PackedRows):
        return inputs
    head = head_of(model)
    linear = linear_head(head)
    # Not by calling it where that is the same: FSDP would take the call for one of its passes.
    logits = (
        head(inputs) if linear is None else functional.linear(inputs, linear.weight, linear.bias)
    )
    return logit_tail(model)(logits)


def completion_logits(
    model: torch.nn.Module, rows: PaddedRows
) -> Float[Tensor, "rows tokens vocab"]:
    """Logits that predict each completion token, from a full forward pass over padded rows.

    The model is given token ids and nothing else, as if each row stood alone. The head computes
    what is read; a model whose head is not found computes all, and the rest is left out.
    """
    if not rows.one_at_a_time or len(rows.input_ids) == 1:
        return _logits_read(model, rows.input_ids, rows.read_at)
    lengths = rows.attention_mask.sum(-1).tolist()
    alone = [
        _logits_read(model, rows.input_ids[i : i + 1, :n], rows.read_at[i : i + 1].clamp(max=n - 1))
        for i, n in enumerate(lengths)
    ]
    return torch.cat(alone)


def _logits_read(
    model: torch.nn.Module,
    input_ids: Int[Tensor, "rows width"],
    read_at: Int[Tensor, "rows tokens"],
) -> Float[Tensor, "rows tokens vocab"]:
    """Logits at the positions `read_at` of each row."""
    count, width = input_ids.shape
    taken: list[bool] = []

    def at(values: Float[Tensor, "rows positions size"]) -> Float[Tensor, "rows tokens size"]:
        # An adapter may have put virtual tokens in front.
        index = read_at.to(values.device) + (values.shape[1] - width)
        return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))

    def take(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        states = inputs[0]
        # Other shapes: torch's DataParallel gives each device a part of the rows.
        if states.ndim != 3 or len(states) != count or states.shape[1] < width:
            return None
        taken.append(True)
        return (at(states), *inputs[1:])

    inner = unwrapped(model)
    head = inner.get_output_embeddings() if isinstance(inner, PreTrainedModel) else None
    with contextlib.ExitStack() as opened:
        if head is not None:
            opened.callback(head.register_forward_pre_hook(take).remove)
        logits: Tensor = forward(model, input_ids=input_ids, use_cache=False).logits
    return logits if taken else at(logits)


def completion_states(model: torch.nn.Module, rows: PackedRows) -> Float[Tensor, "predicted dim"]:
    """The head's input at the positions that predict a completion token, completion by completion.

    The model is called as a whole, so that its wrappers (PEFT, DDP) see the call. A hook takes the
    states in front of the head and lets the head itself compute one position only.
    """
    runs_again = torch.is_grad_enabled() and unwrapped(model).is_activation_checkpointing
    if runs_again and not is_sharing(model):
        raise RuntimeError(
            "packed rows with gradient checkpointing need `sharing_prefixes(model)` to be open "
            "around forward and backward: the backward pass computes the attention again"
        )
    taken: list[Tensor] = []

    def take(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append(inputs[0])
        # Cut so that its strides are a whole tensor's: of a plain slice torch makes a batch, and
        # copies the head's weight for it.
        return (inputs[0][0, :1][None], *inputs[1:])

    head = head_of(model)
    hook = head.register_forward_pre_hook(take)
    try:
        with sharing_prefixes(model):
            forward(
                model,
                input_ids=rows.input_ids,
                position_ids=rows.position_ids,
                shared_prefix=rows.layout,
                logits_to_keep=rows.read_at,
                use_cache=False,
            )
    finally:
        hook.remove()
    return taken[0][0]


def logit_tail(model: torch.nn.Module) -> LogitTail:
    """What the family does to the head's output, where its configuration says so.

    `choose_layout` finds out where it does not.
    """
    config = text_config(unwrapped(model).config)
    divisor = getattr(config, "logits_scaling", None) or 1  # Granite's
    scale = getattr(config, "logit_scale", None) or 1 / divisor  # Cohere's
    return LogitTail(scale, getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True)
class CastHead:
    """A linear head that does not learn, its weights cast once, with its family's tail.

    Computes what the head computes in autocast; it may be used when the model is not open.
    """

    weight: Float[Tensor, "vocab dim"]
    bias: Float[Tensor, " vocab"] | None
    tail: LogitTail

    def __call__(self, states: Float[Tensor, "n dim"]) -> Float[Tensor, "n vocab"]:
        """The final logits, in fp32 or wider."""
        return self._product(states, self.bias)

    def difference(
        self, states: Float[Tensor, "n dim"], others: Float[Tensor, "n dim"]
    ) -> Float[Tensor, "n vocab"] | None:
        """The logits of `states` minus those of `others`, by one product; None where a cap makes
        the head no linear function.
        """
        if self.tail.cap is not None:
            return None
        return self._product(states - others, None)

    def _product(
        self, states: Float[Tensor, "n dim"], bias: Tensor | None
    ) -> Float[Tensor, "n vocab"]:
        with torch.autocast(states.device.type, enabled=False):
            logits = torch.nn.functional.linear(states.to(self.weight.dtype), self.weight, bias)
            return self.tail(logits.to(wide_dtype(logits.dtype)))


def cast_head(
    model: torch.nn.Module, rows: Rows, autocast_dtype: torch.dtype | None
) -> CastHead | None:
    """The model's head for packed rows, cast; None where it learns, is no linear layer (an adapter
    on it, a quantised one), or the rows hold logits already.
    """
    head = linear_head(head_of(model))
    if not isinstance(rows, PackedRows) or head is None:
        return None
    if any(weight.requires_grad for weight in head.parameters()):
        return None
    dtype = autocast_dtype or head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    return CastHead(head.weight.to(dtype), bias, logit_tail(model))


def head_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model's output embeddings."""
    return cast("torch.nn.Module", unwrapped(model).get_output_embeddings())


def linear_head(head: torch.nn.Module) -> torch.nn.Linear | None:
    """The head where it is a linear layer and nothing else: no adapter's, no quantised one.

    Under FSDP2 its weights are whole from a forward pass of the model to the backward pass.
    """
    plain = class_of(head) is torch.nn.Linear
    return head if plain and isinstance(head, torch.nn.Linear) else None


def places_of(rows: Rows) -> Int[Tensor, " tokens"]:
    """Where in the head's inputs each completion token is, completion by completion.

    A mask on a GPU would have to be waited for: call it while the rows are in the CPU's memory.
    """
    if isinstance(rows, PackedRows):
        return torch.arange(len(rows.token_at))
    return rows.completion_mask.flatten().nonzero().squeeze(-1)


def rows_at_once(model: torch.nn.Module) -> int:
    """Tokens whose logits are held at a time."""
    device = next(model.parameters()).device
    return chunk_rows(text_config(unwrapped(model).config).vocab_size, device)


@contextlib.contextmanager
def heads_cast_once(
    model: torch.nn.Module, reference: Reference, autocast_dtype: torch.dtype | None
) -> Iterator[None]:
    """While open, autocast keeps the casts of both policies' heads from chunk to chunk.

    Only where no gradients are recorded. An autocast that is closed forgets its casts; the outer
    one stays open.
    """
    device = next(model.parameters()).device.type
    with contextlib.ExitStack() as opened:
        opened.enter_context(autocast(device, autocast_dtype))
        if autocast_dtype is not None:
            with reference() as start_policy:
                policies = (model, start_policy)
            for head in {id(h): h for h in map(head_of, policies)}.values():
                opened.enter_context(casting_once(head))
        yield
