"""Packed rows give the numbers and gradients of padded rows, in every family they claim to hold."""

from __future__ import annotations

from typing import Any

import accelerate.utils.other
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from neat_align.modeling import chunked_head, logprobs, shared_prefix
from neat_align.modeling.logprobs import completion_logprobs, packed_logprobs, padded_logprobs
from neat_align.modeling.packing import pack_rows, pad_rows
from neat_align.modeling.requirements import disable_dropout
from neat_align.modeling.shared_prefix import (
    is_sharing,
    sharing_prefixes,
    unwrapped,
    why_not_packed,
)
from tiny import random_model

VOCAB = 67
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Each with what makes it different: the window is shorter than a prompt with its completion, and
# than the prompt alone.
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**LLAMA_LIKE),
    "qwen3": Qwen3Config(**LLAMA_LIKE, head_dim=8),
    "mistral": MistralConfig(**LLAMA_LIKE, sliding_window=4),
    "mistral-wide": MistralConfig(**LLAMA_LIKE, sliding_window=12),
    "gemma": GemmaConfig(**LLAMA_LIKE, head_dim=8),
    "gemma2": Gemma2Config(
        **LLAMA_LIKE,
        head_dim=8,
        sliding_window=5,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
        query_pre_attn_scalar=8,
    ),
    "gemma3": Gemma3TextConfig(**LLAMA_LIKE, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    "phi": PhiConfig(**LLAMA_LIKE),
    "phi3": Phi3Config(**LLAMA_LIKE),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.2,
        dropout=0.0,
    ),
    "mixtral": MixtralConfig(**LLAMA_LIKE, **MOE),
    "olmoe": OlmoeConfig(**LLAMA_LIKE, num_experts=4, num_experts_per_tok=2),
    "cohere": CohereConfig(**LLAMA_LIKE, logit_scale=0.25),
    "granite": GraniteConfig(**LLAMA_LIKE, logits_scaling=2.0, attention_multiplier=0.3),
}


def model_of(family: str) -> PreTrainedModel:
    model = random_model(CONFIGS[family])
    disable_dropout(model)
    return model.train()


