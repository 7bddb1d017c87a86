"""Model and rows in, per-token log-probabilities of the completions out, in nats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from neat_align.modeling.chunked_head import chosen_logprobs, chunk_rows, parts
from neat_align.modeling.head_inputs import (
    completion_states,
    head_inputs,
    head_of,
    linear_head,
    logit_tail,
)
from neat_align.modeling.lockstep import lockstep
from neat_align.modeling.packing import (
    Layout,
    PackedRows,
    PaddedRows,
    Rows,
    TokenIds,
    fill_in_order,
    rows_in_layout,
    tokens_in,
)
from neat_align.modeling.precision import frozen_casts, inference
from neat_align.modeling.shared_prefix import unwrapped
from neat_align.modeling.text_config import text_config

# Padded rows' log-softmax that is held in fp32 at a time; the backward pass computes it again.
HEAD_CHUNK = 512
# Tokens that go through the model at once when it only scores.
SCORING_TOKENS = 4096
# Completions of one prompt that are scored in one packed group.
SCORING_GROUP = 32


def _gather_logprobs(
    logits: Float[Tensor, "n vocab"], ids: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    logits = logits.float()
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def completion_logprobs(model: torch.nn.Module, rows: Rows) -> Float[Tensor, "rows tokens"]:
    """log π(y_t | x, y_<t) in nats for every completion token; 0 at padding.

    fp32 whatever the model computes in.
    """
    return logprobs_of(model, rows, head_inputs(model, rows))


def logprobs_of(
    model: torch.nn.Module, rows: Rows, inputs: Float[Tensor, "places width"]
) -> Float[Tensor, "rows tokens"]:
    """The same from the head's inputs, as `head_inputs` gives them for these rows."""
    if isinstance(rows, PackedRows):
        return _packed_logprobs(model, rows, inputs)
    return _padded_logprobs(rows, inputs)


def padded_logprobs(model: torch.nn.Module, rows: PaddedRows) -> Float[Tensor, "rows tokens"]:
    """`completion_logprobs` of padded rows."""
    return _padded_logprobs(rows, head_inputs(model, rows))


def packed_logprobs(model: torch.nn.Module, rows: PackedRows) -> Float[Tensor, "rows tokens"]:
    """`completion_logprobs` of packed rows."""
    return _packed_logprobs(model, rows, completion_states(model, rows))


def _padded_logprobs(
    rows: PaddedRows, logits: Float[Tensor, "places vocab"]
) -> Float[Tensor, "rows tokens"]:
    """From the model's own logits, which are held.

    The log-softmax runs in chunks that the backward pass computes again.
    """
    ids = rows.completion_ids.flatten()
    chunks = [
        _in_chunk(_gather_logprobs, logits[part], ids[part]) for part in parts(len(ids), HEAD_CHUNK)
    ]
    return torch.where(rows.completion_mask, torch.cat(chunks).view_as(rows.completion_ids), 0.0)


def _packed_logprobs(
    model: torch.nn.Module, rows: PackedRows, states: Float[Tensor, "predicted dim"]
) -> Float[Tensor, "rows tokens"]:
    """From the states at the positions that predict a completion token; few logits are held."""
    ids = rows.completion_ids.flatten().index_select(0, rows.token_at)
    head = head_of(model)
    tail = logit_tail(model)
    chunk = chunk_rows(text_config(unwrapped(model).config).vocab_size, states.device)
    linear = linear_head(head)
    if linear is not None:
        flat = chosen_logprobs(states, linear.weight, linear.bias, ids, tail, chunk)
    else:
        # An adapter on the head, or a quantised one: whatever it computes, in chunks.
        casts = frozen_casts(head, states.device)

        def logprobs(states: Float[Tensor, "n dim"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
            return _gather_logprobs(tail(functional_call(head, casts, (states,))), ids)

        chunks = [_in_chunk(logprobs, states[p], ids[p]) for p in parts(len(ids), chunk)]
        flat = torch.cat([states.new_zeros(0).float(), *chunks])
    table = flat.new_zeros(rows.completion_ids.numel()).index_copy(0, rows.token_at, flat)
    return table.view_as(rows.completion_ids)


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
    of equal prompts share one. Where ranks hold parts of the model, each of them calls this with
    its share, which may be empty.
    """
    device = next(model.parameters()).device
    scored: dict[int, tuple[float, ...]] = {}
    batches = scoring_batches(prompts, completions, layout, pad_token_id, max_tokens)
    with lockstep(model):
        for members, rows in batches:
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
        batch_prompts = [prompts[groups[g][0]] for g in batch]
        answers = [[completions[i] for i in groups[g]] for g in batch]
        yield members, rows_in_layout(batch_prompts, answers, layout, pad_token_id)


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
