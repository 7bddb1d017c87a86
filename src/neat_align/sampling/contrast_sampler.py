"""Sampling from the contrast of instructions, with how far each answer is from the plain policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neat_align.modeling.lockstep import lockstep
from neat_align.prompts.instruction_banks import InstructionPair
from neat_align.prompts.row_prompts import InstructedPairs, instructed_pairs, row_prompt_ids
from neat_align.prompts.rows import PromptRow
from neat_align.sampling.contrast_decoding import Contrast, contrasted
from neat_align.sampling.drawing import Combined, Drawn, RowReader
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams
from neat_align.sampling.row_kinds import keeps_keys, read_rows
from neat_align.sampling.shares import Done, Told
from neat_align.sampling.transformers_sampler import BatchLimit, TransformersSampler


@dataclass(frozen=True, slots=True)
class ContrastSample(Sample):
    """A completion drawn from q, whose untempered log-probability `logprob` is.

    `kl` is KL(q ‖ p0) in nats, summed over the completion's tokens: at each of them of the whole
    distributions, untempered, not of the token that was drawn.
    """

    kl: float


@dataclass(frozen=True)
class ContrastSampler:
    """A `Sampler` from q ∝ p0 · [p0(+) / p0(−)]^alpha, for plain prompts whose pairs it knows.

    `pairs` has for each plain prompt, as token ids, the same prompt under the instructions of its
    pairs (`contexts_of`); every prompt has equally many. `sampler` says which model, how and how
    many rows at once: a completion takes one for its plain prompt and two a pair. With alpha 0 it
    draws what `sampler` draws. A completion depends on its request alone.
    """

    sampler: TransformersSampler
    pairs: Mapping[tuple[int, ...], InstructedPairs]
    contrast: Contrast
    batch_limit: BatchLimit = field(default_factory=BatchLimit)

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """One `ContrastSample` a request, in order."""
        return list(self.draw(requests, params, progress=progress))

    def draw(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[ContrastSample]:
        """The same. Raises ValueError for a prompt without pairs, and what `sampler` raises."""
        with lockstep(self.sampler.model):
            return self._drawn(requests, params, progress) if requests else []

    def _drawn(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        progress: Callable[[int], None] | None,
    ) -> list[ContrastSample]:
        rows_each = self._rows_each(requests)
        fast = self.sampler.settle([r.prompt_ids for r in requests]) == "together" and keeps_keys(
            self.sampler.model
        )
        # Equal prompts stand together, so that they meet in a batch.
        order = sorted(
            range(len(requests)),
            key=lambda i: (-self._longest(requests[i]), requests[i].prompt_ids),
        )
        size = max(1, self.sampler.batch_size // rows_each)
        sampler = replace(self.sampler, batch_size=size, batch_limit=self.batch_limit)
        told = Told(progress, None)
        return sampler.in_groups([order], self._draw_share, requests, params, told, fast=fast)

    def _rows_each(self, requests: Sequence[SampleRequest]) -> int:
        """Rows that every request reads."""
        counts = {len(self.pairs.get(r.prompt_ids, ())) for r in requests}
        if 0 in counts or len(counts) > 1:
            raise ValueError(
                f"the prompts to sample have {', '.join(map(str, sorted(counts)))} pairs of "
                "instructed prompts; all must have equally many, and at least one"
            )
        return 1 + 2 * counts.pop()

    def _longest(self, request: SampleRequest) -> int:
        """Tokens of the request's longest row."""
        return max(map(len, self._rows(request)))

    def _rows(self, request: SampleRequest) -> list[tuple[int, ...]]:
        """The plain prompt, then each pair's positive and negative one."""
        pairs = self.pairs[request.prompt_ids]
        return [request.prompt_ids, *(ids for pair in pairs for ids in pair)]

    def _draw_share(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        places: int,
        done: Done[ContrastSample],
    ) -> None:
        base = self.sampler
        rows_each = self._rows_each(requests)
        way = base.settle([r.prompt_ids for r in requests])

        def combine(logits: Float[Tensor, "rows vocab"]) -> Combined:
            by_request = logits.view(-1, rows_each, logits.shape[-1])
            start = by_request[:, 0].float().log_softmax(-1)
            log_q = contrasted(start, by_request[:, 1:], self.contrast)
            return Combined(log_q, _kl(log_q, start))

        def finished(drawn: Sequence[Drawn]) -> None:
            samples = [base.sample_of(d, requests, params) for d in drawn]
            both = zip(samples, drawn, strict=True)
            done([d.request for d in drawn], [_with_kl(s, d.noted) for s, d in both])

        reader = RowReader(
            self._rows, lambda rows: read_rows(base.model, rows, base.pad_token_id, way), combine
        )
        base.draw(requests, params, places, reader, finished)


def _with_kl(sample: Sample, divergences: list[float]) -> ContrastSample:
    return ContrastSample(
        token_ids=sample.token_ids,
        finish_reason=sample.finish_reason,
        logprob=sample.logprob,
        kl=sum(divergences[: len(sample.token_ids)]),
    )


def contexts_of(
    tokenizer: Any,
    rows: Sequence[PromptRow],
    pairs: Sequence[Sequence[InstructionPair]],
    placement: str,
) -> dict[tuple[int, ...], InstructedPairs]:
    """What a `ContrastSampler` knows: each row's plain prompt under the instructions of its pairs.

    Of rows that render alike, the first one's. Raises PromptError.
    """
    contexts: dict[tuple[int, ...], InstructedPairs] = {}
    for row, drawn in zip(rows, pairs, strict=True):
        ids = tuple(row_prompt_ids(tokenizer, row))
        if ids not in contexts:
            inputs = row.template_inputs
            contexts[ids] = instructed_pairs(tokenizer, row.prompt, drawn, placement, inputs)
    return contexts


def _kl(
    log_q: Float[Tensor, "rows vocab"], log_p: Float[Tensor, "rows vocab"]
) -> Float[Tensor, " rows"]:
    """KL(q ‖ p) in nats; what has probability 0 under q adds nothing."""
    return torch.where(log_q.isneginf(), 0.0, log_q.exp() * (log_q - log_p)).sum(-1)
