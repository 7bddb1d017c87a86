"""Sampling from a transformers model, each completion from its own random numbers (`draw`).

Requests are sorted by length and drawn `batch_size` at a time, left-padded. A prompt that several
completions of a batch share goes through the model once; the cache is then copied to each of them.
Completions that have ended leave the batch. transformers' own `generate` does neither (and its
continuous batching draws from one random stream for all), so the decode loop is written out here; a
model that keeps more than keys and values is drawn with `generate`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from neat_align.modeling.precision import inference
from neat_align.modeling.shared_prefix import adds_virtual_tokens, unwrapped
from neat_align.sampling.decode_attention import fast_decoding
from neat_align.sampling.draw import draw, uniforms
from neat_align.sampling.protocol import FinishReason, Sample, SampleRequest, SamplingParams

logger = logging.getLogger(__name__)
# Completions leave the batch when at least this share of it has ended: the cache is copied then.
SHRINK_AT = 0.125


@dataclass
class BatchLimit:
    """How many completions fit into memory at once; None until memory ran out."""

    limit: int | None = None


@dataclass(frozen=True)
class TransformersSampler:
    """A `Sampler` over a transformers causal language model on any device.

    `eos_token_ids` end a completion. `autocast_dtype` computes in that type; None computes in the
    weights' own. When memory runs out the batch is halved, said once, and drawn again; samplers
    that share a `batch_limit` remember it.
    """

    model: PreTrainedModel | torch.nn.Module
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    batch_size: int = 64
    autocast_dtype: torch.dtype | None = None
    batch_limit: BatchLimit = field(default_factory=BatchLimit)

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """One `Sample` a request, in the order of the requests."""
        # Equal prompts stand together, so that they meet in a batch.
        order = sorted(
            range(len(requests)),
            key=lambda i: (-len(requests[i].prompt_ids), requests[i].prompt_ids),
        )
        keeps_keys = _keeps_keys(self.model)
        draw_batch = self._decode if keeps_keys else self._generate
        # As few batches as `batch_size` allows, of like size: a small last one would cost nearly as
        # much as a full one.
        batches = max(1, -(-len(order) // self.batch_size))
        size = -(-len(order) // batches)
        samples: dict[int, Sample] = {}
        fast = fast_decoding(self.model) if keeps_keys else contextlib.nullcontext()
        with inference(self.model, self.autocast_dtype), fast:
            start = 0
            while start < len(order):
                batch = order[start : start + min(size, self.batch_limit.limit or size)]
                fitted = self._in_memory(draw_batch, [requests[i] for i in batch], params)
                if fitted is None:
                    continue  # with fewer at once
                samples.update(zip(batch, fitted, strict=True))
                start += len(batch)
                if progress is not None:
                    progress(len(batch))
        return [samples[i] for i in range(len(requests))]

    def _in_memory(
        self,
        draw_batch: Callable[[Sequence[SampleRequest], SamplingParams], list[Sample]],
        requests: Sequence[SampleRequest],
        params: SamplingParams,
    ) -> list[Sample] | None:
        """The batch's samples, or None when memory ran out and the limit was halved.

        A completion alone raises as it did.
        """
        try:
            return draw_batch(requests, params)
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise
            if self.batch_limit.limit is None:
                logger.warning(
                    "memory ran out while %d completions were sampled at once: from now on fewer "
                    "are. generation_batch_size sets how many",
                    len(requests),
                )
            self.batch_limit.limit = len(requests) // 2
        # Outside of the except block: the exception would keep the failed batch's tensors alive.
        clear_device_cache(garbage_collection=True)
        return None

    def _decode(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[Sample]:
        device = next(self.model.parameters()).device
        numbers = uniforms([r.seed for r in requests], params.max_new_tokens, device)
        ends = torch.tensor(self.eos_token_ids, device=device)
        prompts = list(dict.fromkeys(r.prompt_ids for r in requests))
        which = torch.tensor([prompts.index(r.prompt_ids) for r in requests], device=device)
        input_ids, mask = _left_padded(prompts, self.pad_token_id, device)
        cache = DynamicCache(config=unwrapped(self.model).config)
        logits = self._forward(input_ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)[which]
        mask, positions = mask[which], mask[which].sum(-1)
        cache.batch_select_indices(which)
        # The request that each row of the batch draws for.
        rows = torch.arange(len(requests), device=device)
        ended = torch.zeros(len(requests), dtype=torch.bool, device=device)
        tokens = torch.empty(numbers.shape, dtype=torch.long, device=device)
        logprobs = torch.empty_like(numbers)
        for step in range(params.max_new_tokens):
            last, logprob = draw(logits, numbers[rows, step], params)
            tokens[rows, step], logprobs[rows, step] = last, logprob
            ended |= torch.isin(last, ends)
            left = int((~ended).sum())
            if left == 0 or step + 1 == params.max_new_tokens:
                break
            if left <= (1 - SHRINK_AT) * len(rows):
                stay = (~ended).nonzero().squeeze(-1)
                rows, mask, positions, last, ended = (
                    x[stay] for x in (rows, mask, positions, last, ended)
                )
                cache.batch_select_indices(stay)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(last[:, None], mask, positions[:, None], cache)
            positions = positions + 1
        return [
            self._sample(t, lp) for t, lp in zip(tokens.tolist(), logprobs.tolist(), strict=True)
        ]

    def _forward(
        self,
        input_ids: Int[Tensor, "rows new"],
        mask: Int[Tensor, "rows width"],
        positions: Int[Tensor, "rows new"],
        cache: DynamicCache,
    ) -> Float[Tensor, "rows vocab"]:
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cast("Tensor", output.logits[:, -1])

    def _generate(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[Sample]:
        device = next(self.model.parameters()).device
        input_ids, mask = _left_padded([r.prompt_ids for r in requests], self.pad_token_id, device)
        processor = _DrawnToken(
            uniforms([r.seed for r in requests], params.max_new_tokens, device),
            params,
            input_ids.shape[1],
        )
        with _no_own_generation_config(self.model):
            output = cast("Any", self.model).generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=_greedy(params, self.eos_token_ids, self.pad_token_id),
                logits_processor=LogitsProcessorList([processor]),
            )
        logprobs = torch.stack(processor.logprobs, dim=1).tolist()
        tokens = output[:, input_ids.shape[1] :].tolist()
        return [self._sample(t, lp) for t, lp in zip(tokens, logprobs, strict=True)]

    def _sample(self, tokens: list[int], logprobs: list[float]) -> Sample:
        end = next((i for i, token in enumerate(tokens) if token in self.eos_token_ids), None)
        length = len(tokens) if end is None else end + 1
        finish_reason: FinishReason = "length" if end is None else "stop"
        return Sample(tuple(tokens[:length]), finish_reason, sum(logprobs[:length]))


def _keeps_keys(model: torch.nn.Module) -> bool:
    """Whether a model's cache is keys and values alone: its rows can be copied and taken out.

    Not with PEFT's virtual tokens: they are put in front at every call, which only `generate`
    expects.
    """
    if not unwrapped(model)._supports_attention_backend or adds_virtual_tokens(model):
        return False
    layers = DynamicCache(config=unwrapped(model).config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _left_padded(
    prompts: Sequence[tuple[int, ...]], pad_token_id: int, device: torch.device
) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    """Token ids and their mask.

    The mask goes by length: the pad token may also be a real token of a prompt.
    """
    width = max(map(len, prompts))
    padding = [width - len(p) for p in prompts]
    ids = [[pad_token_id] * n + list(p) for n, p in zip(padding, prompts, strict=True)]
    mask = [[0] * n + [1] * (width - n) for n in padding]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _DrawnToken(LogitsProcessor):
    """Leaves `generate`, running greedily, the drawn token alone; keeps its log-probability."""

    def __init__(
        self, numbers: Float[Tensor, "rows tokens"], params: SamplingParams, prompt_width: int
    ) -> None:
        self.numbers, self.params, self.prompt_width = numbers, params, prompt_width
        self.logprobs: list[Float[Tensor, " rows"]] = []

    def __call__(
        self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        tokens, logprobs = draw(
            scores, self.numbers[:, input_ids.shape[1] - self.prompt_width], self.params
        )
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


@contextlib.contextmanager
def _no_own_generation_config(model: Any) -> Iterator[None]:
    """While open, the model's own generation_config is empty: only the request shapes the draw.

    `generate` fills what is unset from it (repetition penalties, suppressed tokens, …).
    """
    base = unwrapped(model)
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _greedy(
    params: SamplingParams, eos_token_ids: tuple[int, ...], pad_token_id: int
) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
        use_cache=True,
    )
