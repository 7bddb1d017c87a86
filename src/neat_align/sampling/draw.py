"""One token from one number: the draw that every sampler here makes.

A completion's random numbers come from a generator seeded by the completion, one uniform number a
token, made on the CPU. The token is the one at which the running sum of the probabilities passes
that number. So the tokens of a completion depend on its prompt and seed, and not on the completions
that share its batch, on the batch's size, or on the device; what remains is floating-point noise in
the logits, which can move a boundary past the number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from neat_align.errors import CollapseError
from neat_align.sampling.protocol import SamplingParams


def uniforms(
    seeds: Sequence[int], tokens: int, device: torch.device
) -> Float[Tensor, "rows tokens"]:
    """Numbers in [0, 1), a row for each seed."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(tokens, generator=generator, device="cpu", dtype=torch.float32))
    return torch.stack(rows).to(device)


def draw(
    logits: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"], params: SamplingParams
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """A token a row, and its log-probability in nats under the untempered, unwarped policy.

    `uniform` holds a number in [0, 1) a row. Where the logits are not finite the log-probability is
    NaN (`check_drawn` raises): nothing is read from the device here.
    """
    asked, (device, dtype) = logits.device, summed_on(logits.device)
    logits, uniform = logits.to(device).float(), uniform.to(device)
    warped = logits / params.temperature if params.temperature != 1 else logits
    for warper in _warpers(params):
        warped = warper(torch.empty(0, dtype=torch.long), warped)
    running = warped.softmax(-1, dtype=dtype).cumsum_(-1)
    # The sum may end a rounding error away from 1; scaled by it, the number is always passed. A
    # token of probability 0 never moves the sum, so it is never the one.
    thresholds = uniform[:, None] * running[:, -1:]
    tokens = torch.searchsorted(running, thresholds, right=True).squeeze(-1)
    tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
    logprobs = torch.where(running[:, -1].isfinite(), logprobs, torch.nan)
    return tokens.to(asked), logprobs.to(asked)


def summed_on(device: torch.device) -> tuple[torch.device, torch.dtype]:
    """Where the probabilities of logits on a device are summed up, and in what type.

    A GPU sums in parallel, which in fp32 need not be monotone; a CPU adds one by one. Apple's GPUs
    have no float64, and share their memory with the CPU, which draws for them.
    """
    if device.type in ("cpu", "mps"):
        return torch.device("cpu"), torch.float32
    return device, torch.float64


def check_drawn(logprobs: Sequence[float]) -> None:
    """Raise CollapseError where a token was drawn from logits that are not finite."""
    if any(map(math.isnan, logprobs)):
        raise CollapseError(
            "the policy's logits are not finite while it samples: the weights or the number type "
            "are broken"
        )


def _warpers(params: SamplingParams) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    return warpers
