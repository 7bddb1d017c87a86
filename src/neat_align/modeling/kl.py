"""KL to the start policy and entropy, exact over the whole vocabulary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from neat_align.modeling.chunked_head import blocks_of, parts
from neat_align.modeling.head_inputs import (
    PADDED_TOKENS,
    head_inputs,
    head_of,
    head_outputs,
    heads_cast_once,
    linear_head,
    places_of,
    rows_at_once,
)
from neat_align.modeling.lockstep import lockstep
from neat_align.modeling.logprobs import (
    SCORING_TOKENS,
    scoring_batches,
)
from neat_align.modeling.packing import Layout, PackedRows, Rows, TokenIds
from neat_align.modeling.precision import autocast, inference
from neat_align.modeling.reference import Reference, adapter_is_zero
from neat_align.modeling.rounding import own_type


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
    # Before the first step the two are one: one pass is enough.
    other = None if start_policy is model and adapter_is_zero(model) else reference
    with both:
        for members, batch in scoring_batches(prompts, completions, layout, pad_token_id, budget):
            numbers = _divergence_of(model, other, batch, autocast_dtype)
            owners = [i for i in members for _ in completions[i]]
            for owner, (its_kl, its_entropy) in zip(owners, numbers, strict=True):
                kl[owner] += its_kl
                entropy[owner] += its_entropy
    return Divergence(tuple(kl), tuple(entropy), tuple(map(len, completions)))


def _divergence_of(
    model: torch.nn.Module,
    reference: Reference | None,
    batch: Rows,
    autocast_dtype: torch.dtype | None,
) -> list[list[float]]:
    """KL and entropy at each completion token of a batch of rows, in nats.

    `reference` None: the start policy is the model itself.
    """
    device = next(model.parameters()).device
    places, rows = places_of(batch).to(device), batch.to(device)
    with inference(model, autocast_dtype):
        inputs = head_inputs(model, rows)[places]
    start_policy, ref_inputs = model, inputs
    if reference is not None:
        with reference() as start_policy, inference(start_policy, autocast_dtype):
            ref_inputs = head_inputs(start_policy, rows)[places]

    def current() -> AbstractContextManager[torch.nn.Module]:
        return contextlib.nullcontext(model)

    per_token = []
    with torch.no_grad(), heads_cast_once(model, reference or current, autocast_dtype):
        for part in parts(len(places), rows_at_once(model)):
            with _open_for_head(current(), model, rows, autocast_dtype):
                logits = ref_logits = head_outputs(model, inputs[part], rows)
            if reference is not None:
                with _open_for_head(reference(), start_policy, rows, autocast_dtype):
                    ref_logits = head_outputs(start_policy, ref_inputs[part], rows)
            per_token += [_kl_and_entropy(logits[b], ref_logits[b]) for b in blocks_of(logits)]
    return torch.cat(per_token).tolist() if per_token else []


@contextlib.contextmanager
def _open_for_head(
    policy: AbstractContextManager[torch.nn.Module],
    model: torch.nn.Module,
    rows: Rows,
    autocast_dtype: torch.dtype | None,
) -> Iterator[None]:
    """`policy`, which opens `model`, open as far as its head needs it.

    To open it is to go through all of its modules. A linear head without an adapter gives the same
    logits when its policy is not open.
    """
    kind = next(model.parameters()).device.type
    with contextlib.ExitStack() as opened:
        if isinstance(rows, PackedRows) and linear_head(head_of(model)) is None:
            opened.enter_context(policy)
            opened.enter_context(inference(model, autocast_dtype))
        opened.enter_context(autocast(kind, autocast_dtype or own_type(model)))
        yield


def _kl_and_entropy(
    logits: Float[Tensor, "n vocab"], ref_logits: Float[Tensor, "n vocab"]
) -> Float[Tensor, "n 2"]:
    """Σ p (log p − log p_start) and −Σ p log p of each row, in fp32."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    p = logp.exp()
    return torch.stack([(p * (logp - ref_logp)).sum(-1), -(p * logp).sum(-1)], -1)
