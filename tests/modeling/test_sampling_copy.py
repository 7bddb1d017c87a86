"""The half-precision copy that is sampled from: what it shares, and the memory it takes."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from neat_align.modeling.precision import half_precision_copy
from neat_align.sampling.protocol import SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from tiny import Family, tiny_model

VOCAB = 384
BF16 = torch.bfloat16


class Allocated(TorchDispatchMode):
    """While open, the most bytes of new storage that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        if isinstance(given, torch.Tensor) and given.untyped_storage()._cdata not in old:
            size = given.untyped_storage().nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(given.untyped_storage(), self._freed, size)
        return given

    def _freed(self, size: int) -> None:
        self.now -= size


def adapted(dtype: torch.dtype, *, size: float = 0.5) -> Any:
    """A frozen model in a type under fp32 adapters that do something."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(
        tiny_model("llama", VOCAB).to(dtype), config, autocast_adapter_dtype=True
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=size, generator=generator)
    return model


def weights_of(model: torch.nn.Module) -> int:
    """Bytes, each weight once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def storages(model: torch.nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        given: torch.Tensor = model(input_ids=torch.arange(3, 20)[None]).logits.float()
    return given


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_what_learns_is_there_once_more_in_half_precision_and_never_twice(family: Family) -> None:
    model = tiny_model(family, VOCAB)
    expected = copy.deepcopy(model).to(BF16)
    whole = weights_of(model)
    with Allocated() as memory:
        copied = half_precision_copy(model, BF16)
    assert copied is not None
    assert weights_of(copied) == whole / 2
    assert memory.peak < 0.8 * whole  # the copy, and a forward pass over four tokens
    assert not storages(copied) & storages(model)
    for (name, ours), theirs in zip(copied.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_frozen_base_in_half_precision_is_not_copied_and_its_adapter_stays() -> None:
    model = adapted(BF16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with Allocated() as memory:
        copied = half_precision_copy(model, BF16)
    assert copied is not None
    base = weights_of(model.base_model.model.model) + 2 * VOCAB * 32
    assert memory.peak < base / 2
    shared = storages(copied) & storages(model)
    adapters = [p for name, p in copied.named_parameters() if "lora_" in name]
    assert len(shared) == len(storages(copied)) - len(adapters) > 10
    assert {p.dtype for p in copied.parameters()} == {BF16}
    # The original is as it was, the copy is the same policy, and sampling from it changes nothing.
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        name for name in before if "lora_" in name
    }
    with torch.autocast("cpu", BF16):
        expected = logits(model)
    error = (logits(copied) - expected).norm() / expected.norm()
    assert error < 0.05
    sampler = TransformersSampler(copied, (2,), 0)
    sampler.sample([SampleRequest((5, 6, 7), i) for i in range(4)], SamplingParams(6))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_of_a_merged_copy_only_what_merging_changes_is_there_once_more() -> None:
    model = adapted(torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = logits(model)
    with Allocated() as memory:
        copied = half_precision_copy(model, BF16)
    assert copied is not None
    assert not any("lora" in name for name, _ in copied.named_parameters())
    assert (logits(copied) - expected).norm() / expected.norm() < 0.05
    changed = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if "lora_" in name or "base_layer" in name
    )
    # Beside the result: what merging changes, and the probed logits three times.
    assert memory.peak < weights_of(copied) + changed + 3 * 4 * 32 * VOCAB
    assert not storages(copied) & storages(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.dtype == torch.float32


def test_training_after_the_copy_was_made_does_not_change_it() -> None:
    for model in (tiny_model("llama", VOCAB).to(BF16), adapted(BF16), adapted(torch.float32)):
        copied = half_precision_copy(model, BF16)
        before = logits(copied)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0)
        assert torch.equal(logits(copied), before)


def test_an_adapter_that_is_off_is_left_out_of_the_copy_and_nothing_is_copied() -> None:
    """The start policy, where it is the base below an adapter."""
    model = adapted(BF16)
    with model.disable_adapter(), Allocated() as memory:
        expected = logits(model)
        copied = half_precision_copy(model, BF16)
    assert copied is not None
    assert not any("lora" in name for name, _ in copied.named_parameters())
    assert storages(copied) <= storages(model)
    assert memory.peak < weights_of(model) / 2 + 20 * VOCAB * 32
    torch.testing.assert_close(logits(copied), expected)


def test_a_copy_whose_adapter_cannot_be_merged_is_not_made_beside_the_one_that_failed() -> None:
    config = LoraConfig(r=4, target_modules=["wte", "c_attn"], fan_in_fan_out=True)
    model = get_peft_model(tiny_model("gpt2", VOCAB), config)  # its embeddings are its head
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.data.normal_(std=0.5)
    whole = weights_of(model)
    with Allocated() as memory:
        copied = half_precision_copy(model, BF16)
    assert copied is not None
    assert any("lora" in name for name, _ in copied.named_parameters())
    assert memory.peak < 1.9 * whole  # 2 and more where both are there
