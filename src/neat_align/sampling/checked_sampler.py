"""A sampler of another engine, whose samples are checked against the trainer's own model.

Weights that did not arrive, a model that is not the one that trains, log-probabilities of the
tempered distribution: an engine with any of these gives plausible text. So one completion of
all that are given or handed over together is scored by the trainer too, and the two
log-probabilities have to agree. Where nobody takes what is handed over these are scored in one go
at the end: a pass of a model that ranks share waits for all of them.

Rounding makes them differ by an amount a token that goes either way, so that their sums differ by
one that grows with the square root of the tokens; other weights make them differ by one that grows
with the tokens. So the difference is allowed to be `tolerance` times the square root.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from neat_align.errors import CollapseError, SamplerError
from neat_align.sampling.policy_now import PolicyNow
from neat_align.sampling.protocol import (
    Finished,
    Sample,
    Sampler,
    SampleRequest,
    SamplingParams,
    handing_over,
)

# Completions of fewer tokens are compared only where there is no longer one.
ENOUGH_TOKENS = 32
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class CheckedSampler:
    """A `Sampler` that hands on what another one draws, once it was checked.

    `tolerance` times the square root of its tokens is the largest difference between the sampler's
    and the trainer's log-probability of a completion, in nats. Raises SamplerError for what is no
    sample of the policy.
    """

    sampler: Sampler
    policy: PolicyNow
    tolerance: float

    @property
    def hands_over(self) -> bool:
        """Whether the other one does."""
        return handing_over(self.sampler) is not None

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
        finished: Finished | None = None,
    ) -> list[Sample]:
        """One `Sample` a request, in order; what is handed over is checked first."""
        if not requests:
            return []
        checked, to_compare = set[int](), list[int]()

        def check(places: Sequence[int], ended: Sequence[Sample]) -> None:
            given = dict(zip(places, ended, strict=True))
            self._check_forms(given, requests, params)
            checked.update(places)
            if finished is None:
                to_compare.append(_compared(given, requests))
            else:
                self._compare(given, [_compared(given, requests)], requests, params)
                finished(places, ended)

        other = handing_over(self.sampler)
        if other is not None:
            samples = other.sample(requests, params, progress=progress, finished=check)
        else:
            samples = self.sampler.sample(requests, params, progress=progress)
        if len(samples) != len(requests):
            raise SamplerError(
                f"the sampler gave {len(samples)} samples for {len(requests)} requests: it has to "
                "give one a request, in order"
            )
        given = dict(enumerate(samples))
        rest = {i: sample for i, sample in given.items() if i not in checked}
        self._check_forms(rest, requests, params)
        if rest:
            to_compare.append(_compared(rest, requests))
        self._compare(given, to_compare, requests, params)
        return samples

    def try_on(self, prompt: tuple[int, ...]) -> None:
        """Draw two short completions of a prompt, and compare their log-probabilities.

        One token at a time is likeliest, which shows log-probabilities of the distribution that
        top-k, top-p and temperature have shaped: they would be 0.
        """
        for params in (
            SamplingParams(_PROBE_TOKENS, top_k=1),
            SamplingParams(_PROBE_TOKENS),
        ):
            self.sample([SampleRequest(prompt, seed=0)], params)

    def _check_forms(
        self,
        samples: Mapping[int, Sample],
        requests: Sequence[SampleRequest],
        params: SamplingParams,
    ) -> None:
        for i, sample in samples.items():
            self._check_form(sample, requests[i].limit(params))

    def _check_form(self, sample: Sample, limit: int) -> None:
        tokens, ends = sample.token_ids, self.policy.eos_token_ids
        if math.isnan(sample.logprob) or math.isinf(sample.logprob):
            raise CollapseError(
                "the sampler's log-probability of a completion is not finite: the weights or the "
                "number type are broken"
            )
        wrong = None
        if not tokens or len(tokens) > limit:
            wrong = f"has {len(tokens)} tokens, and 1 to {limit} were asked for"
        elif any(token in ends for token in tokens[:-1]):
            wrong = f"goes on after an end-of-turn token (one of {list(ends)})"
        elif sample.finish_reason == "stop" and tokens[-1] not in ends:
            wrong = (
                f"stopped at token {tokens[-1]}, which is not one of the end-of-turn tokens "
                f"{list(ends)}: the engine has stop tokens of its own; leave them out (of vLLM: "
                "--generation-config vllm)"
            )
        elif sample.finish_reason == "length" and (len(tokens) < limit or tokens[-1] in ends):
            wrong = (
                f'has {len(tokens)} tokens of {limit}, the last one {tokens[-1]}, and says "length"'
            )
        if wrong is not None:
            raise SamplerError(f"a completion of the sampler {wrong}")

    def _compare(
        self,
        samples: Mapping[int, Sample],
        places: Sequence[int],
        requests: Sequence[SampleRequest],
        params: SamplingParams,
    ) -> None:
        """Score the samples at these places, and refuse the first that is too far off."""
        if not places:
            return
        prompts = [requests[i].prompt_ids for i in places]
        scores = self.policy.score(prompts, [samples[i].token_ids for i in places])
        for i, score in zip(places, scores, strict=True):
            self._check_number(samples[i], sum(score), params)

    def _check_number(self, sample: Sample, own: float, params: SamplingParams) -> None:
        tokens = len(sample.token_ids)
        gap, allowed = abs(own - sample.logprob), self.tolerance * math.sqrt(tokens)
        if gap <= allowed:
            return
        shaped = (params.temperature, params.top_p, params.top_k) != (1.0, 1.0, 0)
        hint = (
            "it serves other weights than the trainer's: another base model, weights that did not "
            "arrive, or those of another run that uses the same server. Start the run again, "
            "which gives it the weights again"
        )
        if shaped and sample.logprob > own:
            hint += (
                "; or its log-probabilities are those of the tempered distribution, and the "
                "untempered policy's are needed (of vLLM: --logprobs-mode raw_logprobs)"
            )
        raise SamplerError(
            f"the sampler says that a completion of {tokens} tokens has log-probability "
            f"{sample.logprob:.4f}, and the trainer says {own:.4f}: {gap:.4f} nats apart, where "
            f"sampler_tolerance {self.tolerance:g} allows {allowed:.4f}. Nothing of this batch is "
            f"kept. Either {hint}; or its number type is a coarser one (raise sampler_tolerance)"
        )


def _compared(samples: Mapping[int, Sample], requests: Sequence[SampleRequest]) -> int:
    """The place of the completion that the trainer scores: the shortest row that says enough."""
    enough = min(ENOUGH_TOKENS, max(len(s.token_ids) for s in samples.values()))
    long = (i for i, s in samples.items() if len(s.token_ids) >= enough)
    return min(long, key=lambda i: len(requests[i].prompt_ids) + len(samples[i].token_ids))
