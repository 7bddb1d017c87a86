"""Places that are filled again when completions end: the same completions, in fewer passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CohereConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from host_syncs import HostSyncs
from neat_align import CollapseError
from neat_align.sampling import transformers_sampler
from neat_align.sampling.batch_check import KnownWay
from neat_align.sampling.contrast_decoding import Contrast
from neat_align.sampling.contrast_sampler import ContrastSampler
from neat_align.sampling.drawing import SHRINK_AT, SPLIT_AT, Waiting
from neat_align.sampling.protocol import HandsOver, Sample, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import BatchLimit, TransformersSampler
from odd_models import PAD, SIZES, VOCAB, WINDOWED
from tiny import alone, random_model, tiny_model

# Six of 48 tokens end an answer: about one answer in eight at every token.
ENDS = (2, 3, 5, 7, 11, 13)
PARAMS = SamplingParams(max_new_tokens=18, temperature=1.2)
GROUPED = {**SIZES, "num_key_value_heads": 2}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_model("llama", VOCAB),
    "gpt2": lambda: tiny_model("gpt2", VOCAB),
    "qwen2": lambda: tiny_model("qwen2", VOCAB),
    **WINDOWED,
    "gpt_neox": lambda: random_model(GPTNeoXConfig(**SIZES)),
    "cohere": lambda: random_model(CohereConfig(**GROUPED)),
    "phi3": lambda: random_model(Phi3Config(**GROUPED)),
    "qwen3_moe": lambda: random_model(
        Qwen3MoeConfig(
            **GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        )
    ),
    "gpt_oss, windows and sinks": lambda: random_model(
        GptOssConfig(
            **{**GROUPED, "intermediate_size": 32},
            head_dim=8,
            sliding_window=6,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    ),
    "llama4, chunks": lambda: random_model(
        Llama4TextConfig(
            **GROUPED,
            intermediate_size_mlp=32,
            head_dim=8,
            attention_chunk_size=6,
            num_local_experts=2,
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 1],
        )
    ),
}
# What their caches keep is what llama's keep.
ALIKE = ("qwen2", "cohere", "phi3", "qwen3_moe")


def sampler(model: torch.nn.Module, batch_size: int, **changes: Any) -> TransformersSampler:
    settings: dict[str, Any] = {
        "eos_token_ids": ENDS,
        "pad_token_id": PAD,
        # Known, so that no passes compare it.
        "known_way": KnownWay("together", attention="neat_decode"),
    }
    return TransformersSampler(model, batch_size=batch_size, **{**settings, **changes})


def asked(n: int, *, each: int = 1, limits: Sequence[int | None] = (None,)) -> list[SampleRequest]:
    """`each` requests of every one of n prompts of 1 to 20 tokens, pad and ends among them."""
    generator = torch.Generator().manual_seed(n)
    lengths = torch.randint(1, 21, (n,), generator=generator).tolist()
    prompts = [tuple(torch.randint(VOCAB, (k,), generator=generator).tolist()) for k in lengths]
    return [
        SampleRequest(prompt, 2**40 + each * i + j, limits[(each * i + j) % len(limits)])
        for i, prompt in enumerate(prompts)
        for j in range(each)
    ]


def same(a: list[Sample], b: list[Sample]) -> None:
    assert [(s.token_ids, s.finish_reason) for s in a] == [
        (s.token_ids, s.finish_reason) for s in b
    ]
    assert [s.logprob for s in a] == pytest.approx([s.logprob for s in b], abs=1e-4)


class Passes:
    """While open, what goes through a model: rows, new tokens, and columns of its cache before."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen: list[tuple[int, int, int]] = []
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _: torch.nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        # What was drawn is scored without a cache when it is measured how a model samples.
        if "past_key_values" in inputs:
            cache = inputs["past_key_values"]
            self.seen.append((*inputs["input_ids"].shape, cache.get_seq_length()))

    @property
    def prompts(self) -> list[int]:
        """Rows of each pass that reads prompts."""
        return [rows for rows, _, before in self.seen if before == 0]

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """Rows and columns of each pass that reads on."""
        return [(rows, before) for rows, _, before in self.seen if before]

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


