"""Model and rows in, per-token log-probabilities of the completions out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neat_align.packing import PaddedRows, pad_rows
from neat_align.precision import inference

# Rows of the log-softmax that are held in fp32 at a time; the backward pass computes them again.
HEAD_CHUNK = 512
# Opens the start policy: a frozen copy, or the trained model with its adapter switched off.
Reference = Callable[[], AbstractContextManager[torch.nn.Module]]
TokenIds = Sequence[int]


def completion_logits(model: torch.nn.Module, rows: PaddedRows) -> Float[Tensor, "rows tokens vocab"]:
    """Logits that predict each completion token, from a full forward pass over padded rows.

    The first completion token is predicted at the prompt's last position, so the logits kept begin one before it. A model
    that cannot keep only some (no `logits_to_keep`) computes all and is sliced.
    """
    n = rows.completion_ids.shape[1]
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "position_ids": rows.position_ids, "use_cache": False}
    if "logits_to_keep" in _forward_parameters(model):
        inputs["logits_to_keep"] = n + 1
    logits: Tensor = model(**inputs).logits
    return logits[:, -(n + 1) : -1]


def _forward_parameters(model: torch.nn.Module) -> frozenset[str]:
    module = model
    # DDP and friends keep the real model in `.module`; PEFT passes everything on to the base model.
    while isinstance(getattr(module, "module", None), torch.nn.Module):
        module = module.module  # type: ignore[assignment]
    get_base_model = getattr(module, "get_base_model", None)
    if callable(get_base_model):
        module = get_base_model()
    return frozenset(inspect.signature(type(module).forward).parameters)


def _gather_logprobs(logits: Float[Tensor, "n vocab"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    logits = logits.float()
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def completion_logprobs(model: torch.nn.Module, rows: PaddedRows) -> Float[Tensor, "rows tokens"]:
    """log π(y_t | x, y_<t) in nats for every completion token; 0 at padding. fp32 whatever the model computes in."""
    logits = completion_logits(model, rows).flatten(0, 1)
    ids = rows.completion_ids.flatten()
    chunks = []
    for start in range(0, len(ids), HEAD_CHUNK):
        part = slice(start, start + HEAD_CHUNK)
        if torch.is_grad_enabled():
            chunks.append(checkpoint(_gather_logprobs, logits[part], ids[part], use_reentrant=False))
        else:
            chunks.append(_gather_logprobs(logits[part], ids[part]))
    logps = torch.cat(chunks).view_as(rows.completion_ids)
    return torch.where(rows.completion_mask, logps, 0.0)


def score_completions(
    model: torch.nn.Module,
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
    *,
    pad_token_id: int,
    batch_size: int,
    autocast_dtype: torch.dtype | None,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[float, ...]]:
    """Per-token log-probabilities in nats of each completion after its prompt, without gradients, in order."""
    order = sorted(range(len(prompts)), key=lambda i: -(len(prompts[i]) + len(completions[i])))
    device = next(model.parameters()).device
    scored: dict[int, tuple[float, ...]] = {}
    with inference(model, autocast_dtype):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = pad_rows([prompts[i] for i in batch], [completions[i] for i in batch], pad_token_id)
            logps = completion_logprobs(model, rows.to(device)).tolist()
            scored.update({i: tuple(row[: len(completions[i])]) for i, row in zip(batch, logps, strict=True)})
            if progress is not None:
                progress(len(batch))
    return [scored[i] for i in range(len(prompts))]


def exact_drift(
    model: torch.nn.Module,
    reference: Reference,
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
    *,
    pad_token_id: int,
    batch_size: int,
    autocast_dtype: torch.dtype | None,
) -> tuple[float, float]:
    """KL(π ‖ π_start) and the entropy of π, both in nats per token.

    Over the whole vocabulary at each token of `completions`, mean over tokens. With completions sampled from π on the
    plain prompt the first is the drift from the start policy, without the variance of an estimate from sampled tokens.
    """
    kl, entropy, tokens = 0.0, 0.0, 0
    device = next(model.parameters()).device
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        rows = pad_rows(prompts[part], completions[part], pad_token_id).to(device)
        with inference(model, autocast_dtype):
            logits = completion_logits(model, rows)[rows.completion_mask]
        with reference() as start_policy, inference(start_policy, autocast_dtype):
            ref_logits = completion_logits(start_policy, rows)[rows.completion_mask]
        for first in range(0, len(logits), HEAD_CHUNK):
            chunk = slice(first, first + HEAD_CHUNK)
            logp, ref_logp = logits[chunk].float().log_softmax(-1), ref_logits[chunk].float().log_softmax(-1)
            kl += float((logp.exp() * (logp - ref_logp)).sum())
            entropy -= float((logp.exp() * logp).sum())
        tokens += len(logits)
    return kl / max(tokens, 1), entropy / max(tokens, 1)
