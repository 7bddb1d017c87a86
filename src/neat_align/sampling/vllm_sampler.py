"""Sampling from a vLLM server that was started beside the run.

The server keeps many sequences going at once and shares what prompts have in common; here stand
only the requests, a completion each with its own seed. A completion depends on its prompt and seed;
floating-point noise in the logits, which depends on what the server computes at the same time, can
move a draw from one token to another (`draw` has the same limit). The random numbers are vLLM's, so
the tokens are not those of the transformers sampler.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx2

from neat_align.errors import SamplerError, SamplerUnavailableError
from neat_align.network.event_loop import all_of
from neat_align.sampling.policy_now import PolicyNow
from neat_align.sampling.protocol import Finished, Sample, SampleRequest, SamplingParams
from neat_align.sampling.vllm_client import VllmClient
from neat_align.sampling.vllm_weights import VllmWeights


@dataclass(frozen=True)
class VllmSampler:
    """A `Sampler` over one policy that a vLLM server has; it `HandsOver` what has ended.

    `model` is the name under which the server has it; `concurrency` requests are under way at once.
    """

    client: VllmClient
    model: str
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    concurrency: int = 64
    hands_over: bool = True

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
        finished: Finished | None = None,
    ) -> list[Sample]:
        """One `Sample` a request, in order; about once a second what has ended is handed over.

        Raises SamplerError before anything is asked for a request that the server has no room for,
        SamplerUnavailableError once all that has ended was handed over, and CollapseError.
        """
        self._check_lengths(requests, params)
        drawing = _Drawing(self, requests, params)

        def report() -> None:
            places = drawing.take_ended()
            if places and finished is not None:
                finished(places, [drawing.samples[i] for i in places])
            if places and progress is not None:
                progress(len(places))

        if requests:
            try:
                self.client.run(drawing.all, most=self.concurrency, meanwhile=report)
            finally:
                report()
        return [drawing.samples[i] for i in range(len(requests))]

    def _check_lengths(self, requests: Sequence[SampleRequest], params: SamplingParams) -> None:
        needed = max((len(r.prompt_ids) + r.limit(params) for r in requests), default=0)
        if needed > self.max_model_len:
            raise SamplerError(
                f"{self.client.said} takes rows of {self.max_model_len} tokens, and a prompt with "
                f"its completion may have {needed}: start it with --max-model-len {needed} or "
                "more, or lower max_completion_length or max_prompt_length"
            )


@dataclass
class _Drawing:
    """The completions of one call while they are drawn, in the loop's thread."""

    sampler: VllmSampler
    requests: Sequence[SampleRequest]
    params: SamplingParams
    samples: dict[int, Sample] = field(default_factory=dict)
    ended: deque[int] = field(default_factory=deque)

    def take_ended(self) -> list[int]:
        """The places of those that have ended since the last call; from another thread."""
        return [self.ended.popleft() for _ in range(len(self.ended))]

    async def all(self, connections: httpx2.AsyncClient) -> None:
        slots = asyncio.Semaphore(self.sampler.concurrency)
        try:
            await all_of(self._one(i, slots, connections) for i in range(len(self.requests)))
        except SamplerUnavailableError as failure:
            raise SamplerUnavailableError(
                f"{failure}; {len(self.samples)} of the {len(self.requests)} completions that were "
                "asked for had ended. See that it runs, and start the run again"
            ) from failure

    async def _one(self, i: int, slots: asyncio.Semaphore, connections: httpx2.AsyncClient) -> None:
        async with slots:  # also while it pauses: a busy server is asked less
            sampler = self.sampler
            self.samples[i] = await sampler.client.completion(
                connections,
                sampler.model,
                self.requests[i],
                self.params,
                sampler.eos_token_ids,
            )
            self.ended.append(i)


@dataclass(frozen=True)
class VllmEngine:
    """Samplers of one vLLM server: a `MakeSampler` that first gives it the policy's weights."""

    client: VllmClient
    weights: VllmWeights
    concurrency: int

    def __call__(self, policy: PolicyNow) -> VllmSampler:
        """A sampler of the policy as it is now."""
        name, served = self.weights.serve(policy), self.client.model()
        return VllmSampler(
            self.client, name, policy.eos_token_ids, served.max_model_len, self.concurrency
        )
