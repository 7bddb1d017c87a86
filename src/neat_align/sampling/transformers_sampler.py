"""Sampling with `model.generate`, each completion from its own random stream.

The draw is Gumbel-max: noise from a generator seeded by the completion, added to the warped logits, then an arg-max.
So `generate` runs greedily and does the rest (cache, padding, stopping, every architecture), while the tokens of a
completion depend on its prompt and seed and not on which other completions share its batch. What remains of the batch is
floating-point noise in the logits, which can flip a near-tie.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from neat_align.precision import inference
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams

_HALF_STEP = 2.0**-25


class _SeededDraw(LogitsProcessor):
    """Warp, add each row's own Gumbel noise, and remember the untempered log-probability of the token that wins."""

    def __init__(self, seeds: Sequence[int], params: SamplingParams, device: torch.device) -> None:
        self.params = params
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        self.warpers: list[LogitsProcessor] = []
        if params.top_k:
            self.warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self.warpers.append(TopPLogitsWarper(params.top_p))
        self.logprobs: list[Float[Tensor, " rows"]] = []

    def __call__(self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        scores = scores.float()
        warped = scores / self.params.temperature
        for warper in self.warpers:
            warped = warper(input_ids, warped)
        # Gumbel noise is −log E with E exponential, and E is −log u with u uniform. Drawing u and taking the logarithms of
        # the whole batch at once is several times faster than drawing E row by row. u is a multiple of 2^-24 and never 1;
        # half a step more keeps E above 0, so that no token can win by an infinite key.
        noise = torch.empty_like(warped)
        for row, generator in zip(noise, self.generators, strict=True):
            row.uniform_(generator=generator)
        keyed = warped.sub_(noise.neg_().sub_(_HALF_STEP).log1p_().neg_().log_())
        winner = keyed.argmax(dim=-1, keepdim=True)
        self.logprobs.append((scores.gather(-1, winner) - scores.logsumexp(-1, keepdim=True)).squeeze(-1))
        return keyed


@dataclass(frozen=True)
class TransformersSampler:
    """A `Sampler` over a transformers causal language model on any device.

    Requests are sorted by length and drawn `batch_size` at a time, left-padded. `eos_token_ids` end a completion.
    `autocast_dtype` computes in that type; None computes in the weights' own.
    """

    model: PreTrainedModel | torch.nn.Module
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    batch_size: int = 64
    autocast_dtype: torch.dtype | None = None

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, progress: Callable[[int], None] | None = None
    ) -> list[Sample]:
        """One `Sample` a request, in the order of the requests."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        drawn: dict[int, Sample] = {}
        with inference(self.model, self.autocast_dtype):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                drawn.update(zip(batch, self._draw([requests[i] for i in batch], params), strict=True))
                if progress is not None:
                    progress(len(batch))
        return [drawn[i] for i in range(len(requests))]

    def _draw(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[Sample]:
        device = next(self.model.parameters()).device
        width = max(len(r.prompt_ids) for r in requests)
        # Left padding, masked by length: the pad token may also be a real token of the prompt.
        input_ids = torch.tensor([[self.pad_token_id] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests])
        attention_mask = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
        draw = _SeededDraw([r.seed for r in requests], params, device)
        with _no_own_generation_config(self.model):
            output = cast("Any", self.model).generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=_greedy(params, self.eos_token_ids, self.pad_token_id),
                logits_processor=LogitsProcessorList([draw]),
            )
        tokens = output[:, width:].tolist()
        logprobs = torch.stack(draw.logprobs, dim=1).tolist()
        return [self._sample(t, lp) for t, lp in zip(tokens, logprobs, strict=True)]

    def _sample(self, tokens: list[int], logprobs: list[float]) -> Sample:
        end = next((i for i, token in enumerate(tokens) if token in self.eos_token_ids), None)
        length = len(tokens) if end is None else end + 1
        return Sample(tuple(tokens[:length]), "length" if end is None else "stop", sum(logprobs[:length]))


@contextlib.contextmanager
def _no_own_generation_config(model: Any) -> Iterator[None]:
    """`generate` fills what is unset from the model's own generation_config (repetition penalties, suppressed tokens, …);
    with an empty one only the request shapes the draw."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _greedy(params: SamplingParams, eos_token_ids: tuple[int, ...], pad_token_id: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
        use_cache=True,
    )
