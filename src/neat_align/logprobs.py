"""Model and rows in, per-token log-probabilities of the completions out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neat_align.chunked_head import LogitTail, chosen_logprobs, chunk_rows, parts
from neat_align.packing import Layout, PackedRows, PaddedRows, Rows, TokenIds, fill_in_order, pack_rows, pad_rows, tokens_in
from neat_align.precision import inference
from neat_align.shared_prefix import is_sharing, sharing_prefixes, shortest_window, unwrapped, why_not_packed

logger = logging.getLogger(__name__)

# Padded rows' log-softmax that is held in fp32 at a time; the backward pass computes it again.
HEAD_CHUNK = 512
# Tokens that go through the model at once when it only scores.
SCORING_TOKENS = 4096
# The same for padded rows whose logits are held.
PADDED_DRIFT_TOKENS = 1024
# Completions of one prompt that are scored in one packed group.
SCORING_GROUP = 32
# Opens the start policy: a frozen copy, or the trained model with its adapter switched off.
Reference = Callable[[], AbstractContextManager[torch.nn.Module]]


def completion_logits(model: torch.nn.Module, rows: PaddedRows) -> Float[Tensor, "rows tokens vocab"]:
    """Logits that predict each completion token, from a full forward pass over padded rows.

    The first completion token is predicted at the prompt's last position, so the logits kept begin one before it. A model
    that cannot keep only some (no `logits_to_keep`) computes all and is sliced.
    """
    n = rows.completion_ids.shape[1]
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "position_ids": rows.position_ids, "use_cache": False}
    if "logits_to_keep" in inspect.signature(type(unwrapped(model)).forward).parameters:
        inputs["logits_to_keep"] = n + 1
    logits: Tensor = model(**inputs).logits
    return logits[:, -(n + 1) : -1]


def _gather_logprobs(logits: Float[Tensor, "n vocab"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    logits = logits.float()
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def completion_logprobs(model: torch.nn.Module, rows: Rows) -> Float[Tensor, "rows tokens"]:
    """log π(y_t | x, y_<t) in nats for every completion token; 0 at padding. fp32 whatever the model computes in."""
    return packed_logprobs(model, rows) if isinstance(rows, PackedRows) else padded_logprobs(model, rows)


def padded_logprobs(model: torch.nn.Module, rows: PaddedRows) -> Float[Tensor, "rows tokens"]:
    """From the model's own logits, which are held; the log-softmax runs in chunks that the backward pass computes again."""
    logits = completion_logits(model, rows).flatten(0, 1)
    ids = rows.completion_ids.flatten()
    chunks = [_in_chunk(_gather_logprobs, logits[part], ids[part]) for part in parts(len(ids), HEAD_CHUNK)]
    return torch.where(rows.completion_mask, torch.cat(chunks).view_as(rows.completion_ids), 0.0)


