"""A request with a limit of its own: the beginning of what it would have had without."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from transformers import MambaConfig, PreTrainedModel

from neat_align.sampling import transformers_sampler
from neat_align.sampling.batch_check import KnownWay, SamplingWay
from neat_align.sampling.contrast_decoding import Contrast
from neat_align.sampling.contrast_sampler import ContrastSampler
from neat_align.sampling.protocol import SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from tiny import MAX_POSITIONS, Family, alone, random_model, tiny_model

VOCAB = 384
ENDS = tuple(range(100, 116))
PARAMS = SamplingParams(max_new_tokens=17, temperature=1.2)
LIMITS = (1, 2, 5, 8, 9, 16, 17, 40, None)


def asked(limits: tuple[int | None, ...] = LIMITS) -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (len(limits),), generator=generator).tolist()
    return [
        SampleRequest(
            tuple(torch.randint(VOCAB, (k,), generator=generator).tolist()), 2**40 + i, limit
        )
        for i, (k, limit) in enumerate(zip(lengths, limits, strict=True))
    ]


def model_of(name: str) -> PreTrainedModel:
    if name == "mamba":
        return random_model(
            MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
        )
    family: Family = "gpt2" if name == "gpt2" else "llama"
    return tiny_model(family, VOCAB)


WAYS: tuple[SamplingWay, ...] = get_args(SamplingWay)


@pytest.mark.parametrize(
    ("name", "way", "batch_size", "look_every"),
    [
        *(("llama", "together", size, every) for size in (3, 64) for every in (1, 8)),
        *(("llama", way, 3, 8) for way in WAYS if way != "together"),
        ("gpt2", "together", 64, 8),
        ("mamba", "together", 64, 8),
    ],
)
def test_a_limit_cuts_a_completion_and_changes_nothing_else(
    name: str, way: SamplingWay, batch_size: int, look_every: int
) -> None:
    model = model_of(name)
    sampler = TransformersSampler(
        model, ENDS, 0, batch_size, look_every=look_every, known_way=KnownWay(way)
    )
    limited = asked()
    whole = sampler.sample([replace(r, max_new_tokens=None) for r in limited], PARAMS)
    lengths = [len(s.token_ids) for s in whole]
    assert min(lengths) < max(lengths) == 17
    for request, cut, uncut in zip(limited, sampler.sample(limited, PARAMS), whole, strict=True):
        limit = request.limit(PARAMS)
        assert limit == min(request.max_new_tokens or 17, 17)
        assert cut.token_ids == uncut.token_ids[:limit]
        stopped = uncut.finish_reason == "stop" and len(uncut.token_ids) <= limit
        assert cut.finish_reason == ("stop" if stopped else "length")
        expected = sum(alone(model.eval(), request.prompt_ids, cut.token_ids))
        assert cut.logprob == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("way", "saved"), [("together", 0), ("whole", 3)])
def test_nobody_is_carried_past_a_limit_that_all_have(way: SamplingWay, saved: int) -> None:
    """Not one pass more than where the longest of them is the longest that is allowed.

    Without a cache each completion goes through the model alone, so that the shorter save theirs.
    """
    model, passes = tiny_model("llama", VOCAB), list[int]()
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    known = KnownWay(way, attention="neat_decode")  # so that no passes compare it
    sampler = TransformersSampler(model, (VOCAB + 1,), 0, 64, known_way=known)
    counts = []
    for limits, most in (((None,) * 3, 4), ((3, 4, 2), 100)):
        passes.clear()
        drawn = sampler.sample(asked(limits), replace(PARAMS, max_new_tokens=most))
        assert [len(s.token_ids) for s in drawn] == [limit or 4 for limit in limits]
        counts.append(len(passes))
    assert counts[0] - counts[1] == saved


# ---- nobody is read past the model's context -----------------------------------------------------

LONG = SampleRequest(tuple(i % 90 for i in range(MAX_POSITIONS - 2)), 7, 2)
BESIDE = [SampleRequest(tuple(range(i, i + 20)), i) for i in range(12)]


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("cached", [True, False], ids=["decode", "generate"])
def test_a_row_at_its_limit_is_not_read_past_the_context(
    monkeypatch: pytest.MonkeyPatch, cached: bool, every: int
) -> None:
    """Two tokens fill the model's 512 positions beside answers that have twenty."""
    if not cached:
        monkeypatch.setattr(transformers_sampler, "keeps_keys", lambda _: False)
    sampler = TransformersSampler(
        tiny_model("gpt2", VOCAB).eval(),
        (VOCAB + 1,),
        0,
        look_every=every,
        known_way=KnownWay("together"),
    )
    params = replace(PARAMS, max_new_tokens=20)
    requests = [*BESIDE[:5], LONG, *BESIDE[5:], replace(LONG, seed=8, max_new_tokens=1)]
    drawn = sampler.sample(requests, params)
    assert [len(s.token_ids) for s in drawn] == [20] * 5 + [2] + [20] * 7 + [1]
    for request, sample in zip(requests, drawn, strict=True):
        (single,) = sampler.sample([request], params)
        assert sample.token_ids == single.token_ids
        assert sample.logprob == pytest.approx(single.logprob, abs=1e-4)


def test_nor_is_one_that_is_drawn_from_a_contrast() -> None:
    sampler = TransformersSampler(
        tiny_model("gpt2", VOCAB).eval(), (VOCAB + 1,), 0, known_way=KnownWay("together")
    )
    requests = [*BESIDE, LONG]
    pairs = {r.prompt_ids: ((r.prompt_ids, r.prompt_ids[::-1]),) for r in requests}
    drawn = ContrastSampler(sampler, pairs, Contrast(0.5)).sample(
        requests, replace(PARAMS, max_new_tokens=20)
    )
    assert [len(s.token_ids) for s in drawn] == [20] * 12 + [2]