# ---- no completion changes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in MODELS],
)
def test_a_completion_is_the_one_that_it_is_alone(name: str) -> None:
    """Whoever had its place before, beside whomever, with prompts shorter and longer than what is
    there, and windows that are full, empty and just filled.
    """
    model = MODELS[name]()
    requests = asked(15, limits=(None, None, 3, None, 1))
    known = {"known_way": KnownWay("together")}
    own = [sampler(model, 1, **known).sample([r], PARAMS)[0] for r in requests]
    lengths = [len(s.token_ids) for s in own]
    assert min(lengths) == 1
    assert max(lengths) > 8
    same(sampler(model, 2, **known).sample(requests, PARAMS), own)
    with Passes(model) as passes:
        same(sampler(model, 5, look_every=8, **known).sample(requests, PARAMS), own)
    assert len(passes.prompts) > 3  # else there was nothing to compare: batches read them 3 times
    for request, s in zip(requests, own, strict=True):
        scored = alone(model.eval(), request.prompt_ids, s.token_ids)
        assert s.logprob == pytest.approx(sum(scored), abs=1e-3)
    drawing = sampler(model, 5, known_way=KnownWay())
    assert drawing.settle([r.prompt_ids for r in requests]) == "together"


def test_what_joins_is_among_what_is_measured_before_the_first_draw() -> None:
    model = tiny_model("llama", VOCAB)
    with Passes(model) as passes:
        known = KnownWay(attention="neat_decode")
        sampler(model, 64, known_way=known).settle([(4, 5, 6)])
    joins = [i for i, (_, new, before) in enumerate(passes.seen) if (new, before) == (2, 0)]
    assert joins
    assert passes.seen[joins[0] + 1][0] == 3  # beside the two that are still on their way


