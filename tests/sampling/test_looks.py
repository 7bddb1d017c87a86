"""How often the sampler waits for its device, and casts weights: not once a token. The tokens do
not depend on it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPTNeoXConfig,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from host_syncs import HostSyncs, weight_casts
from neat_align import CollapseError
from neat_align.modeling.known_padding import masks_from
from neat_align.modeling.precision import inference
from neat_align.sampling import transformers_sampler
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import BatchLimit, TransformersSampler
from odd_models import PAD, SIZES, VOCAB, WINDOWED
from tiny import random_model, tiny_model

# Six of 48 tokens end an answer: about one answer in eight at every token.
ENDS = (2, 3, 5, 7, 11, 13)
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_model("llama", VOCAB),
    "gpt2": lambda: tiny_model("gpt2", VOCAB),
    "qwen2": lambda: tiny_model("qwen2", VOCAB),
    **WINDOWED,
    "gpt_neox": lambda: random_model(GPTNeoXConfig(**SIZES)),
}


def sampler(model: torch.nn.Module, **changes: Any) -> TransformersSampler:
    settings: dict[str, Any] = {"eos_token_ids": ENDS, "pad_token_id": PAD}
    return TransformersSampler(model, **{**settings, **changes})


def asked(n: int = 12, *, alike: bool = False) -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(n)
    lengths = [4] * n if alike else torch.randint(1, 12, (n,), generator=generator).tolist()
    return [
        SampleRequest(tuple(torch.randint(VOCAB, (k,), generator=generator).tolist()), 2**40 + i)
        for i, k in enumerate(lengths)
    ]


def same(a: list[Sample], b: list[Sample]) -> None:
    assert [(s.token_ids, s.finish_reason) for s in a] == [
        (s.token_ids, s.finish_reason) for s in b
    ]
    assert [s.logprob for s in a] == pytest.approx([s.logprob for s in b], abs=1e-5)


# ---- looking more seldom changes no completion ---------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_how_often_is_looked_changes_no_completion(name: str) -> None:
    model, params = MODELS[name](), SamplingParams(max_new_tokens=21, temperature=1.2)
    expected = sampler(model, look_every=1).sample(asked(), params)
    lengths = [len(s.token_ids) for s in expected]
    assert min(lengths) < 4  # some end at once,
    assert max(lengths) > 16  # others are carried over several looks
    for every in (2, 8, 21, 1000):
        for batch_size in (64, 5):
            found = sampler(model, look_every=every, batch_size=batch_size).sample(asked(), params)
            same(found, expected)


def test_no_token_after_the_end_leaks_into_an_answer() -> None:
    model, params = tiny_model("llama", VOCAB), SamplingParams(max_new_tokens=30)
    for drawn in sampler(model, look_every=16).sample(asked(40), params):
        ends = [t in ENDS for t in drawn.token_ids]
        assert not any(ends[:-1])
        assert ends[-1] == (drawn.finish_reason == "stop")
        assert ends[-1] or len(drawn.token_ids) == 30


def test_a_completion_does_not_depend_on_neighbours_that_are_carried_along() -> None:
    model, params = tiny_model("llama", VOCAB), SamplingParams(max_new_tokens=25)
    together = sampler(model, look_every=8).sample(asked(), params)
    alone = [sampler(model, look_every=3).sample([r], params)[0] for r in asked()]
    same(together, alone)


def test_a_gpu_is_looked_at_less_often_than_a_cpu() -> None:
    assert sampler(tiny_model("llama", VOCAB)).look_every is None
    assert 8 <= transformers_sampler.LOOK_EVERY <= 16


# ---- waits ---------------------------------------------------------------------------------------


def waits(model: torch.nn.Module, tokens: int, every: int, *, alike: bool = False) -> HostSyncs:
    """Of a draw in which nothing ends."""
    drawing = sampler(model, eos_token_ids=(VOCAB + 1,), look_every=every)
    drawing.sample(asked(4), SamplingParams(max_new_tokens=2))  # what is made once in a process
    with HostSyncs() as seen:
        drawing.sample(asked(4, alike=alike), SamplingParams(tokens, 0.9, 0.9, 20))
    return seen


@pytest.mark.parametrize("alike", [False, True], ids=["padded", "unpadded"])
@pytest.mark.parametrize("name", MODELS)
def test_a_token_makes_nobody_wait(name: str, alike: bool) -> None:
    """64 tokens more wait for the looks at them and for nothing else."""
    model = MODELS[name]()
    short, long = (waits(model, n, 8, alike=alike) for n in (8, 72))
    more = long.by_line - short.by_line
    assert [line.split(" ", 1)[1] for line in more] == ["tolist"], more
    assert long.total - short.total == 64 // 8


def test_the_draw_by_generate_adds_no_wait_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' loop looks once a token; the draw in it does not."""
    monkeypatch.setattr(transformers_sampler, "keeps_keys", lambda _: False)
    model = tiny_model("llama", VOCAB)
    short, long = (waits(model, n, 8) for n in (8, 40))
    more = long.by_line - short.by_line
    assert not [line for line in more if "draw.py" in line], more
    assert long.total - short.total <= 2 * 32


