from __future__ import annotations

import copy
from collections import Counter
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    GenerationConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
)

from neat_align import CollapseError
from neat_align.modeling.precision import half_precision_copy, inference
from neat_align.sampling import decode_attention
from neat_align.sampling.decode_check import fast_decoding
from neat_align.sampling.drawing import SHRINK_AT
from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from tiny import FAMILIES, LATENT_KEYS, Family, random_model, tiny_model

VOCAB = 48
PAD, EOS = 0, 2


@pytest.fixture(scope="module")
def models() -> dict[Family, PreTrainedModel]:
    return {family: tiny_model(family, VOCAB) for family in FAMILIES}


def sampler(
    model: torch.nn.Module, batch_size: int = 64, *, eos: tuple[int, ...] = (EOS,), pad: int = PAD
) -> TransformersSampler:
    return TransformersSampler(model, eos_token_ids=eos, pad_token_id=pad, batch_size=batch_size)


def requests(n: int, *, seed: int = 0) -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (n,), generator=generator).tolist()
    # The pad and the eos token are among the prompts' tokens, as in a conversation of several
    # turns.
    return [
        SampleRequest(
            tuple(torch.randint(VOCAB, (k,), generator=generator).tolist()), 2**62 + 7 * i
        )
        for i, k in enumerate(lengths)
    ]


