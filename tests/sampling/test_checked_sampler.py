"""What another engine gives is checked against the trainer's own model, and said in its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from neat_align.errors import NEATError, SamplerError, SamplerUnavailableError
from neat_align.modeling.logprobs import score_completions
from neat_align.sampling.checked_sampler import CheckedSampler
from neat_align.sampling.policy_now import PolicyNow
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from tiny import tiny_model

EOS = (2, 7)
MODEL = tiny_model("llama", 64).eval()
ASKED = [
    SampleRequest((5, 6, 9, 3)[: 1 + i % 4], seed, 8 if i else None)
    for i, seed in enumerate(range(11, 17))
]
PARAMS = SamplingParams(8)


def score(prompts: Any, completions: Any) -> list[tuple[float, ...]]:
    return score_completions(
        MODEL, prompts, completions, layout="padded", pad_token_id=0, autocast_dtype=None
    )


POLICY = PolicyNow(MODEL, "current", False, EOS, score)


@dataclass
class Changing:
    """Draws rightly, and changes what it gives."""

    change: Callable[[list[Sample]], list[Sample]]

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, progress: Any = None
    ) -> list[Sample]:
        right = TransformersSampler(MODEL, EOS, 0)
        return self.change(right.sample(requests, params, progress=progress))


def each(change: Callable[[Sample], Sample]) -> Changing:
    return Changing(lambda samples: [change(s) for s in samples])


def test_what_is_right_passes_as_it_is() -> None:
    given = TransformersSampler(MODEL, EOS, 0).sample(ASKED, PARAMS)
    checked = CheckedSampler(each(lambda s: s), POLICY, 1e-4)
    assert checked.sample(ASKED, PARAMS) == given
    assert checked.sample([], PARAMS) == []
    checked.try_on((5, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, logprob=float("nan")), "not finite"),
        (lambda s: replace(s, logprob=float("-inf")), "not finite"),
        (lambda s: replace(s, token_ids=(9,), finish_reason="length"), 'says "length"'),
        (lambda s: replace(s, token_ids=(9,) * 7 + (2,), finish_reason="length"), 'says "length"'),
        (lambda s: replace(s, token_ids=(9,) * 9), "1 to 8 were asked for"),
        (lambda s: replace(s, token_ids=()), "has 0 tokens, and 1 to 8"),
        (
            lambda s: replace(s, token_ids=(9,) * 8, finish_reason="stop"),
            "at token 9, which",
        ),
        (lambda s: replace(s, token_ids=(9, 7) + (9,) * 6), "goes on after an end-of-turn"),
    ],
)
def test_the_form_of_a_sample(change: Callable[[Sample], Sample], message: str) -> None:
    with pytest.raises(NEATError, match=message):
        CheckedSampler(each(change), POLICY, 1e9).sample(ASKED, PARAMS)


@pytest.mark.parametrize("count", [0, 5, 7])
def test_one_sample_a_request(count: int) -> None:
    lost = Changing(lambda samples: (samples * 2)[:count])
    with pytest.raises(SamplerError, match=f"{count} samples for 6 requests"):
        CheckedSampler(lost, POLICY, 1.0).sample(ASKED, PARAMS)


@pytest.mark.parametrize("tokens", [1, 4])
def test_both_log_probabilities_are_said(tokens: int) -> None:
    """Rounding errors of a sum of n tokens grow with the root of n, so they may be as large."""
    asked = [replace(ASKED[0], max_new_tokens=tokens)]
    (right,) = TransformersSampler(MODEL, (), 0).sample(asked, PARAMS)
    endless = replace(POLICY, eos_token_ids=())
    root = tokens**0.5
    off = Changing(lambda _: [replace(right, logprob=right.logprob - 0.3 * root)])
    CheckedSampler(off, endless, 0.301).sample(asked, PARAMS)
    with pytest.raises(SamplerError, match="nats apart") as caught:
        CheckedSampler(off, endless, 0.299).sample(asked, PARAMS)
    own = sum(score([asked[0].prompt_ids], [right.token_ids])[0])
    for number in (own, own - 0.3 * root, 0.3 * root, 0.299 * root):
        assert f"{number:.4f}" in str(caught.value)


def test_tempered_log_probabilities_are_named() -> None:
    """With top_k 1 they are 0, whatever the policy says of the token."""
    tempered = each(lambda s: replace(s, logprob=0.0))
    with pytest.raises(SamplerError, match="--logprobs-mode raw_logprobs"):
        CheckedSampler(tempered, POLICY, 0.1).try_on((5, 6))


def test_one_bad_sample_hides_behind_no_good_one() -> None:
    """Their form is looked at in all of them; their number in one that has enough tokens."""

    def last_is_cut(samples: list[Sample]) -> list[Sample]:
        return [*samples[:-1], replace(samples[-1], token_ids=())]

    with pytest.raises(SamplerError, match="has 0 tokens"):
        CheckedSampler(Changing(last_is_cut), POLICY, 1e9).sample(ASKED, PARAMS)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_what_is_handed_over_is_checked_first(shift: float) -> None:
    given = TransformersSampler(MODEL, EOS, 0).sample(ASKED, PARAMS)

    kept = dict[int, Sample]()

    class Dies:
        hands_over = True

        def sample(self, *_: Any, finished: Any, **__: Any) -> list[Sample]:
            moved = [replace(s, logprob=s.logprob - shift * len(s.token_ids)) for s in given]
            finished([1, 4], [given[1], given[4]])
            finished([2], [moved[2]])
            raise SamplerUnavailableError("gone")

    sampler = CheckedSampler(Dies(), POLICY, 0.1)
    assert sampler.hands_over
    kind = SamplerError if shift else SamplerUnavailableError
    with pytest.raises(kind, match="apart" if shift else "gone"):
        sampler.sample(ASKED, PARAMS, finished=lambda p, s: kept.update(zip(p, s, strict=True)))
    assert kept == {i: given[i] for i in ((1, 4) if shift else (1, 4, 2))}


@pytest.mark.parametrize("shifted", [None, 1, 2, 5])
def test_where_nobody_takes_them_all_are_scored_in_one_go(shifted: int | None) -> None:
    """A pass of a model that ranks share waits for all of them: one a call, at its end."""
    given = TransformersSampler(MODEL, (), 0).sample(ASKED, PARAMS)
    if shifted is not None:
        given[shifted] = replace(given[shifted], logprob=given[shifted].logprob - 9.0)
    scored = list[list[tuple[int, ...]]]()

    class InParts:
        hands_over = True

        def sample(self, *_: Any, finished: Any, **__: Any) -> list[Sample]:
            for places in ([1], [2], [3, 4, 0]):
                finished(places, [given[i] for i in places])
            assert not scored
            return given  # the last was not handed over

    def score(prompts: Any, completions: Any) -> list[tuple[float, ...]]:
        scored.append([tuple(c) for c in completions])
        return globals()["score"](prompts, completions)

    policy = replace(POLICY, eos_token_ids=(), score=score)
    checked = CheckedSampler(InParts(), policy, 0.1)
    if shifted is None:
        assert checked.sample(ASKED, PARAMS) == given
    else:
        with pytest.raises(SamplerError, match="apart"):
            checked.sample(ASKED, PARAMS)
    assert scored == [[given[i].token_ids for i in (1, 2, 4, 5)]]


def test_a_plain_sampler_hands_nothing_over() -> None:
    assert not CheckedSampler(each(lambda s: s), POLICY, 1.0).hands_over