def test_a_model_that_computes_something_else_beside_newcomers_gets_one_length(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A row whose padding is more than the prompts of a batch could have had."""
    model = tiny_model("llama", VOCAB)

    def minds(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        if mask is not None and bool((mask.shape[1] - mask.sum(-1) > 10).any()):
            inputs["position_ids"] += 3 * (mask.shape[1] - mask.sum(-1) > 10)[:, None]
            inputs["attention_mask"] = torch.ones_like(mask)

    model.register_forward_pre_hook(minds, with_kwargs=True)
    way = sampler(model, 64, known_way=KnownWay()).settle([(4, 5, 6, 9, 14)])
    assert way == "one_length"
    assert "only prompts of equal length are sampled together" in caplog.text


def test_in_half_precision_too_a_completion_is_scored_as_alone() -> None:
    model = tiny_model("llama", VOCAB).to(torch.bfloat16)
    requests = asked(30)
    for request, s in zip(requests, sampler(model, 6).sample(requests, PARAMS), strict=True):
        scored = sum(alone(model.eval(), request.prompt_ids, s.token_ids))
        assert s.logprob == pytest.approx(scored, abs=0.05 * len(s.token_ids) + 0.05)


# ---- passes and memory ---------------------------------------------------------------------------


def batched_passes(lengths: Sequence[int], places: int) -> int:
    """Passes that read on if each batch waits for its longest."""
    batches = [lengths[i : i + places] for i in range(0, len(lengths), places)]
    return sum(max(batch) - 1 for batch in batches)


@pytest.mark.parametrize("every", [1, 8])
def test_fewer_passes_than_when_every_batch_waits_for_its_longest(every: int) -> None:
    model = tiny_model("llama", VOCAB)
    requests = asked(128)
    params = replace(PARAMS, max_new_tokens=48)
    with Passes(model) as passes:
        drawn = sampler(model, 16, look_every=every).sample(requests, params)
    lengths = [len(s.token_ids) for s in drawn]
    assert max(lengths) > 30 > 12 > sum(lengths) / 128  # a long tail
    assert len(passes.tokens) < 0.6 * batched_passes(lengths, 16)
    # Places are not filled one by one: prompts are read in passes of at least an eighth.
    assert min(passes.prompts[:-1]) >= SHRINK_AT * 16


def test_nobody_waits_where_all_have_one_length() -> None:
    """Nothing is lost to the batches that there were before."""
    model = tiny_model("llama", VOCAB)
    with Passes(model) as passes:
        sampler(model, 8, eos_token_ids=()).sample(asked(24), replace(PARAMS, max_new_tokens=9))
    assert passes.prompts == [8, 8, 8]
    assert [rows for rows, _ in passes.tokens] == [8] * 24


def test_the_cache_holds_no_more_rows_than_places_and_no_column_that_nobody_needs() -> None:
    model = tiny_model("llama", VOCAB)
    requests = sorted(asked(60), key=lambda r: -len(r.prompt_ids))
    with Passes(model) as passes:
        drawn = sampler(model, 6).sample(requests, PARAMS)
    longest = max(len(r.prompt_ids) for r in requests) + max(len(s.token_ids) for s in drawn)
    assert max(rows for rows, _, _ in passes.seen) <= 6
    assert len(passes.tokens) > 2 * longest  # were columns kept, so wide would the cache be
    assert max(columns for _, columns in passes.tokens) <= longest
    widths = [columns for _, columns in passes.tokens]
    assert sum(after <= before for before, after in pairwise(widths)) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_that_nobody_joins_has_the_columns_that_it_began_with(dtype: torch.dtype) -> None:
    """How many there are decides how sums are rounded: old seeds keep their completions."""
    model = tiny_model("llama", VOCAB).to(dtype)
    with Passes(model) as passes:
        sampler(model, 30).sample(asked(30), PARAMS)
    start = max(len(r.prompt_ids) for r in asked(30))
    assert [columns for _, columns in passes.tokens] == [
        start + step for step in range(len(passes.tokens))
    ]


def test_on_a_cpu_no_call_of_a_round_is_interrupted() -> None:
    """The rest of it would be rounded otherwise, and an interrupted run goes on to the bit."""
    assert not sampler(tiny_model("llama", VOCAB), 4).hands_over
    with torch.device("meta"):
        elsewhere = tiny_model("llama", VOCAB)
    assert sampler(elsewhere.to("meta"), 4).hands_over


def test_windows_stay_as_narrow_as_they_are() -> None:
    model = WINDOWED["mistral, a short window"]()
    stored: list[int] = []

    def see(_: Any, __: Any, output: Any) -> None:
        stored.extend(layer.keys.shape[2] for layer in output.past_key_values.layers)

    model.register_forward_hook(see)
    sampler(model, 4).sample(asked(20), PARAMS)
    assert max(stored) == 6 - 1


def test_completions_of_one_prompt_come_together_and_it_is_read_once() -> None:
    model = tiny_model("llama", VOCAB)
    with Passes(model) as passes:
        drawn = sampler(model, 16).sample(asked(40, each=4), PARAMS)
    assert len({s.token_ids for s in drawn}) > 100
    assert sum(passes.prompts) == 40


def test_more_completions_of_a_prompt_than_places_are_not_waited_for() -> None:
    model = tiny_model("llama", VOCAB)
    with Passes(model) as passes:
        drawn = sampler(model, 8).sample(asked(2, each=40), PARAMS)
    steps = sum(len(s.token_ids) for s in drawn)
    assert len(passes.tokens) < 1.6 * steps / 8
    same(drawn, sampler(model, 80).sample(asked(2, each=40), PARAMS))


# ---- who comes in --------------------------------------------------------------------------------


def waiting(prompts: str, places: int) -> Waiting:
    """One request a letter; equal letters are one prompt."""
    return Waiting([SampleRequest((ord(p),), i) for i, p in enumerate(prompts)], places)


def test_places_wait_until_an_eighth_is_free_and_a_prompt_until_all_of_it_fits() -> None:
    queue = waiting("aaaaaaaaaaaaaaaa" + "bbcccdddddddd", 16)
    assert queue.take(16) == list(range(16))
    assert queue.take(1) == []  # a sixteenth
    assert queue.take(2) == [16, 17]  # both b
    assert queue.take(2) == []  # three c
    assert queue.take(3) == [18, 19, 20]
    assert queue.take(3) == []  # eight d,
    assert queue.take(4) == [21, 22, 23, 24]  # of which some come where a quarter is free
    assert queue.take(16) == [25, 26, 27, 28]
    assert queue.take(16) == []


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 20), st.lists(st.integers(1, 20)))
def test_everybody_comes_once_in_order_into_places_that_are_free(
    groups: list[int], places: int, frees: list[int]
) -> None:
    queue = waiting("".join(chr(97 + i) * n for i, n in enumerate(groups)), places)
    came: list[int] = []
    for free in [*(min(f, places) for f in frees), *[places] * (sum(groups) + 1)]:
        taken = queue.take(free)
        assert len(taken) <= free
        assert not taken or len(taken) == places or free >= SHRINK_AT * places
        if len(came) < sum(groups) and free >= max(SPLIT_AT, SHRINK_AT) * places:
            assert taken  # nobody waits for ever
        came += taken
    assert came == list(range(sum(groups)))


# ---- handing over --------------------------------------------------------------------------------


def test_every_completion_is_handed_over_once_as_soon_as_it_leaves() -> None:
    model = tiny_model("llama", VOCAB)
    drawing, requests = sampler(model, 8), asked(50)
    assert isinstance(drawing, HandsOver)
    heard: dict[int, Sample] = {}
    said: list[str] = []

    def finished(places: Sequence[int], samples: Sequence[Sample]) -> None:
        assert not heard.keys() & set(places)
        heard.update(zip(places, samples, strict=True))
        said.append(f"finished {len(places)}")

    with Passes(model) as passes:
        drawn = drawing.sample(
            requests,
            PARAMS,
            progress=lambda n: said.append(f"progress {n}"),
            finished=finished,
        )
    assert [heard[i] for i in range(50)] == drawn
    assert said[1::2] == [line.replace("finished", "progress") for line in said[::2]]
    assert len(said) / 2 > len(passes.prompts) > 50 / 8


@pytest.mark.parametrize("way", ["one_length", "one_row", "whole"])
def test_so_do_models_that_are_drawn_in_batches(way: Any) -> None:
    drawing = sampler(tiny_model("llama", VOCAB), 3, known_way=KnownWay(way))
    heard: dict[int, Sample] = {}
    drawn = drawing.sample(
        asked(9), PARAMS, finished=lambda at, s: heard.update(zip(at, s, strict=True))
    )
    assert [heard[i] for i in range(9)] == drawn


def test_what_the_listener_raises_ends_the_draw_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gpt2", VOCAB)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler(model, 4).sample(asked(9), PARAMS, finished=stop)
    assert model.training
    assert torch.is_grad_enabled()
    assert model.config._attn_implementation == "sdpa"


# ---- memory that runs out, and broken weights ----------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1, 15])
def test_memory_that_runs_out_later_costs_only_what_was_being_drawn(failing: int) -> None:
    """At any pass: completions that had ended are kept, the others are the same drawn again."""
    model, requests = tiny_model("llama", VOCAB), asked(30)
    expected = sampler(model, 8).sample(requests, PARAMS)
    limit, heard, rows = BatchLimit(), Counter[int](), list[int]()

    def tight(_: Any, __: Any, inputs: Any) -> None:
        rows.append(len(inputs["input_ids"]))
        if len(rows) == failing + 1:
            raise torch.OutOfMemoryError("injected")

    model.register_forward_pre_hook(tight, with_kwargs=True)
    drawing = sampler(model, 8, batch_limit=limit)
    same(drawing.sample(requests, PARAMS, finished=lambda at, _: heard.update(at)), expected)
    assert limit.limit == 4
    assert max(rows[failing + 1 :]) == 4
    assert set(heard) == set(range(30))
    assert set(heard.values()) == {1}


def test_weights_that_break_while_places_are_filled_again_are_an_error() -> None:
    model = tiny_model("llama", VOCAB)
    calls = 0

    def breaks(_: Any, __: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 15:
            output.logits.fill_(float("nan"))

    model.register_forward_hook(breaks)
    kept: list[Sample] = []
    with pytest.raises(CollapseError, match="logits are not finite while it samples"):
        sampler(model, 4).sample(asked(40), PARAMS, finished=lambda _, s: kept.extend(s))
    assert 0 < len(kept) < 40
    assert not any(torch.tensor(s.logprob).isnan() for s in kept)


# ---- waits ---------------------------------------------------------------------------------------


def test_a_gpu_is_waited_for_at_looks_and_when_places_change_hands() -> None:
    """However many tokens there are between: two lists are made, three tables read, at a change."""
    model = tiny_model("llama", VOCAB)
    drawing = sampler(model, 4, look_every=8)
    drawing.sample(asked(4), SamplingParams(2))  # what is made once in a process
    requests = asked(24)
    with Passes(model) as passes, HostSyncs() as seen:
        drawing.sample(requests, PARAMS)
    steps, changes = len(passes.tokens), len(passes.prompts)
    per_token = [line for line, n in seen.by_line.items() if n >= steps]
    assert not per_token, seen.by_line
    assert changes < steps / 3


# ---- contrasts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_contrasts_fill_their_places_again(
    monkeypatch: pytest.MonkeyPatch, *, cached: bool
) -> None:
    model = tiny_model("llama", VOCAB)
    requests = asked(4, each=2)
    pairs = {r.prompt_ids: (((*r.prompt_ids, 9), r.prompt_ids[::-1]),) for r in requests}
    way = KnownWay("together" if cached else "whole")
    if not cached:
        monkeypatch.setattr(transformers_sampler, "keeps_keys", lambda _: False)
    all_at_once, few = (
        ContrastSampler(sampler(model, rows, known_way=way), pairs, Contrast(0.5))
        for rows in (64, 9)
    )
    params = replace(PARAMS, max_new_tokens=6)
    expected = all_at_once.draw(requests, params)
    drawn = few.draw(requests, params)
    same(list(drawn), list(expected))
    assert [s.kl for s in drawn] == pytest.approx([s.kl for s in expected], abs=1e-4)
    assert len({len(s.token_ids) for s in drawn}) > 2
