"""Rows whose prompts are kept once, against rows that are read anew for every token."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    DeepseekV3Config,
    FalconConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.llama import modeling_llama

from neat_align.modeling.precision import half_precision_copy, inference
from neat_align.modeling.shared_prefix import attending_by
from neat_align.sampling import decode_check, row_kinds, shared_rows
from neat_align.sampling.batch_check import KnownWay
from neat_align.sampling.decode_check import fast_decoding
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams
from neat_align.sampling.row_kinds import read_rows
from neat_align.sampling.shared_rows import Seats, SharedRows
from neat_align.sampling.token_rows import CachedRows, RecomputedRows
from neat_align.sampling.transformers_sampler import TransformersSampler
from tiny import FAMILIES, LATENT_KEYS, Family, random_model, tiny_model

VOCAB, PAD = 48, 0
SHARED, PLAIN, KERNEL = "neat_decode_shared_prompts", "neat_decode", "sdpa"
WIDER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
# One key head for all queries; norms of queries and keys.
ODD: dict[str, Any] = {
    "one key head": LlamaConfig(**{**WIDER, "num_key_value_heads": 1}),
    "qwen3": Qwen3Config(**WIDER, head_dim=8),
}

LATENT = DeepseekV3Config(**{**WIDER, "num_key_value_heads": 4}, **LATENT_KEYS)
FEWER = {k: v for k, v in WIDER.items() if k not in ("intermediate_size", "num_key_value_heads")}


@contextmanager
def sharing(model: PreTrainedModel) -> Iterator[None]:
    with attending_by(model, SHARED), torch.no_grad():
        yield


def models() -> dict[str, PreTrainedModel]:
    tiny = {family: tiny_model(family, VOCAB).eval() for family in FAMILIES}
    return {**tiny, **{name: random_model(config).eval() for name, config in ODD.items()}}


MODELS = models()


# ---- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_rows_that_share_prompts_say_what_rows_that_are_read_anew_say(
    name: str, data: st.DataObject
) -> None:
    """Whatever is read, kept, copied, put in another order and joined, in buffers of any room."""
    model = MODELS[name]
    token = st.integers(0, VOCAB - 1)
    known = data.draw(
        st.lists(st.lists(token, min_size=1, max_size=6).map(tuple), min_size=1, max_size=3)
    )
    prompts = st.lists(st.sampled_from(known), min_size=1, max_size=5)
    with pytest.MonkeyPatch.context() as patch, sharing(model):
        patch.setattr(shared_rows, "ROOM", data.draw(st.integers(1, 3)))
        first = data.draw(prompts)
        shared = SharedRows(model, first, PAD)
        anew = RecomputedRows(model, first, alone=True)
        for _ in range(data.draw(st.integers(1, 5))):
            what = data.draw(st.sampled_from(["advance", "advance", "keep", "add"]))
            count = len(anew.logits)
            if what == "keep":
                # An order, and some of them more than once.
                stay = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5))
                for rows in (shared, anew):
                    rows.keep(stay)
                count = len(stay)
            if what == "add":
                more = data.draw(prompts)
                for rows in (shared, anew):
                    rows.add(more)
                count += len(more)
            else:
                tokens = data.draw(st.lists(token, min_size=count, max_size=count))
                for rows in (shared, anew):
                    rows.advance(torch.tensor(tokens))
            torch.testing.assert_close(shared.logits, anew.logits, atol=1e-4, rtol=1e-4)


def test_seats_by_hand() -> None:
    """Three prompts with two, one and three completions, not in order."""
    seats = Seats.of([2, 0, 2, 1, 0, 2], torch.device("cpu"))
    assert seats.each == 3
    # Prompt 0: rows 1 and 4; prompt 1: row 3; prompt 2: rows 0, 2 and 5; the others are empty.
    assert seats.row_of_seat.tolist() == [1, 4, 0, 3, 0, 0, 0, 2, 5]
    assert seats.seat_of_row.tolist() == [6, 0, 7, 3, 1, 8]
    assert not seats.in_order
    assert Seats.of([0, 0, 1, 1], torch.device("cpu")).in_order
    assert not Seats.of([1, 0], torch.device("cpu")).in_order


def test_a_prompt_is_kept_once_and_goes_with_its_last_completion() -> None:
    model, long, short = MODELS["llama"], (1, 2, 3, 4, 5, 6), (7, 8)
    with sharing(model):
        rows = SharedRows(model, [long] * 3 + [short] * 4, PAD)
        layers = rows._layers
        assert [layer.prompt_keys.shape[::2] for layer in layers] == [(2, 6)] * len(layers)
        rows.advance(torch.arange(7))
        rows.keep([0, 3, 4])
        assert [layer.prompt_keys.shape[::2] for layer in layers] == [(2, 6)] * len(layers)
        rows.keep([1, 2])  # and with the long prompt its columns
        assert [layer.prompt_keys.shape[::2] for layer in layers] == [(1, 2)] * len(layers)


def test_the_columns_of_completions_that_have_left_go() -> None:
    model = MODELS["llama"]
    with sharing(model):
        rows = SharedRows(model, [(1, 2)] * 2, PAD)
        for _ in range(5):
            rows.advance(torch.tensor([3, 4]))
        rows.add([(1, 2)])
        rows.advance(torch.tensor([5, 6, 7]))
        assert rows._used == 6
        rows.keep([2])
        assert rows._used == 1


# ---- the sampler ---------------------------------------------------------------------------------


def drawn(model: PreTrainedModel, *, many: int, known: KnownWay | None = None) -> list[Sample]:
    sampler = TransformersSampler(
        model, (2, 7, 9), PAD, 10, known_way=known or KnownWay("together")
    )
    prompts = [(5, 6, 7, 8, 11), (9, 10, 11), (4,), (12, 13, 14, 15)]
    asked = [SampleRequest(p, 31 * i + j) for i, p in enumerate(prompts) for j in range(many)]
    return sampler.sample(asked, SamplingParams(max_new_tokens=14, temperature=1.2, top_p=0.95))


def kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of rows that are read from now on, all of them however few tokens are shared."""
    read: list[str] = []
    monkeypatch.setattr(row_kinds, "SHARED_FROM", 1)
    for kind in (SharedRows, CachedRows):
        init = kind.__init__

        def noted(
            self: Any, *args: Any, init: Any = init, name: str = kind.__name__, **kwargs: Any
        ) -> None:
            read.append(name)
            init(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", noted)
    return read


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_draws_the_same_from_shared_prompts(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(MODELS[family])
    known = KnownWay("together", attention=KERNEL)
    expected = drawn(model, many=4, known=known)
    read = kinds(monkeypatch)
    ours = drawn(model, many=4, known=KnownWay("together", attention=SHARED))
    # Places are filled again when completions end: more prompts join those that are read on.
    assert read == ["SharedRows"]
    assert len({len(s.token_ids) for s in expected}) > 3
    assert [s.token_ids for s in ours] == [s.token_ids for s in expected]
    assert [s.logprob for s in ours] == pytest.approx([s.logprob for s in expected], abs=1e-4)


def test_few_tokens_are_not_shared() -> None:
    model = MODELS["llama"]
    prompt = tuple(i % VOCAB for i in range(65))
    with sharing(model):
        assert isinstance(read_rows(model, [prompt] * 32, PAD, "together"), CachedRows)
        assert isinstance(read_rows(model, [prompt] * 33, PAD, "together"), SharedRows)
        assert isinstance(read_rows(model, [prompt] * 33, PAD, "one_row"), RecomputedRows)
    with torch.no_grad():
        assert isinstance(read_rows(model, [prompt] * 33, PAD, "together"), CachedRows)


# ---- which attention -----------------------------------------------------------------------------


def chosen(model: PreTrainedModel) -> str:
    with inference(model, None), fast_decoding(model):
        return str(model.config._attn_implementation)


@pytest.mark.parametrize("name", ["llama", "qwen2", *ODD])
def test_models_whose_cache_is_all_keys_share(name: str) -> None:
    assert chosen(MODELS[name]) == SHARED
    assert MODELS[name].config._attn_implementation == KERNEL
    assert chosen(half_precision_copy(MODELS[name], torch.bfloat16)) == SHARED


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(MistralConfig(**WIDER, sliding_window=4), PLAIN, id="a window"),
        pytest.param(LATENT, PLAIN, id="keys that are made of the cache's"),
        pytest.param(FalconConfig(**FEWER, alibi=True), KERNEL, id="a mask that is not of tokens"),
    ],
)
def test_models_that_need_more_do_not(config: Any, expected: str) -> None:
    model = random_model(config).eval()
    assert chosen(model) == expected