@pytest.mark.parametrize("decodes", [True, False], ids=["decode", "generate"])
@pytest.mark.parametrize("every", [1, 8])
def test_broken_weights_are_an_error_whenever_it_is_looked(
    monkeypatch: pytest.MonkeyPatch, every: int, decodes: bool
) -> None:
    if not decodes:
        monkeypatch.setattr(transformers_sampler, "keeps_keys", lambda _: False)
    model = tiny_model("llama", VOCAB)
    model.get_output_embeddings().weight.data[5, 0] = float("inf")
    with pytest.raises(CollapseError, match="logits are not finite while it samples"):
        sampler(model, look_every=every).sample(asked(3), SamplingParams(max_new_tokens=30))


def test_what_breaks_after_an_answer_ended_is_not_its_error() -> None:
    """A row that has ended is carried along: what its later logits are concerns nobody."""
    model, params = tiny_model("llama", VOCAB), SamplingParams(max_new_tokens=8)
    drawing = sampler(model, look_every=8, eos_token_ids=tuple(range(VOCAB)))
    expected = drawing.sample(asked(3), params)
    calls: list[int] = []

    def breaks(_: Any, __: Any, output: Any) -> None:
        calls.append(len(output.logits))
        if calls.count(3) > 1:  # after the prompts
            output.logits.fill_(float("nan"))

    handle = model.register_forward_hook(breaks)
    same(drawing.sample(asked(3), params), expected)
    assert calls.count(3) > 1
    handle.remove()


def test_the_mask_functions_are_put_back_after_a_failure() -> None:
    before = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ALL_MASK_ATTENTION_FUNCTIONS}
    model = tiny_model("llama", VOCAB)
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(CollapseError):
        sampler(model).sample(asked(2), SamplingParams(max_new_tokens=3))
    for name, function in before.items():
        assert ALL_MASK_ATTENTION_FUNCTIONS[name] is function


def test_what_one_thread_knows_of_padding_is_not_said_to_another() -> None:
    """A reward function, or a server in this process, may draw while the policy does, and may have
    ended while the policy has not: neither's masks are the other's, and none stays.
    """
    before = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ALL_MASK_ATTENTION_FUNCTIONS}
    model = tiny_model("llama", VOCAB)
    ids, mask = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]]), torch.ones(2, 5).long()
    mask[0, :2] = 0

    def logits() -> torch.Tensor:
        with inference(model, None):
            scores: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        return scores

    expected = logits()
    opened, over = threading.Event(), threading.Event()

    def another() -> None:
        with masks_from(padded=False, also=("neat_decode",)):
            opened.set()
            over.wait(10)

    thread = threading.Thread(target=another)
    thread.start()
    opened.wait(10)
    torch.testing.assert_close(logits(), expected)
    with masks_from(padded=True):
        torch.testing.assert_close(logits(), expected)
        over.set()
        thread.join()  # first in, first out
    torch.testing.assert_close(logits(), expected)
    for name, function in before.items():
        assert ALL_MASK_ATTENTION_FUNCTIONS[name] is function


