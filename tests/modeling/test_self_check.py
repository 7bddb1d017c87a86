"""A model compared with itself: alone, in a batch, and in training mode."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from transformers import (
    BartConfig,
    BloomConfig,
    CamembertConfig,
    MambaConfig,
    MixtralConfig,
    PhimoeConfig,
    RwkvConfig,
    XLNetConfig,
)

from neat_align.errors import ConfigError
from neat_align.modeling.layout import choose_layout
from neat_align.modeling.logprobs import score_completions
from neat_align.modeling.outputs import adds_auxiliary_loss, plain_outputs
from neat_align.modeling.packing import Layout
from neat_align.modeling.requirements import disable_dropout
from neat_align.modeling.self_check import check_training_forward
from neat_align.sampling.batch_check import SamplingWay
from neat_align.sampling.protocol import SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from tiny import Family, alone, random_model, tiny_model

VOCAB = 64
PROMPTS = [tuple(range(20, 29)), (7, 9, 11), tuple(range(40, 54)), (33, 3, 60, 15, 8)]
COMPLETIONS = [(5, 9, 30, 2, 7, 7), tuple(range(10, 19)), (50, 4), tuple(range(3, 14))]
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
# What a model does to rows beside each other, and how it is then sampled.
FAMILIES: dict[str, tuple[Any, SamplingWay]] = {
    # positions from the mask's width, and no way to say them
    "bart": (
        BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=48,
            is_decoder=True,
            is_encoder_decoder=False,
            pad_token_id=0,
            eos_token_id=2,
        ),
        "one_length",
    ),
    # positions that begin after the padding token's
    "camembert": (
        CamembertConfig(
            **SMALL,
            num_attention_heads=4,
            intermediate_size=48,
            is_decoder=True,
            pad_token_id=1,
            max_position_embeddings=128,
        ),
        "one_length",
    ),
    # no mask at all, and, while it decodes, every row sees the others'
    "rwkv": (RwkvConfig(**SMALL, context_length=128), "one_row"),
    "mamba": (MambaConfig(**SMALL, state_size=8), "together"),
    "bloom": (BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), "together"),
}


def loud(config: Any) -> torch.nn.Module:
    """A random model whose logits are not flat."""
    config.initializer_range = config.init_std = 0.2
    model = random_model(config).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def assert_scored_as_alone(model: torch.nn.Module, layout: Layout = "padded") -> None:
    scored = score_completions(
        model, PROMPTS, COMPLETIONS, layout=layout, pad_token_id=0, autocast_dtype=None
    )
    for p, c, row in zip(PROMPTS, COMPLETIONS, scored, strict=True):
        assert row == pytest.approx(alone(model, p, c), abs=1e-4)


def assert_sampled_as_alone(model: torch.nn.Module) -> SamplingWay | None:
    sampler = TransformersSampler(model, (2,), 0)
    requests = [SampleRequest(p, i) for i, p in enumerate(PROMPTS)]
    drawn = sampler.sample(requests, SamplingParams(8))
    for r, sample in zip(requests, drawn, strict=True):
        expected = sum(alone(model, r.prompt_ids, sample.token_ids))
        assert sample.logprob == pytest.approx(expected, abs=1e-3)
    # The tokens of a completion depend on its request alone.
    assert [sampler.sample([r], SamplingParams(8))[0].token_ids for r in requests] == [
        s.token_ids for s in drawn
    ]
    return sampler.known_way.way


# ---- alone and in a batch ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_misreads_the_mask_is_scored_and_sampled_as_alone(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, way = FAMILIES[family]
    model = loud(config)
    assert_scored_as_alone(model)
    assert assert_sampled_as_alone(model) == way
    warned = [r.message for r in caplog.records if "correct but slower" in r.message]
    assert len(warned) == (way != "together")
    assert all(type(model).__name__ in m and "nats per token" in m for m in warned)


PROMPT_LEARNING = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", PROMPT_LEARNING)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_virtual_tokens_stand_before_the_prompt_and_not_before_its_padding(
    family: Family, kind: str
) -> None:
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(
        tiny_model(family, VOCAB), copy.deepcopy(PROMPT_LEARNING[kind])
    ).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.5)
    assert_scored_as_alone(model)
    assert_sampled_as_alone(model)


def neighbourly() -> Any:
    model = tiny_model("llama", VOCAB).eval()
    forward = type(model).forward

    class Neighbourly(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = forward(self, *args, **kwargs)
            out.logits = out.logits + out.logits.mean(0, keepdim=True)
            return out

    model.__class__ = Neighbourly
    return model


def test_a_model_whose_rows_see_each_other_goes_one_row_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = neighbourly()
    layout = choose_layout(model, PROMPTS[:2], pad_token_id=0, longest=50)
    assert layout == "unpadded"
    (record,) = caplog.records
    assert "Neighbourly" in record.message
    assert "nats per token apart). Rows go through it one at a time" in record.message
    assert_scored_as_alone(model, layout)
    assert assert_sampled_as_alone(model) == "one_row"


def test_a_model_that_decodes_wrongly_is_sampled_without_a_cache() -> None:
    model = tiny_model("llama", VOCAB).eval()
    forward = type(model).forward

    class Forgetful(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = forward(self, *args, **kwargs)
            if kwargs["input_ids"].shape[1] == 1:
                out.logits = out.logits.roll(1, -1)
            return out

    model.__class__ = Forgetful
    assert assert_sampled_as_alone(model) == "whole"


def test_a_model_that_sees_what_it_should_predict_is_refused() -> None:
    model = loud(XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48))
    with pytest.raises(ConfigError, match=r"XLNetLMHeadModel sees the words.*causal"):
        choose_layout(model, PROMPTS[:2], pad_token_id=0, longest=50)


def test_a_model_that_is_random_in_evaluation_is_refused() -> None:
    model = tiny_model("llama", VOCAB).eval()
    model.lm_head.register_forward_hook(lambda _, __, out: out + torch.randn_like(out))
    with pytest.raises(ConfigError, match="LlamaForCausalLM gives the same row other log-probab"):
        choose_layout(model, PROMPTS[:2], pad_token_id=0, longest=50)


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (
            peft.MultitaskPromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2
            ),
            r"MULTITASK_PROMPT_TUNING.*task_ids",
        ),
        (
            peft.LoraConfig(
                task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[7]
            ),
            "alora_invocation_tokens",
        ),
    ],
)
def test_an_adapter_that_needs_more_than_token_ids_is_refused(config: Any, needed: str) -> None:
    model = peft.get_peft_model(tiny_model("llama", VOCAB), config)
    with pytest.raises(ConfigError, match=needed):
        choose_layout(model, PROMPTS[:2], pad_token_id=0, longest=50)


# ---- training and evaluation ---------------------------------------------------------------------

MIXTRAL = {
    **SMALL,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "initializer_range": 0.2,
}


def test_router_jitter_is_switched_off_with_dropout() -> None:
    model = random_model(MixtralConfig(**MIXTRAL, router_jitter_noise=0.3)).train()
    with pytest.raises(ConfigError, match=r"MixtralForCausalLM.*router_jitter_noise: 0\.3"):
        check_training_forward(model, PROMPTS)
    disable_dropout(model)
    check_training_forward(model, PROMPTS)
    assert model.training


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5),
        peft.LoHaConfig(target_modules=["q_proj"], rank_dropout=0.5, module_dropout=0.5),
        peft.LoKrConfig(target_modules=["q_proj"], rank_dropout=0.5),
        peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4, boft_dropout=0.5),
        peft.VeraConfig(target_modules=["q_proj"], r=4, vera_dropout=0.5),
    ],
    ids=lambda c: str(c.peft_type.value),
)
def test_an_adapters_dropout_is_switched_off(config: Any) -> None:
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(tiny_model("llama", VOCAB), config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.3
    with pytest.raises(ConfigError, match="in training mode"):
        check_training_forward(model, PROMPTS)
    disable_dropout(model)
    check_training_forward(model, PROMPTS)


def test_noise_of_unknown_origin_in_training_is_refused() -> None:
    """As NEFTune's hook on the embeddings, put on by the caller."""
    model = tiny_model("llama", VOCAB)
    disable_dropout(model)
    check_training_forward(model, PROMPTS)
    model.get_input_embeddings().register_forward_hook(
        lambda module, _, out: out + torch.rand_like(out) * 0.1 if module.training else out
    )
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM computes something else.*a hook"):
        check_training_forward(model, PROMPTS)


