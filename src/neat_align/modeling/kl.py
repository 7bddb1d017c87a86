"""KL to the start policy and entropy, exact over the whole vocabulary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from neat_align.modeling.chunked_head import chunk_rows, parts
from neat_align.modeling.logprobs import (
    SCORING_TOKENS,
    completion_logits,
    completion_states,
    logit_tail,
    scoring_batches,
)
from neat_align.modeling.packing import Layout, PackedRows, Rows, TokenIds
from neat_align.modeling.precision import autocast, casting_once, inference
from neat_align.modeling.reference import Reference
from neat_align.modeling.shared_prefix import unwrapped
from neat_align.modeling.text_config import text_config

# Tokens that go through the model at once in padded rows, whose logits are held (packed rows:
# `SCORING_TOKENS`).
PADDED_TOKENS = 1024


@dataclass(frozen=True)
class Divergence:
    """KL(π ‖ π_start) and the entropy of π, over the whole vocabulary, in nats.

    One number a completion, summed over its tokens; `tokens` counts those.
    """

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


def exact_divergence(
    model: torch.nn.Module,
    reference: Reference,
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
    *,
    layout: Layout,
    pad_token_id: int,
    autocast_dtype: torch.dtype | None,
    max_tokens: int | None = None,
) -> Divergence:
    """How far the policy is from the start policy, without the variance of an estimate.

    At each token of `completions` after its prompt. With completions sampled from π on the plain
    prompt the KL is the drift. `max_tokens` go through a model at once; by default few in padded
    rows, whose logits are held.
    """
    budget = max_tokens or (SCORING_TOKENS if layout == "packed" else PADDED_TOKENS)
    kl, entropy = [0.0] * len(completions), [0.0] * len(completions)
    device = next(model.parameters()).device
    for members, batch in scoring_batches(prompts, completions, layout, pad_token_id, budget):
        rows = batch.to(device)
        with inference(model, autocast_dtype):
            inputs = _head_inputs(model, rows)
        with reference() as start_policy, inference(start_policy, autocast_dtype):
            ref_inputs = _head_inputs(start_policy, rows)
        owners = [i for i in members for _ in completions[i]]
        size = chunk_rows(text_config(unwrapped(model).config).vocab_size, device)
        per_token = []
        with _heads_cast_once(model, reference, autocast_dtype):
            for part in parts(len(owners), size):
                with inference(model, autocast_dtype):
                    logp = _head_outputs(model, inputs[part], rows).float().log_softmax(-1)
                with reference() as start_policy, inference(start_policy, autocast_dtype):
                    ref_logits = _head_outputs(start_policy, ref_inputs[part], rows)
                    ref_logp = ref_logits.float().log_softmax(-1)
                p = logp.exp()
                token_kl, token_entropy = (p * (logp - ref_logp)).sum(-1), (p * -logp).sum(-1)
                per_token.append(torch.stack([token_kl, token_entropy], -1))
        numbers = torch.cat(per_token).tolist() if per_token else []
        for owner, (its_kl, its_entropy) in zip(owners, numbers, strict=True):
            kl[owner] += its_kl
            entropy[owner] += its_entropy
    return Divergence(tuple(kl), tuple(entropy), tuple(map(len, completions)))


@contextlib.contextmanager
def _heads_cast_once(
    model: torch.nn.Module, reference: Reference, autocast_dtype: torch.dtype | None
) -> Iterator[None]:
    """While open, autocast keeps the casts of both policies' heads from chunk to chunk.

    An autocast that is closed forgets its casts; the outer one stays open.
    """
    device = next(model.parameters()).device.type
    with contextlib.ExitStack() as opened:
        opened.enter_context(autocast(device, autocast_dtype))
        if autocast_dtype is not None:
            with reference() as start_policy:
                policies = (model, start_policy)
            for head in {id(h): h for h in map(_head, policies)}.values():
                opened.enter_context(casting_once(head))
        yield


def _head(model: torch.nn.Module) -> torch.nn.Module:
    return cast("torch.nn.Module", unwrapped(model).get_output_embeddings())


def _head_inputs(model: torch.nn.Module, rows: Rows) -> Float[Tensor, "predicted width"]:
    """What the logits of each completion token are made from.

    Packed rows: the head's input states. Padded rows: the logits themselves.
    """
    if isinstance(rows, PackedRows):
        return completion_states(model, rows)
    return completion_logits(model, rows)[rows.completion_mask]


def _head_outputs(
    model: torch.nn.Module, inputs: Float[Tensor, "n width"], rows: Rows
) -> Float[Tensor, "n vocab"]:
    if isinstance(rows, PackedRows):
        return logit_tail(model)(_head(model)(inputs))
    return inputs