def token_ids(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


# Three groups of unequal prompts, sizes and lengths; one completion of a single token, which feeds
# nothing to the model.
PROMPTS = token_ids([9, 3, 14], 1)
COMPLETIONS = [token_ids([5, 1, 7], 2), token_ids([4], 3), token_ids([6, 2, 2, 8], 4)]


def padded(prompts: list[list[int]], completions: list[list[list[int]]]) -> Any:
    flat = [(p, c) for p, answers in zip(prompts, completions, strict=True) for c in answers]
    return pad_rows([p for p, _ in flat], [c for _, c in flat], 0)


def table(model: torch.nn.Module, rows: Any, width: int = 8) -> torch.Tensor:
    out = completion_logprobs(model, rows)
    return torch.nn.functional.pad(out, (0, width - out.shape[1]))


def gradients(model: torch.nn.Module, rows: Any) -> dict[str, torch.Tensor]:
    """Gradients of a sum that weighs every token differently."""
    model.zero_grad()
    logps = table(model, rows)
    (logps * torch.linspace(0.5, 2.0, logps.numel()).view_as(logps)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: torch.nn.Module) -> None:
    packed_rows, padded_rows = pack_rows(PROMPTS, COMPLETIONS), padded(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        difference = (table(model, packed_rows) - table(model, padded_rows)).abs().max()
    assert difference <= 1e-4
    with sharing_prefixes(model):
        packed = gradients(model, packed_rows)
    expected = gradients(model, padded_rows)
    assert packed.keys() == expected.keys()
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    error = torch.stack([(packed[n] - g).norm() for n, g in expected.items()]).norm()
    assert norm > 1
    assert error / norm <= 1e-5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
@pytest.mark.parametrize("family", CONFIGS)
def test_packed_is_padded(family: str, checkpointing: bool) -> None:
    model = model_of(family)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert why_not_packed(model) is None
    assert_same(model)


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_is_padded_by_products(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As attention is computed on a CPU in rows that are not small."""
    monkeypatch.setattr(shared_prefix, "SMALL_ROW", 0)
    assert_same(model_of(family))


@pytest.mark.parametrize("target", ["attention", "head"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_packed_is_padded_with_an_adapter(family: str, target: str) -> None:
    modules = {
        "attention": ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"],
        "head": ["lm_head"],
    }[target]
    model = get_peft_model(
        model_of(family),
        LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    assert_same(model)
    assert all("lora" in n for n in gradients(model, pack_rows(PROMPTS, COMPLETIONS)))


@pytest.mark.parametrize("kept", [0, 2**20], ids=["made-again", "kept"])
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunks_of_the_head_change_nothing(
    family: str, rows: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "chunk_rows", lambda vocabulary, device: rows)
    monkeypatch.setattr(chunked_head, "KEPT_BYTES", kept)
    assert_same(model_of(family))


@pytest.mark.parametrize("adapter", [False, True], ids=["linear", "adapter"])
def test_the_logits_are_never_held_as_a_whole(
    adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor of a training step has more logits than a chunk of 4.

    (The head's weight and its gradient have VOCAB rows.)
    """
    monkeypatch.setattr(logprobs, "chunk_rows", lambda vocabulary, device: 4)
    monkeypatch.setattr(chunked_head, "KEPT_BYTES", 0)  # what is over the limit
    model: Any = model_of("llama")
    if adapter:
        model = get_peft_model(
            model,
            LoraConfig(
                r=4, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
            ),
        )
    rows = pack_rows(PROMPTS, COMPLETIONS)
    seen: set[int] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            made = [
                t
                for t in (out if isinstance(out, tuple) else (out,))
                if isinstance(t, torch.Tensor) and t.ndim >= 2
            ]
            seen.update(t.shape[-2] for t in made if t.shape[-1] == VOCAB)
            return out

    with sharing_prefixes(model), Watch():
        packed_logprobs(model, rows).sum().backward()
    assert 4 in seen
    assert max(seen) <= 32  # 32 is the width: the transposed weight
    assert int(rows.completion_mask.sum()) > 32


@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(0, 6), min_size=1, max_size=4)),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=30, deadline=None)
def test_packed_is_padded_for_any_lengths(lengths: list[tuple[int, list[int]]]) -> None:
    model = model_of("mistral")
    prompts = token_ids([p for p, _ in lengths], 5)
    completions = [token_ids(answers, 6 + i) for i, (_, answers) in enumerate(lengths)]
    with torch.no_grad():
        packed, reference = (
            packed_logprobs(model, pack_rows(prompts, completions)),
            padded_logprobs(model, padded(prompts, completions)),
        )
    torch.testing.assert_close(packed, reference[:, : packed.shape[1]], atol=1e-4, rtol=0)


def test_groups_do_not_see_each_other() -> None:
    model = model_of("llama")
    with torch.no_grad():
        together = table(model, pack_rows(PROMPTS, COMPLETIONS))
        alone = torch.cat(
            [table(model, pack_rows([p], [c])) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_what_cannot_be_packed_says_why() -> None:
    bloom = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
    )
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1)
    )
    for model in (bloom, mamba):
        assert "attention interface" in str(why_not_packed(model))
    prompt_tuned = get_peft_model(
        model_of("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    assert "virtual tokens" in str(why_not_packed(prompt_tuned))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        pack_rows([[]], [[[1, 2]]])


def test_gradient_checkpointing_outside_of_the_context_is_refused() -> None:
    """The backward pass would compute another attention, silently."""
    model = model_of("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(RuntimeError, match="sharing_prefixes"):
        packed_logprobs(model, pack_rows(PROMPTS, COMPLETIONS))


def test_the_models_own_attention_comes_back() -> None:
    model = model_of("llama")
    before = model.config._attn_implementation

    with sharing_prefixes(model):
        assert is_sharing(model)
    assert not is_sharing(model)

    def fail() -> None:
        with sharing_prefixes(model):
            raise KeyError("in the middle")

    with pytest.raises(KeyError):
        fail()
    assert not is_sharing(model)
    assert model.config._attn_implementation == before


def test_a_model_is_taken_out_of_its_wrappers_and_searched_only_where_it_is_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = model_of("llama")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    searched: list[object] = []

    def search(module: torch.nn.Module) -> bool:
        searched.append(module)
        return False

    monkeypatch.setattr(accelerate.utils.other, "has_compiled_regions", search)
    assert unwrapped(model) is model
    assert unwrapped(adapted) is model
    assert searched == []
    for inner in (model, adapted):
        wrapper = torch.nn.DataParallel(inner)
        assert unwrapped(wrapper) is model
        assert searched.pop() is wrapper