def test_products_that_disagree_with_torchs_kernel_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seeing_all(query: Any, layer: Any, seats: Any, hidden: Any, scale: Any) -> Any:
        return attend(query, layer, seats, torch.zeros_like(hidden), scale)

    attend = shared_rows._attend
    monkeypatch.setattr(shared_rows, "_attend", seeing_all)
    assert chosen(MODELS["llama"]) == PLAIN


def test_a_model_that_reads_its_cache_for_positions_does_not_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would take the completions' tokens for all that there are."""

    def by_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen = kwargs["past_key_values"].get_seq_length()
        kwargs["position_ids"] = seen + torch.arange(kwargs["input_ids"].shape[1])[None]
        return forward(self, *args, **kwargs)

    model = copy.deepcopy(MODELS["one key head"])
    forward = modeling_llama.LlamaModel.forward
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", by_cache)
    assert chosen(model) != SHARED


def test_a_model_that_attends_to_something_else_does_not_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def repeated(self: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(self, *args, **kwargs)
        return keys.clone(), values

    update = shared_rows.SharedLayer.update
    monkeypatch.setattr(shared_rows.SharedLayer, "update", repeated)
    assert chosen(MODELS["llama"]) == PLAIN


def test_a_model_that_takes_no_positions_is_drawn_from_with_its_own_attention() -> None:
    model = copy.deepcopy(MODELS["llama"])
    expected = drawn(model, many=2, known=KnownWay("one_length", attention=KERNEL))

    def refuse(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if inputs.get("position_ids") is not None:
            raise TypeError("position_ids")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    known = KnownWay("one_length")
    ours = drawn(model, many=2, known=known)
    assert [s.token_ids for s in ours] == [s.token_ids for s in expected]
    assert known.attention == KERNEL


def test_models_that_share_what_is_known_are_compared_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[torch.nn.Module] = []
    fastest = decode_check._fastest
    monkeypatch.setattr(
        decode_check,
        "_fastest",
        lambda model, kernel: asked.append(model) or fastest(model, kernel),
    )
    known = KnownWay("together")
    for _ in range(2):
        drawn(MODELS["llama"], many=1, known=known)
    assert asked == [MODELS["llama"]]
    assert known.attention == SHARED