# ---- casts of frozen weights ---------------------------------------------------------------------


def adapted(family: str = "llama", *, head: bool = False) -> Any:
    """A frozen fp32 model under an adapter that does something."""
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    config = LoraConfig(r=4, target_modules=[*targets, *(["lm_head"] if head else [])])
    model = get_peft_model(MODELS[family](), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    return model


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_frozen_weights_are_cast_once_a_draw(family: str, head: bool) -> None:
    if family == "gpt_neox":
        model: Any = MODELS[family]().requires_grad_(False)
    else:
        model = adapted(family, head=head and family == "llama")
    casts = []
    for tokens in (2, 12):
        drawing = sampler(model, eos_token_ids=(VOCAB + 1,), autocast_dtype=torch.bfloat16)
        drawing.settle([r.prompt_ids for r in asked(4)])
        with weight_casts(model) as seen:
            drawing.sample(asked(4), SamplingParams(max_new_tokens=tokens))
        casts.append(seen)
    assert casts[0] == casts[1]  # no more for ten tokens more
    assert casts[0]
    assert set(casts[0].values()) == {1}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_casting_once_changes_no_number(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model, params = adapted(family), SamplingParams(max_new_tokens=9)
    drawing = sampler(model, autocast_dtype=torch.bfloat16)
    once = drawing.sample(asked(), params)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags == {name: "lora_" in name for name in flags}  # put back

    @contextlib.contextmanager
    def anew(_: torch.nn.Module) -> Iterator[None]:
        yield

    monkeypatch.setattr(transformers_sampler, "casting_once", anew)
    assert drawing.sample(asked(), params) == once  # to the bit


def test_casts_do_not_outlive_the_draw() -> None:
    """The weights may move between two draws: what was kept of them must not."""
    model = adapted()
    drawing = sampler(model, autocast_dtype=torch.bfloat16)
    params = SamplingParams(max_new_tokens=9)
    before = drawing.sample(asked(), params)
    for parameter in model.parameters():
        parameter.data.mul_(-1.5)
    after = drawing.sample(asked(), params)
    assert after != before
    assert after == sampler(model, autocast_dtype=torch.bfloat16).sample(asked(), params)


def test_out_of_memory_gives_up_the_casts_first() -> None:
    model, params = adapted(), SamplingParams(max_new_tokens=5)
    expected = sampler(model, autocast_dtype=torch.bfloat16).sample(asked(), params)
    limit = BatchLimit()
    drawing = sampler(model, autocast_dtype=torch.bfloat16, batch_limit=limit)
    sizes: list[int] = []

    def little_memory(_: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["input_ids"]))
        frozen = model.base_model.model.model.embed_tokens.weight
        if frozen.requires_grad and sizes[-1] == 12:  # the casts are kept
            raise torch.OutOfMemoryError("no room for casts")

    handle = model.register_forward_pre_hook(little_memory, with_kwargs=True)
    found = drawing.sample(asked(), params)
    handle.remove()
    assert (limit.limit, limit.keeps_casts) == (None, False)  # not halved
    assert sizes[sizes.index(12) + 1] == 12  # the same prompts at once
    same(found, expected)


def test_out_of_memory_for_one_completion_is_raised() -> None:
    model = adapted()
    drawing = sampler(model, autocast_dtype=torch.bfloat16)

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("none at all")

    handle = model.register_forward_pre_hook(no_memory)
    with pytest.raises(torch.OutOfMemoryError, match="none at all"):
        drawing.sample(asked(1), SamplingParams(max_new_tokens=5))
    handle.remove()
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


def test_the_casts_take_half_of_the_weights_and_are_given_back() -> None:
    """What autocast keeps is one half-precision copy of what it multiplies with."""
    model = adapted()
    with inference(model, torch.bfloat16), weight_casts(model) as seen:
        model(input_ids=torch.tensor([[4, 5]]))
        model(input_ids=torch.tensor([[4, 5]]))
    assert max(seen.values()) == 2  # outside of a draw nothing is kept
