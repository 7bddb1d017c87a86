"""The policy that learns and the policy it started from, scored and sampled in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from neat_align.modeling.kl import Divergence, exact_divergence
from neat_align.modeling.logprobs import score_completions
from neat_align.modeling.packing import Layout, TokenIds
from neat_align.modeling.precision import half_precision_copy
from neat_align.modeling.reference import Reference
from neat_align.modeling.self_check import showing_adapter
from neat_align.modeling.shared_prefix import adds_virtual_tokens, unwrapped
from neat_align.sampling.batch_check import KnownWay
from neat_align.sampling.protocol import (
    Finished,
    Sample,
    Sampler,
    SampleRequest,
    SamplingParams,
)
from neat_align.sampling.transformers_sampler import BatchLimit, TransformersSampler


@dataclass(frozen=True)
class Policies:
    """The current policy and the start policy.

    `reference` opens the start policy, which may be the current model with its adapter off: only
    while it is open. With `copy_dtype` completions are sampled from a copy in that type with
    adapters merged, which is faster on CPUs; None samples from the policy itself. `batch_size`
    completions are sampled at once, or fewer once memory ran out (`batch_limit` remembers that).
    `known_way` and `known_start_way` remember which prompts each of the two samples together.
    """

    model: torch.nn.Module
    reference: Reference
    layout: Layout
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    batch_size: int
    autocast_dtype: torch.dtype | None
    copy_dtype: torch.dtype | None
    batch_limit: BatchLimit = field(default_factory=BatchLimit)
    known_way: KnownWay = field(default_factory=KnownWay)
    known_start_way: KnownWay = field(default_factory=KnownWay)

    def settle_sampling(self, prompts: Sequence[TokenIds]) -> None:
        """Measure how both policies sample, with tokens of these prompts, before anything is.

        In the weights' own type, where what differs is no rounding. Raises ConfigError.
        """
        asked = [tuple(p) for p in prompts]
        with showing_adapter(self.model):
            self._sampler_of(self.model, None, self.known_way).settle(asked)
        with self.reference() as model:
            if type(unwrapped(model)) is type(unwrapped(self.model)) and not adds_virtual_tokens(
                self.model
            ):
                self.known_start_way.way = self.known_way.way
            self._sampler_of(model, None, self.known_start_way).settle(asked)

    def logprobs(
        self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]
    ) -> list[tuple[float, ...]]:
        """Per-token log-probabilities of the completions under the current policy, in nats."""
        return self._score(self.model, prompts, completions)

    def start_logprobs(
        self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]
    ) -> list[tuple[float, ...]]:
        """The same under the start policy."""
        with self.reference() as model:
            return self._score(model, prompts, completions)

    def sum_logprobs(
        self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]
    ) -> list[float]:
        """Summed over each completion's tokens, under the current policy, in nats."""
        return [sum(row) for row in self.logprobs(prompts, completions)]

    def start_sum_logprobs(
        self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]
    ) -> list[float]:
        """The same under the start policy."""
        return [sum(row) for row in self.start_logprobs(prompts, completions)]

    def divergence(
        self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]
    ) -> Divergence:
        """How far the current policy is from the start policy at each completion's tokens."""
        return exact_divergence(
            self.model,
            self.reference,
            prompts,
            completions,
            layout=self.layout,
            pad_token_id=self.pad_token_id,
            autocast_dtype=self.autocast_dtype,
        )

    def _score(
        self,
        model: torch.nn.Module,
        prompts: Sequence[TokenIds],
        completions: Sequence[TokenIds],
    ) -> list[tuple[float, ...]]:
        return score_completions(
            model,
            prompts,
            completions,
            layout=self.layout,
            pad_token_id=self.pad_token_id,
            autocast_dtype=self.autocast_dtype,
        )

    def sampler(self) -> Sampler:
        """Draws from the current policy as it is now: a copy does not follow later steps."""
        if self.copy_dtype is not None:
            copied = half_precision_copy(self.model, self.copy_dtype)
            if copied is not None:
                return self._sampler_of(copied, None, self.known_way)
        return self._sampler_of(self.model, self.autocast_dtype, self.known_way)

    def start_sampler(self) -> Sampler:
        """Draws from the start policy.

        A copy of it is made once, here; where there is none, the start policy is opened only while
        it draws, since an adapter must be on for everything else.
        """
        if self.copy_dtype is not None:
            with self.reference() as model:
                copied = half_precision_copy(model, self.copy_dtype)
            if copied is not None:
                return self._sampler_of(copied, None, self.known_start_way)
        return _WhileOpen(self)

    def _sampler_of(
        self, model: torch.nn.Module, dtype: torch.dtype | None, known_way: KnownWay
    ) -> TransformersSampler:
        """The one place that makes a sampler; `dtype` is that of autocast."""
        return TransformersSampler(
            model,
            self.eos_token_ids,
            self.pad_token_id,
            self.batch_size,
            dtype,
            self.batch_limit,
            known_way=known_way,
        )


@dataclass(frozen=True)
class _WhileOpen:
    """Draws from the start policy, opened for every draw."""

    policies: Policies

    @property
    def hands_over(self) -> bool:
        """As the sampler over the current policy, whose device it is."""
        policies = self.policies
        return policies._sampler_of(policies.model, None, policies.known_way).hands_over

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
        finished: Finished | None = None,
    ) -> list[Sample]:
        """One `Sample` a request, in order."""
        with self.policies.reference() as model:
            policies = self.policies
            sampler = policies._sampler_of(model, policies.autocast_dtype, policies.known_start_way)
            return sampler.sample(requests, params, progress=progress, finished=finished)