def logits_after(model: torch.nn.Module, ids: tuple[int, ...]) -> torch.Tensor:
    """Logits of every position, from one full forward pass over one sequence without padding."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0].float()
    model.train(was_training)
    return logits


def same(a: list[Sample], b: list[Sample]) -> None:
    assert [(s.token_ids, s.finish_reason) for s in a] == [
        (s.token_ids, s.finish_reason) for s in b
    ]
    assert [s.logprob for s in a] == pytest.approx([s.logprob for s in b], abs=1e-4)


# ---- a completion depends on its prompt and seed alone -------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_and_order_do_not_change_a_completion(
    models: dict[Family, PreTrainedModel], family: Family
) -> None:
    asked, params = (
        requests(9),
        SamplingParams(max_new_tokens=7, temperature=1.3, top_p=0.95, top_k=40),
    )
    expected = sampler(models[family], 64).sample(asked, params)
    assert len({s.token_ids for s in expected}) == 9  # they are not all one answer
    for batch_size in (1, 3):
        same(sampler(models[family], batch_size).sample(asked, params), expected)
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sampler(models[family], 5).sample([asked[i] for i in order], params)
    same(shuffled, [expected[i] for i in order])


def test_another_seed_gives_another_completion(models: dict[Family, PreTrainedModel]) -> None:
    params = SamplingParams(max_new_tokens=12)
    drawn = sampler(models["llama"]).sample(
        [SampleRequest((5, 6), seed) for seed in range(16)], params
    )
    assert len({s.token_ids for s in drawn}) > 12


def test_the_global_random_state_is_neither_used_nor_changed(
    models: dict[Family, PreTrainedModel],
) -> None:
    asked, params = requests(4), SamplingParams(max_new_tokens=6)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sampler(models["llama"]).sample(asked, params)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same(sampler(models["llama"]).sample(asked, params), first)


def test_nothing_asked_gives_nothing(models: dict[Family, PreTrainedModel]) -> None:
    assert sampler(models["llama"]).sample([], SamplingParams(max_new_tokens=3)) == []


def test_progress_counts_every_completion_once(models: dict[Family, PreTrainedModel]) -> None:
    counts: list[int] = []
    sampler(models["llama"], 3).sample(
        requests(7), SamplingParams(max_new_tokens=2), progress=counts.append
    )
    assert counts == [3, 3, 1]


def test_the_transformers_sampler_keeps_the_protocol(models: dict[Family, PreTrainedModel]) -> None:
    assert isinstance(sampler(models["llama"]), Sampler)


# ---- the decode loop against `generate` ----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decode_loop_draws_what_generate_draws(
    models: dict[Family, PreTrainedModel], family: Family
) -> None:
    asked = [SampleRequest(r.prompt_ids, r.seed + i) for r in requests(6) for i in range(3)]
    params = SamplingParams(max_new_tokens=14, temperature=1.2, top_p=0.95)
    drawn = sampler(models[family], 18, eos=(2, 7, 9)).sample(asked, params)
    # Rows leave the batch at many different steps.
    assert len({len(s.token_ids) for s in drawn}) > 5
    slow = sampler(models[family], 18, eos=(2, 7, 9))
    with inference(models[family], None):
        same(drawn, slow._generate(asked, params))


def test_a_shared_prompt_is_read_once_and_ended_completions_leave_the_batch() -> None:
    model = tiny_model("llama", VOCAB)
    prompts = [(5, 6, 7, 8), (9, 10, 11)]
    asked = [SampleRequest(p, seed) for p in prompts for seed in range(8)]
    shapes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0].shape))
    )
    with inference(model, None):  # without the comparison that comes before it
        drawn = sampler(model, 16, eos=(2, 7, 9, 11, 13))._decode(
            asked, SamplingParams(max_new_tokens=20)
        )
    assert shapes[0] == (2, 4)
    assert all(width == 1 for _, width in shapes[1:])
    for step, (rows, _) in enumerate(shapes[1:], start=1):
        going_on = sum(len(s.token_ids) > step for s in drawn)
        assert going_on <= rows < going_on / (1 - SHRINK_AT) + 1
    assert len(shapes) == max(len(s.token_ids) for s in drawn)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_by_products_is_torchs_kernel(
    models: dict[Family, PreTrainedModel], family: Family
) -> None:
    model, asked, params = models[family], requests(12), SamplingParams(max_new_tokens=10)
    assert model.config._attn_implementation == "sdpa"
    with inference(model, None), fast_decoding(model):
        assert model.config._attn_implementation == "neat_decode_shared_prompts"
    fast = sampler(model).sample(asked, params)
    assert model.config._attn_implementation == "sdpa"
    with inference(model, None):
        same(fast, sampler(model)._decode(asked, params))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_precision_copy_decodes_by_products_too(
    models: dict[Family, PreTrainedModel], family: Family
) -> None:
    half = half_precision_copy(models[family], torch.bfloat16)
    with inference(half, None), fast_decoding(half):
        assert half.config._attn_implementation == "neat_decode_shared_prompts"
    assert half.config._attn_implementation == "sdpa"


def test_other_attention_is_left_alone(models: dict[Family, PreTrainedModel]) -> None:
    model = copy.deepcopy(models["llama"])
    model.set_attn_implementation("eager")
    with fast_decoding(model):
        assert model.config._attn_implementation == "eager"


def test_a_model_that_keeps_a_state_is_drawn_with_generate() -> None:
    model = random_model(
        MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    asked, params = (
        [SampleRequest((5, 6, 7), seed) for seed in range(4)],
        SamplingParams(max_new_tokens=5),
    )
    drawn = sampler(model).sample(asked, params)
    assert len({s.token_ids for s in drawn}) == 4
    same(sampler(model, 1).sample(asked, params), drawn)


SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
WIDER: dict[str, Any] = {
    **SMALL,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# A window that a prompt passes; a bound on attention; a family that looks at its attention's name;
# one that mixes convolutions with attention; one whose values are narrower than its keys.
ODD: dict[str, Any] = {
    "mistral": MistralConfig(**WIDER, sliding_window=4),
    "gemma2": Gemma2Config(
        **WIDER,
        head_dim=8,
        sliding_window=5,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "falcon": FalconConfig(**SMALL, alibi=False, new_decoder_architecture=False),
    "lfm2": Lfm2Config(**WIDER, layer_types=["conv", "full_attention"]),
    "deepseek": DeepseekV3Config(**{**WIDER, "num_key_value_heads": 4}, **LATENT_KEYS),
}


def test_products_that_disagree_with_torchs_kernel_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_mask(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **others: Any
    ) -> Any:
        return decode(
            module, query, key, value, None if query.shape[2] == 1 else attention_mask, **others
        )

    decode = decode_attention.decode_attention
    # One with a window, whose prompts are not shared.
    model = random_model(ODD["mistral"])
    with inference(model, None), fast_decoding(model):
        assert model.config._attn_implementation == "neat_decode"
    monkeypatch.setattr(decode_attention, "decode_attention", without_mask)
    with inference(model, None), fast_decoding(model):
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ODD)
def test_other_families_are_sampled_as_their_full_forward_pass_says(family: str) -> None:
    model = random_model(ODD[family])
    asked = [SampleRequest(r.prompt_ids, r.seed + i) for r in requests(4) for i in range(2)]
    drawn = sampler(model).sample(asked, SamplingParams(max_new_tokens=8))
    assert len({len(r.prompt_ids) for r in asked}) > 2
    for request, s in zip(asked, drawn, strict=True):
        logps = logits_after(model, request.prompt_ids + s.token_ids).log_softmax(-1)[
            len(request.prompt_ids) - 1 : -1
        ]
        assert s.logprob == pytest.approx(
            float(logps.gather(-1, torch.tensor(s.token_ids)[:, None]).sum()), abs=1e-3
        )


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_come_once(config: Any) -> None:
    model = get_peft_model(
        tiny_model("llama", VOCAB), config(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    asked = [SampleRequest((5, 6, 7, 8), seed) for seed in range(3)]
    for s in sampler(model).sample(asked, SamplingParams(max_new_tokens=6)):
        ids = torch.tensor([(5, 6, 7, 8, *s.token_ids)])
        with torch.no_grad():
            logps = (
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
                .logits[0, -len(s.token_ids) - 1 : -1]
                .log_softmax(-1)
            )
        assert s.logprob == pytest.approx(
            float(logps.gather(-1, torch.tensor(s.token_ids)[:, None]).sum()), abs=1e-3
        )


def test_broken_weights_are_an_error_and_not_a_token(models: dict[Family, PreTrainedModel]) -> None:
    model = copy.deepcopy(models["llama"])
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(CollapseError, match="not finite"):
        sampler(model).sample(requests(2), SamplingParams(max_new_tokens=2))


# ---- log-probabilities and stopping --------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_log_probability_is_the_untempered_one_of_a_full_forward_pass(
    models: dict[Family, PreTrainedModel], family: Family
) -> None:
    # Temperature, top-p and top-k shape the draw; none of them may shape the number.
    asked, params = (
        requests(10),
        SamplingParams(max_new_tokens=7, temperature=0.7, top_p=0.9, top_k=20),
    )
    for request, drawn in zip(asked, sampler(models[family], 5).sample(asked, params), strict=True):
        logps = logits_after(models[family], request.prompt_ids + drawn.token_ids).log_softmax(-1)
        first = len(request.prompt_ids)
        expected = sum(
            float(logps[first + t - 1, token]) for t, token in enumerate(drawn.token_ids)
        )
        # Sums of up to ten fp32 log-probabilities, cached and left-padded against full: 1e-4 nats
        # is a hundred times the noise seen.
        assert drawn.logprob == pytest.approx(expected, abs=1e-4)


def test_an_answer_that_ends_holds_its_end_token_once_and_a_cut_one_holds_none(
    models: dict[Family, PreTrainedModel],
) -> None:
    asked = [SampleRequest((5, 9), seed) for seed in range(200)]
    drawn = sampler(models["llama"], eos=(2, 7)).sample(asked, SamplingParams(max_new_tokens=12))
    reasons = Counter(s.finish_reason for s in drawn)
    assert min(reasons["stop"], reasons["length"]) > 10
    assert {s.token_ids[-1] for s in drawn if s.finish_reason == "stop"} == {2, 7}
    for s in drawn:
        if s.finish_reason == "stop":
            assert s.token_ids[-1] in (2, 7)
            assert not {2, 7} & set(s.token_ids[:-1])
        else:
            assert len(s.token_ids) == 12
            assert not {2, 7} & set(s.token_ids)
    # The end token may be the last that fits: max_new_tokens counts it.
    assert any(s.finish_reason == "stop" and len(s.token_ids) == 12 for s in drawn)


def test_pad_may_be_the_end_token(models: dict[Family, PreTrainedModel]) -> None:
    asked, params = requests(24), SamplingParams(max_new_tokens=10)
    assert any(EOS in r.prompt_ids for r in asked)
    apart = sampler(models["gpt2"], 24).sample(asked, params)
    together = sampler(models["gpt2"], 24, pad=EOS).sample(asked, params)
    assert len({len(s.token_ids) for s in apart}) > 3  # some rows wait, padded, for others
    same(together, apart)


def test_a_pad_token_that_the_policy_writes_is_a_token(
    models: dict[Family, PreTrainedModel],
) -> None:
    drawn = sampler(models["llama"]).sample(
        [SampleRequest((5,), s) for s in range(100)], SamplingParams(max_new_tokens=10)
    )
    assert any(PAD in s.token_ids[:-1] for s in drawn)


# ---- the distribution ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.0, 0.7, 0), (1.7, 1.0, 5)]
)
def test_first_tokens_follow_the_warped_softmax(
    models: dict[Family, PreTrainedModel], temperature: float, top_p: float, top_k: int
) -> None:
    prompt, n = (5, 9, 11), 4000
    drawn = sampler(models["llama"], 1000).sample(
        [SampleRequest(prompt, seed) for seed in range(n)],
        SamplingParams(1, temperature, top_p, top_k),
    )
    probabilities = (logits_after(models["llama"], prompt)[-1].double() / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    kept = order[: top_k or VOCAB]
    probabilities = torch.zeros_like(probabilities).index_put(
        (kept,), probabilities[kept] / probabilities[kept].sum()
    )
    if top_p < 1:  # the fewest likeliest tokens whose mass reaches top_p
        mass = probabilities[order].cumsum(-1)
        kept = order[: int((mass < top_p).sum()) + 1]
        probabilities = torch.zeros_like(probabilities).index_put(
            (kept,), probabilities[kept] / probabilities[kept].sum()
        )
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in drawn]), minlength=VOCAB).double()
    assert not counts[probabilities == 0].any()
    # Pearson's chi-square over the tokens expected at least five times, the rest in one cell. Its
    # mean is `cells − 1`, its standard deviation sqrt(2 · (cells − 1)): five of them above the mean
    # is far out for a right sampler, and a wrong temperature or support is hundreds above.
    common = probabilities * n >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([probabilities[common] * n, (probabilities[~common].sum() * n)[None]])
    cells = expected > 1e-9
    chi_square = float(((observed - expected)[cells] ** 2 / expected[cells]).sum())
    freedom = int(cells.sum()) - 1
    assert freedom >= 2
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
    # The seeds are fixed, so this is no coin toss: 4000 draws are near the distribution in total
    # variation, too.
    assert float((counts / n - probabilities).abs().sum() / 2) < 0.06


def test_a_low_temperature_is_greedy(models: dict[Family, PreTrainedModel]) -> None:
    drawn = sampler(models["llama"]).sample(
        [SampleRequest((5, 9), s) for s in range(20)], SamplingParams(1, temperature=1e-4)
    )
    assert {s.token_ids for s in drawn} == {
        (int(logits_after(models["llama"], (5, 9))[-1].argmax()),)
    }


# ---- nothing of the model's own settings gets in -------------------------------------------------


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 5.0},
        {"do_sample": True, "temperature": 0.01},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_p": 0.01},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 4},
        {"max_length": 3},
        {"max_new_tokens": 1},
        {"min_new_tokens": 6},
        {"eos_token_id": list(range(VOCAB))},
        {"suppress_tokens": list(range(3, 30))},
        {"bad_words_ids": [[i] for i in range(3, 30)]},
        {"forced_eos_token_id": 9},
        {"encoder_repetition_penalty": 5.0},
        {"stop_strings": ["a"]},
    ],
    ids="+".join,
)
def test_the_models_generation_config_does_not_shape_the_draw(
    models: dict[Family, PreTrainedModel], own: dict[str, object]
) -> None:
    asked, params = requests(6), SamplingParams(max_new_tokens=6)
    model = copy.deepcopy(models["llama"])
    expected = sampler(model).sample(asked, params)
    model.generation_config = GenerationConfig(**own)
    same(sampler(model).sample(asked, params), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_put_back_and_dropout_is_off(training: bool) -> None:
    model = tiny_model("gpt2", VOCAB).train(training)
    asked, params = requests(6), SamplingParams(max_new_tokens=8)
    first = sampler(model).sample(asked, params)
    assert model.training is training
    same(sampler(model).sample(asked, params), first)


def test_the_training_flag_is_put_back_after_a_failure(
    models: dict[Family, PreTrainedModel],
) -> None:
    model = models["llama"].train()
    with pytest.raises((IndexError, RuntimeError)):
        sampler(model).sample([SampleRequest((VOCAB + 5,), 0)], SamplingParams(max_new_tokens=2))
    assert model.training


# ---- the copy that samples in half precision -----------------------------------------------------


def test_buffers_of_the_copy_stay_in_fp32() -> None:
    model = tiny_model("llama", VOCAB)
    copied = half_precision_copy(model, torch.bfloat16)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    rotary = {name: b for name, b in copied.named_buffers() if "inv_freq" in name}
    assert rotary
    assert {b.dtype for b in rotary.values()} == {torch.float32}
    originals = dict(model.named_buffers())
    assert all(torch.equal(b, originals[name]) for name, b in rotary.items())
    assert not copied.training
    assert not any(p.requires_grad for p in copied.parameters())


def test_the_copy_leaves_the_original_alone() -> None:
    model = tiny_model("qwen2", VOCAB)
    before = copy.deepcopy(model.state_dict())
    copied = half_precision_copy(model, torch.bfloat16)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


def test_tied_weights_stay_tied_in_the_copy() -> None:
    copied = half_precision_copy(tiny_model("gpt2", VOCAB), torch.bfloat16)
    model = cast("PreTrainedModel", copied)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_an_adapter_is_merged_into_the_copy() -> None:
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_model("llama", VOCAB), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    ids = tuple(range(3, 20))
    adapted = logits_after(model, ids)
    with model.disable_adapter():
        plain = logits_after(model, ids)
    before = copy.deepcopy(model.state_dict())
    exact = half_precision_copy(model, torch.float32)
    assert not any("lora" in name for name, _ in exact.named_parameters())
    torch.testing.assert_close(logits_after(exact, ids), adapted, rtol=1e-4, atol=1e-4)
    copied = half_precision_copy(model, torch.bfloat16)
    # bf16 keeps eight bits; through two layers the logits stay within a few hundredths of their
    # spread.
    error = (logits_after(copied, ids) - adapted).norm() / adapted.norm()
    assert error < 0.05
    assert (plain - adapted).norm() / adapted.norm() > 0.2  # and the adapter does matter
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_copy_is_sampled_from_like_any_model() -> None:
    model = tiny_model("llama", VOCAB)
    asked, params = requests(8), SamplingParams(max_new_tokens=8)
    drawn = sampler(half_precision_copy(model, torch.bfloat16)).sample(asked, params)
    for request, s in zip(asked, drawn, strict=True):
        logps = logits_after(model, request.prompt_ids + s.token_ids).log_softmax(-1)[
            len(request.prompt_ids) - 1 : -1
        ]
        expected = float(logps.gather(-1, torch.tensor(s.token_ids)[:, None]).sum())
        assert s.logprob == pytest.approx(expected, abs=0.05 * len(s.token_ids) + 0.05)
