"""The policy that learns and the policy it started from, scored and sampled in one way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from neat_align.modeling.kl import Divergence, exact_divergence
from neat_align.modeling.lockstep import is_sharded, lockstep
from neat_align.modeling.logprobs import score_completions
from neat_align.modeling.packing import Layout, TokenIds
from neat_align.modeling.precision import half_precision_copy
from neat_align.modeling.reference import Reference, not_kept
from neat_align.modeling.self_check import showing_adapter
from neat_align.modeling.shared_prefix import adds_virtual_tokens, unwrapped
from neat_align.sampling.batch_check import KnownWay, SamplingWay
from neat_align.sampling.checked_sampler import CheckedSampler
from neat_align.sampling.policy_now import MakeSampler, PolicyNow
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

    With `make_sampler` another engine samples, and nothing of the above about sampling is read: it
    is asked for a sampler of either policy as it is now, and its samples' log-probabilities have to
    agree with the trainer's, up to `tolerance` (`checked_sampler`).
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
    make_sampler: MakeSampler | None = None
    tolerance: float = 0.0
    _tried_on: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def keeps_start(self) -> bool:
        """Whether the start policy can be opened after the first step."""
        return self.reference is not not_kept

    def settle_sampling(
        self, prompts: Sequence[TokenIds]
    ) -> tuple[SamplingWay | None, SamplingWay | None]:
        """Measure how both policies sample, with tokens of these prompts, before anything is.

        Gives what was found of the policy and of the start policy. In the weights' own type, where
        what differs is no rounding. Raises ConfigError. Another engine's samplers are tried on the
        first of these prompts when they are made.
        """
        asked = [tuple(p) for p in prompts]
        if self.make_sampler is not None:
            self._tried_on[:] = asked[:1]
            return None, None
        with showing_adapter(self.model):
            self._sampler_of(self.model, None, self.known_way).settle(asked)
        if not self.keeps_start:
            return self.known_way.way, None
        with self.reference() as model:
            if type(unwrapped(model)) is type(unwrapped(self.model)) and not adds_virtual_tokens(
                self.model
            ):
                self.known_start_way.way = self.known_way.way
            self._sampler_of(model, None, self.known_start_way).settle(asked)
        return self.known_way.way, self.known_start_way.way

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """While open, ranks that share the weights of the policies make the same passes.

        See `lockstep`; every rank opens it, and does its share of the work in it.
        """
        stepped = lockstep(self.model)
        if self.keeps_start:
            with self.reference() as start:
                stepped = lockstep(self.model, start)
        with stepped:
            yield

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
        """Draws from the current policy as it is now: a copy does not follow later steps.

        Weights that ranks share are not copied. Raises SamplerError where another engine does not
        draw from this policy.
        """
        if self.make_sampler is not None:
            return self._made(self.make_sampler)
        if self.copy_dtype is not None and not is_sharded(self.model):
            copied = half_precision_copy(self.model, self.copy_dtype)
            if copied is not None:
                return self._sampler_of(copied, None, self.known_way)
        return self._sampler_of(self.model, self.autocast_dtype, self.known_way)

    def start_sampler(self) -> Sampler:
        """Draws from the start policy.

        A copy of it is made once, here; where there is none, the start policy is opened only while
        it draws, since an adapter must be on for everything else. Raises as `sampler`.
        """
        if self.make_sampler is not None:
            return self._made_of_start(self.make_sampler)
        if self.copy_dtype is not None and not is_sharded(self.model):
            with self.reference() as model:
                copied = half_precision_copy(model, self.copy_dtype)
            if copied is not None:
                return self._sampler_of(copied, None, self.known_start_way)
        return _WhileOpen(self)

    def _made(self, make: MakeSampler) -> Sampler:
        """Another engine's sampler of the current policy, tried."""
        policy = PolicyNow(self.model, "current", False, self.eos_token_ids, self.logprobs)
        with self.in_step():
            return self._tried(make(policy), policy)

    def _made_of_start(self, make: MakeSampler) -> Sampler:
        """The same of the start policy, whose scores open it anew."""
        with self.in_step():
            with self.reference() as model:
                is_off = model is self.model
                policy = PolicyNow(model, "start", is_off, self.eos_token_ids, self.start_logprobs)
                made = make(policy)
            return self._tried(made, policy)

    def _tried(self, made: Sampler, policy: PolicyNow) -> Sampler:
        checked = CheckedSampler(made, policy, self.tolerance)
        for prompt in self._tried_on:
            checked.try_on(prompt)
        return checked

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
