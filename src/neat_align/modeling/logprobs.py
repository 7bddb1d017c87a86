"""Model and rows in, per-token log-probabilities of the completions out, in nats."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from neat_align.modeling.chunked_head import LogitTail, chosen_logprobs, chunk_rows, parts
from neat_align.modeling.outputs import forward
from neat_align.modeling.packing import (
    Layout,
    PackedRows,
    PaddedRows,
    Rows,
    TokenIds,
    fill_in_order,
    pack_rows,
    pad_rows,
    tokens_in,
)
from neat_align.modeling.precision import frozen_casts, inference
from neat_align.modeling.shared_prefix import is_sharing, sharing_prefixes, unwrapped
from neat_align.modeling.text_config import text_config

# Padded rows' log-softmax that is held in fp32 at a time; the backward pass computes it again.
HEAD_CHUNK = 512
# Tokens that go through the model at once when it only scores.
SCORING_TOKENS = 4096
# Completions of one prompt that are scored in one packed group.
SCORING_GROUP = 32


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


def _gather_logprobs(
    logits: Float[Tensor, "n vocab"], ids: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    logits = logits.float()
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def completion_logprobs(model: torch.nn.Module, rows: Rows) -> Float[Tensor, "rows tokens"]:
    """log π(y_t | x, y_<t) in nats for every completion token; 0 at padding.

    fp32 whatever the model computes in.
    """
    if isinstance(rows, PackedRows):
        return packed_logprobs(model, rows)
    return padded_logprobs(model, rows)


def padded_logprobs(model: torch.nn.Module, rows: PaddedRows) -> Float[Tensor, "rows tokens"]:
    """From the model's own logits, which are held.

    The log-softmax runs in chunks that the backward pass computes again.
    """
    logits = completion_logits(model, rows).flatten(0, 1)
    ids = rows.completion_ids.flatten()
    chunks = [
        _in_chunk(_gather_logprobs, logits[part], ids[part]) for part in parts(len(ids), HEAD_CHUNK)
    ]
    return torch.where(rows.completion_mask, torch.cat(chunks).view_as(rows.completion_ids), 0.0)


def packed_logprobs(model: torch.nn.Module, rows: PackedRows) -> Float[Tensor, "rows tokens"]:
    """From the states at the positions that predict a completion token; few logits are held."""
    states = completion_states(model, rows)
    ids = rows.completion_ids.flatten().index_select(0, rows.token_at)
    head = cast("torch.nn.Module", unwrapped(model).get_output_embeddings())
    tail = logit_tail(model)
    chunk = chunk_rows(text_config(unwrapped(model).config).vocab_size, states.device)
    if type(head) is torch.nn.Linear:
        flat = chosen_logprobs(states, head.weight, head.bias, ids, tail, chunk)
    else:
        # An adapter on the head, or a quantised one: whatever it computes, in chunks.
        casts = frozen_casts(head, states.device)

        def logprobs(states: Float[Tensor, "n dim"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
            return _gather_logprobs(tail(functional_call(head, casts, (states,))), ids)

        chunks = [_in_chunk(logprobs, states[p], ids[p]) for p in parts(len(ids), chunk)]
        flat = torch.cat([states.new_zeros(0).float(), *chunks])
    table = flat.new_zeros(rows.completion_ids.numel()).index_copy(0, rows.token_at, flat)
    return table.view_as(rows.completion_ids)


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
        return (inputs[0][:, :1], *inputs[1:])

    head = cast("torch.nn.Module", unwrapped(model).get_output_embeddings())
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


def _in_chunk(function: Callable[[Tensor, Tensor], Tensor], states: Tensor, ids: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return cast("Tensor", checkpoint(function, states, ids, use_reentrant=False))
    return function(states, ids)


def score_completions(
    model: torch.nn.Module,
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
    *,
    layout: Layout,
    pad_token_id: int,
    autocast_dtype: torch.dtype | None,
    max_tokens: int = SCORING_TOKENS,
) -> list[tuple[float, ...]]:
    """Per-token log-probabilities of each completion after its prompt, in nats, in order.

    Without gradients. `max_tokens` go through the model at once. In the packed layout completions
    of equal prompts share one.
    """
    device = next(model.parameters()).device
    scored: dict[int, tuple[float, ...]] = {}
    for members, rows in scoring_batches(prompts, completions, layout, pad_token_id, max_tokens):
        with inference(model, autocast_dtype):
            logps = completion_logprobs(model, rows.to(device)).tolist()
        for i, row in zip(members, logps, strict=True):
            scored[i] = tuple(row[: len(completions[i])])
    return [scored[i] for i in range(len(prompts))]


def scoring_batches(
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
    layout: Layout,
    pad_token_id: int,
    max_tokens: int,
) -> Iterator[tuple[list[int], Rows]]:
    """Batches of rows for passes without a gradient, each with the indices of its completions.

    The indices are in the order of the batch's rows.
    """
    groups = _scoring_groups(prompts, completions, layout)
    sizes = [
        tokens_in(len(prompts[group[0]]), [len(completions[i]) for i in group], layout)
        for group in groups
    ]
    for batch in fill_in_order(sizes, max_tokens):
        members = [i for g in batch for i in groups[g]]
        if layout == "packed":
            batch_prompts = [prompts[groups[g][0]] for g in batch]
            answers = [[completions[i] for i in groups[g]] for g in batch]
            yield members, pack_rows(batch_prompts, answers)
        else:
            yield (
                members,
                pad_rows(
                    [prompts[i] for i in members],
                    [completions[i] for i in members],
                    pad_token_id,
                    one_at_a_time=layout == "unpadded",
                ),
            )


def _scoring_groups(
    prompts: Sequence[TokenIds], completions: Sequence[TokenIds], layout: Layout
) -> list[list[int]]:
    """Indices of the completions that go through the model together, the longest first.

    Packed: those of one prompt, at most `SCORING_GROUP`, so that a batch stays near its budget.
    Padded: each alone, so that any number of them makes a batch.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(tuple(prompt) if layout == "packed" else (i,), []).append(i)

    def longest(group: list[int]) -> int:
        return max(len(prompts[i]) + len(completions[i]) for i in group)

    groups: list[list[int]] = []
    for group in sorted(by_prompt.values(), key=longest, reverse=True):
        groups += [group[part] for part in parts(len(group), SCORING_GROUP)]
    return groups