def test_experts_drawn_at_random_in_training_are_refused() -> None:
    model = random_model(
        PhimoeConfig(
            **MIXTRAL,
            num_experts_per_tok=2,
            lm_head_bias=False,
            attention_bias=False,
        )
    )
    scored = alone(model.eval(), PROMPTS[0], COMPLETIONS[0])
    disable_dropout(model)
    assert alone(model, PROMPTS[0], COMPLETIONS[0]) == scored  # what it decides by in evaluation
    with pytest.raises(ConfigError, match="PhimoeForCausalLM computes something else in training"):
        check_training_forward(model, PROMPTS)


# ---- what a configuration asks for beside logits ------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"output_router_logits": True},
        {"output_hidden_states": True},
        {"output_attentions": True, "attn_implementation": "eager"},
        {"return_dict": False},
        {"use_cache": False},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_a_configuration_that_asks_for_more_than_logits_is_sampled_and_scored(
    asked: dict[str, Any],
) -> None:
    config = MixtralConfig(**MIXTRAL, **asked)
    model = random_model(config).eval()
    plain = random_model(MixtralConfig(**MIXTRAL)).eval()
    assert assert_layouts_agree(model)
    requests = [SampleRequest(p, i) for i, p in enumerate(PROMPTS)]
    drawn = TransformersSampler(model, (2,), 0).sample(requests, SamplingParams(8))
    expected = TransformersSampler(plain, (2,), 0).sample(requests, SamplingParams(8))
    assert [s.token_ids for s in drawn] == [s.token_ids for s in expected]
    name, value = next(iter(asked.items()))
    assert getattr(model.config, name) == value  # as the user left it
    assert adds_auxiliary_loss(model) == ("output_router_logits" in asked)
    with plain_outputs(model):
        assert not adds_auxiliary_loss(model)


def assert_layouts_agree(model: torch.nn.Module) -> bool:
    packed, padded = (
        score_completions(
            model, PROMPTS, COMPLETIONS, layout=layout, pad_token_id=0, autocast_dtype=None
        )
        for layout in ("packed", "padded")
    )
    return all(a == pytest.approx(b, abs=1e-3) for a, b in zip(packed, padded, strict=True))
