"""Weights under autocast are cast as often as a batch goes through the model, and not once a chunk
of the head; the numbers are autocast's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from host_syncs import HostSyncs, weight_casts
from neat_align.modeling import chunked_head, kl, logprobs
from neat_align.modeling.kl import Divergence, exact_divergence
from neat_align.modeling.logprobs import completion_logprobs, score_completions
from neat_align.modeling.packing import pack_rows
from neat_align.modeling.precision import autocast, casting_once, frozen_casts
from neat_align.modeling.shared_prefix import unwrapped
from tiny import Family, tiny_model

VOCAB = 48
PROMPTS = [(5, 6, 7), (8, 9)]
ANSWERS = [[(4, 3, 9, 11), (12, 2)], [(5, 5, 6), (7, 8, 9, 10, 11)]]
FLAT = [(p, a) for p, answers in zip(PROMPTS, ANSWERS, strict=True) for a in answers]
HALF = torch.bfloat16


def adapted(family: Family = "llama", **options: Any) -> Any:
    config = LoraConfig(r=4, **{"target_modules": ["lm_head"], **options})
    model = get_peft_model(tiny_model(family, VOCAB), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    return model.eval()  # without GPT-2's dropout


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two states a chunk."""
    monkeypatch.setattr(chunked_head, "CPU_CHUNK_LOGITS", 2 * VOCAB)


def trained(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, and the gradients of their sum."""
    model.zero_grad()
    with autocast("cpu", HALF):
        found = completion_logprobs(model, pack_rows(PROMPTS, ANSWERS))
    found.sum().backward()
    return found.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def head_casts(model: Any, work: Any) -> dict[str, int]:
    base = unwrapped(model).get_output_embeddings()
    name = next(n for n, p in model.named_parameters() if p is frozen_weight(base))
    with weight_casts(model) as seen:
        work()
    return {"head": seen[name]}


def frozen_weight(head: Any) -> Any:
    return getattr(head, "base_layer", head).weight


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_frozen_head_under_an_adapter_is_cast_once(
    monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    """In a forward and backward pass over seven chunks, each of which runs twice."""
    model = adapted(family)
    logps, gradients = trained(model)
    assert len(gradients) == 2  # the adapter's alone
    # The model's own call of its head is for one position; then the chunks' one cast.
    assert head_casts(model, lambda: trained(model)) == {"head": 2}
    monkeypatch.setattr(logprobs, "frozen_casts", lambda *_: {})
    assert head_casts(model, lambda: trained(model))["head"] > 10
    expected, expected_gradients = trained(model)
    assert torch.equal(logps, expected)
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("adapter", [False, True])
def test_a_head_that_is_no_part_of_the_adapter_is_cast_once(adapter: bool) -> None:
    model = adapted(target_modules=["q_proj"]) if adapter else tiny_model("llama", VOCAB)
    most = 2 if adapter else 3  # a head that is trained runs again in the backward pass
    assert head_casts(model, lambda: trained(model))["head"] <= most


def test_what_does_more_with_its_weights_is_left_to_autocast() -> None:
    head = unwrapped(adapted(use_dora=True)).get_output_embeddings()
    with autocast("cpu", HALF):
        assert frozen_casts(head, torch.device("cpu")) == {}
    plain = unwrapped(adapted()).get_output_embeddings()
    assert frozen_casts(plain, torch.device("cpu")) == {}  # autocast is off
    with autocast("cpu", HALF):
        assert list(frozen_casts(plain, torch.device("cpu"))) == ["base_layer.weight"]


# ---- exact KL ------------------------------------------------------------------------------------


def divergence(model: Any, reference: Any, dtype: torch.dtype | None = HALF) -> Divergence:
    return exact_divergence(
        model,
        reference,
        [p for p, _ in FLAT],
        [a for _, a in FLAT],
        layout="packed",
        pad_token_id=0,
        autocast_dtype=dtype,
    )


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_heads_are_cast_once_for_all_chunks_of_the_kl(
    monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    model = adapted(target_modules=[target])
    flags = {n: p.requires_grad for n, p in model.named_parameters()}

    @contextlib.contextmanager
    def adapter_off() -> Iterator[torch.nn.Module]:
        with model.disable_adapter():
            yield model

    found = divergence(model, adapter_off)
    assert found.kl_per_token > 0
    casts = head_casts(model, lambda: divergence(model, adapter_off))["head"]
    # Each policy's own call for one position, and one for the chunks of both.
    assert casts <= 3
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags

    @contextlib.contextmanager
    def anew(*_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(kl, "heads_cast_once", anew)
    assert head_casts(model, lambda: divergence(model, adapter_off))["head"] > 10
    assert divergence(model, adapter_off) == found  # to the bit


def test_the_kl_is_read_once_a_batch() -> None:
    model, start = tiny_model("llama", VOCAB), tiny_model("llama", VOCAB, seed=1)
    with HostSyncs() as seen:
        divergence(model, lambda: contextlib.nullcontext(start), None)
    in_kl = {line: n for line, n in seen.by_line.items() if line.startswith("kl.py")}
    assert list(in_kl.values()) == [1]


def test_completions_without_a_token_have_no_kl() -> None:
    model = tiny_model("llama", VOCAB)
    found = exact_divergence(
        model,
        lambda: contextlib.nullcontext(model),
        [(5, 6)],
        [()],
        layout="packed",
        pad_token_id=0,
        autocast_dtype=None,
    )
    assert (found.kl, found.entropy, found.tokens) == ((0.0,), (0.0,), (0,))


# ---- the flag ------------------------------------------------------------------------------------


def test_flags_are_put_back_after_a_failure() -> None:
    model = adapted()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}

    def breaks() -> None:
        with casting_once(model):
            assert all(p.requires_grad for p in model.parameters())
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        breaks()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_weights_of_other_types_are_left_alone() -> None:
    """Only fp32 is cast; numbers of a quantised weight cannot even require a gradient."""
    module = torch.nn.Module()
    module.integers = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    module.in_bf16 = torch.nn.Parameter(torch.zeros(2, dtype=HALF), requires_grad=False)
    module.in_fp32 = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    with casting_once(module):
        assert [p.requires_grad for p in module.parameters()] == [False, False, True]


def test_scoring_with_an_adapter_on_the_head_is_as_before() -> None:
    """Against one completion at a time."""
    model = adapted()
    prompts, answers = [p for p, _ in FLAT], [a for _, a in FLAT]
    options: dict[str, Any] = {"layout": "packed", "pad_token_id": 0, "autocast_dtype": None}
    together = score_completions(model, prompts, answers, **options)
    for prompt, answer, row in zip(prompts, answers, together, strict=True):
        (alone,) = score_completions(model, [prompt], [answer], **options)
        assert row == pytest.approx(alone, abs=1e-5)