def packed_logprobs(model: torch.nn.Module, rows: PackedRows) -> Float[Tensor, "rows tokens"]:
    """From the backbone's states at the positions that predict a completion token; the logits are never held as a whole."""
    states, ids = completion_states(model, rows), rows.completion_ids[rows.completion_mask]
    head, tail = cast("torch.nn.Module", unwrapped(model).get_output_embeddings()), _logit_tail(model)
    chunk = chunk_rows(unwrapped(model).config.get_text_config().vocab_size, states.device)
    if type(head) is torch.nn.Linear:
        flat = chosen_logprobs(states, head.weight, head.bias, ids, tail, chunk)
    else:
        # An adapter on the head, or a quantised one: whatever it computes, in chunks.
        def logprobs(states: Float[Tensor, "n dim"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
            return _gather_logprobs(tail(head(states)), ids)

        flat = torch.cat([states.new_zeros(0).float(), *(_in_chunk(logprobs, states[p], ids[p]) for p in parts(len(ids), chunk))])
    return flat.new_zeros(rows.completion_ids.shape).masked_scatter(rows.completion_mask, flat)


def completion_states(model: torch.nn.Module, rows: PackedRows) -> Float[Tensor, "predicted dim"]:
    """The head's input at the positions that predict a completion token, completion by completion.

    The model is called as a whole, so that its wrappers (PEFT, DDP) see the call. A hook takes the states in front of the
    head and lets the head itself compute one position only.
    """
    if torch.is_grad_enabled() and unwrapped(model).is_activation_checkpointing and not is_sharing(model):
        raise RuntimeError(
            "packed rows with gradient checkpointing need `sharing_prefixes(model)` to be open around forward and backward: "
            "the backward pass computes the attention again"
        )
    taken: list[Tensor] = []

    def take(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append(inputs[0])
        return (inputs[0][:, :1], *inputs[1:])

    hook = cast("torch.nn.Module", unwrapped(model).get_output_embeddings()).register_forward_pre_hook(take)
    try:
        with sharing_prefixes(model):
            model(
                input_ids=rows.input_ids,
                position_ids=rows.position_ids,
                shared_prefix=rows.layout,
                logits_to_keep=rows.read_at,
                use_cache=False,
            )
    finally:
        hook.remove()
    return taken[0][0]


def _logit_tail(model: torch.nn.Module) -> LogitTail:
    """What the family does to the head's output, where its configuration says so; `choose_layout` finds out where it does not."""
    config = unwrapped(model).config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
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
    """Per-token log-probabilities in nats of each completion after its prompt, without gradients, in order.

    `max_tokens` go through the model at once. In the packed layout completions of equal prompts share one.
    """
    device = next(model.parameters()).device
    scored: dict[int, tuple[float, ...]] = {}
    for members, rows in _scoring_batches(prompts, completions, layout, pad_token_id, max_tokens):
        with inference(model, autocast_dtype):
            logps = completion_logprobs(model, rows.to(device)).tolist()
        scored.update({i: tuple(row[: len(completions[i])]) for i, row in zip(members, logps, strict=True)})
    return [scored[i] for i in range(len(prompts))]


def _scoring_batches(
    prompts: Sequence[TokenIds], completions: Sequence[TokenIds], layout: Layout, pad_token_id: int, max_tokens: int
) -> Iterator[tuple[list[int], Rows]]:
    """Batches of rows for passes without a gradient, each with the indices of its completions, in the order of its rows."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        # Padded rows are all their own group: any number of them makes a batch.
        by_prompt.setdefault(tuple(prompt) if layout == "packed" else (i,), []).append(i)
    groups = sorted(by_prompt.values(), key=lambda group: -max(len(prompts[i]) + len(completions[i]) for i in group))
    # A prompt with very many completions is cut, so that its batch stays near the budget.
    groups = [group[start : start + SCORING_GROUP] for group in groups for start in range(0, len(group), SCORING_GROUP)]
    sizes = [tokens_in(len(prompts[group[0]]), [len(completions[i]) for i in group], layout) for group in groups]
    for batch in fill_in_order(sizes, max_tokens):
        members = [i for g in batch for i in groups[g]]
        if layout == "packed":
            yield members, pack_rows([prompts[groups[g][0]] for g in batch], [[completions[i] for i in groups[g]] for g in batch])
        else:
            yield members, pad_rows([prompts[i] for i in members], [completions[i] for i in members], pad_token_id)


def choose_layout(model: torch.nn.Module, prompts: Sequence[TokenIds], *, pad_token_id: int, longest: int) -> Layout:
    """Packed where it gives what padded rows give on these prompts, else padded, and a warning that says why.

    Each prompt is followed by pieces of the others in place of completions: the numbers depend on the layout alone, not on
    what the text says. `longest` is the most tokens that a prompt and a completion will have: where the model's attention
    reaches back less far, a prompt is repeated until it is longer than that.
    """
    reason = why_not_packed(model) or _disagreement(model, prompts, pad_token_id, longest)
    if reason is None:
        return "packed"
    logger.warning("prompts are not shared between completions: %s. Training goes on with padded rows, correct but slower", reason)
    return "padded"


def _disagreement(model: torch.nn.Module, prompts: Sequence[TokenIds], pad_token_id: int, longest: int) -> str | None:
    pieces = [list(prompt[:n]) for prompt, n in zip([*prompts, *prompts, *prompts], (5, 1, 24), strict=False)]
    window = shortest_window(model)
    if window is not None and window < longest:
        repeated = list(prompts[0]) * -(-(window + 8) // len(prompts[0]))
        prompts = [repeated[: window + 8], *prompts[1:]]
    device = next(model.parameters()).device
    packed = pack_rows(prompts, [pieces] * len(prompts)).to(device)
    padded = pad_rows([p for p in prompts for _ in pieces], pieces * len(prompts), pad_token_id).to(device)
    try:
        with inference(model, None):
            difference = (packed_logprobs(model, packed) - padded_logprobs(model, padded)).abs()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:  # whatever the model's code makes of a packed row
        return f"{type(unwrapped(model)).__name__} fails on packed rows ({error})"
    # Half precision and quantised weights round differently in every shape; another attention is off by far more than that.
    exact = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point()) and not _is_quantised(model)
    measured, limit = (float(difference.max()), 1e-3) if exact else (float(difference.mean()), 0.05)
    if measured <= limit:
        return None
    return f"its log-probabilities differ by {measured:.2g} nats between packed and padded rows (at most {limit} is rounding)"


def _is_quantised(model: torch.nn.Module) -> bool:
    return getattr(unwrapped(model).config, "quantization_config", None) is not None


@dataclass(frozen=True)
class Drift:
    """KL(π ‖ π_start) and the entropy of π over the whole vocabulary, in nats, summed over the tokens of each completion."""

    kl: tuple[float, ...]
    entropy: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def kl_per_token(self) -> float:
        """Mean over all tokens, in nats; 0 without any."""
        return sum(self.kl) / max(sum(self.tokens), 1)

    @property
    def entropy_per_token(self) -> float:
        """Mean over all tokens, in nats; 0 without any."""
        return sum(self.entropy) / max(sum(self.tokens), 1)


def exact_drift(
    model: torch.nn.Module,
    reference: Reference,
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
    *,
    layout: Layout,
    pad_token_id: int,
    autocast_dtype: torch.dtype | None,
    max_tokens: int | None = None,
) -> Drift:
    """How far the policy is from the start policy at each token of `completions`, without the variance of an estimate.

    With completions sampled from π on the plain prompt the KL is the drift. `max_tokens` go through a model at once; by
    default few in padded rows, whose logits are held.
    """
    budget = max_tokens or (SCORING_TOKENS if layout == "packed" else PADDED_DRIFT_TOKENS)
    kl, entropy = [0.0] * len(completions), [0.0] * len(completions)
    device = next(model.parameters()).device
    for members, batch in _scoring_batches(prompts, completions, layout, pad_token_id, budget):
        rows = batch.to(device)
        with inference(model, autocast_dtype):
            inputs = _head_inputs(model, rows)
        with reference() as start_policy, inference(start_policy, autocast_dtype):
            ref_inputs = _head_inputs(start_policy, rows)
        owners = [i for i in members for _ in completions[i]]
        size = chunk_rows(unwrapped(model).config.get_text_config().vocab_size, device)
        for part in parts(len(owners), size):
            with inference(model, autocast_dtype):
                logp = _head_outputs(model, inputs[part], rows).float().log_softmax(-1)
            with reference() as start_policy, inference(start_policy, autocast_dtype):
                ref_logp = _head_outputs(start_policy, ref_inputs[part], rows).float().log_softmax(-1)
            p = logp.exp()
            gaps, surprises = (p * (logp - ref_logp)).sum(-1).tolist(), (p * logp).sum(-1).tolist()
            for owner, gap, surprise in zip(owners[part], gaps, surprises, strict=True):
                kl[owner] += gap
                entropy[owner] -= surprise
    return Drift(tuple(kl), tuple(entropy), tuple(map(len, completions)))


def _head_inputs(model: torch.nn.Module, rows: Rows) -> Float[Tensor, "predicted width"]:
    """What the logits of each completion token are made from: states in packed rows, in padded rows the logits themselves."""
    if isinstance(rows, PackedRows):
        return completion_states(model, rows)
    return completion_logits(model, rows)[rows.completion_mask]


def _head_outputs(model: torch.nn.Module, inputs: Float[Tensor, "n width"], rows: Rows) -> Float[Tensor, "n vocab"]:
    if isinstance(rows, PackedRows):
        head = cast("torch.nn.Module", unwrapped(model).get_output_embeddings())
        return _logit_tail(model)(head(inputs))
    return inputs
