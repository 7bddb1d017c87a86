"""KL to the start policy and entropy, exact over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neat_align.modeling.chunked_head import parts
from neat_align.modeling.head_inputs import (
    PADDED_TOKENS,
    head_inputs,
    head_outputs,
    heads_cast_once,
    places_of,
    rows_at_once,
)
from neat_align.modeling.lockstep import lockstep
from neat_align.modeling.logprobs import (
    SCORING_TOKENS,
    scoring_batches,
)
from neat_align.modeling.packing import Layout, Rows, TokenIds
from neat_align.modeling.precision import inference
from neat_align.modeling.reference import Reference


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
    rows, whose logits are held. Where ranks hold parts of the models, each of them calls this with
    its share, which may be empty.
    """
    budget = max_tokens or (SCORING_TOKENS if layout == "packed" else PADDED_TOKENS)
    kl, entropy = [0.0] * len(completions), [0.0] * len(completions)
    with reference() as start_policy:
        both = lockstep(model, start_policy)
    with both:
        for members, batch in scoring_batches(prompts, completions, layout, pad_token_id, budget):
            numbers = _divergence_of(model, reference, batch, autocast_dtype)
            owners = [i for i in members for _ in completions[i]]
            for owner, (its_kl, its_entropy) in zip(owners, numbers, strict=True):
                kl[owner] += its_kl
                entropy[owner] += its_entropy
    return Divergence(tuple(kl), tuple(entropy), tuple(map(len, completions)))


def _divergence_of(
    model: torch.nn.Module,
    reference: Reference,
    batch: Rows,
    autocast_dtype: torch.dtype | None,
) -> list[list[float]]:
    """KL and entropy at each completion token of a batch of rows, in nats."""
    device = next(model.parameters()).device
    places, rows = places_of(batch).to(device), batch.to(device)
    with inference(model, autocast_dtype):
        inputs = head_inputs(model, rows)[places]
    with reference() as start_policy, inference(start_policy, autocast_dtype):
        ref_inputs = head_inputs(start_policy, rows)[places]
    per_token = []
    with heads_cast_once(model, reference, autocast_dtype):
        for part in parts(len(places), rows_at_once(model)):
            with inference(model, autocast_dtype):
                logp = head_outputs(model, inputs[part], rows).float().log_softmax(-1)
            with reference() as start_policy, inference(start_policy, autocast_dtype):
                ref_logits = head_outputs(start_policy, ref_inputs[part], rows)
                ref_logp = ref_logits.float().log_softmax(-1)
            p = logp.exp()
            token_kl, token_entropy = (p * (logp - ref_logp)).sum(-1), (p * -logp).sum(-1)
            per_token.append(torch.stack([token_kl, token_entropy], -1))
    return torch.cat(per_token).tolist() if per_token else []
