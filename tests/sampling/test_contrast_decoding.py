"""Decoding from the contrast of instructions: inside of `generate` and as a sampler, against a slow
reference that reads every row from its beginning, alone, and writes the formula out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    FalconConfig,
    GenerationConfig,
    Lfm2Config,
    LogitsProcessorList,
    MambaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from neat_align import ConfigError, ContrastLogitsProcessor, PromptError, contrast_processor
from neat_align.modeling.precision import half_precision_copy
from neat_align.prompts.instruction_banks import InstructionBank, load_bank
from neat_align.prompts.row_prompts import instructed_prompt_ids
from neat_align.prompts.rows import Prompt
from neat_align.sampling import contrast_decoding
from neat_align.sampling.contrast_decoding import Contrast, contrasted
from neat_align.sampling.contrast_sampler import ContrastSampler
from neat_align.sampling.protocol import Sampler, SampleRequest, SamplingParams
from neat_align.sampling.token_rows import CachedRows, RecomputedRows
from neat_align.sampling.transformers_sampler import TransformersSampler
from odd_models import PAD, SIZES, VOCAB, WINDOWED
from tiny import FAMILIES, NO_SYSTEM, random_model, tiny_model, tiny_tokenizer


def with_lora() -> torch.nn.Module:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(tiny_model("llama", VOCAB), config)


def with_virtual_tokens() -> torch.nn.Module:
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    return get_peft_model(tiny_model("llama", VOCAB), config)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    **{family: lambda family=family: tiny_model(family, VOCAB) for family in FAMILIES},
    **WINDOWED,
    "falcon, alibi": lambda: random_model(FalconConfig(**SIZES, alibi=True)),
    "mamba, a state": lambda: random_model(
        MambaConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=None
        )
    ),
    "lfm2, a state and keys": lambda: random_model(
        Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    ),
    "lora": with_lora,
    "virtual tokens": with_virtual_tokens,
}
MIND_PADDING = ("virtual tokens",)
Ids = tuple[int, ...]


def ids(n: int, seed: int) -> Ids:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCAB, (n,), generator=generator).tolist())


# Lengths differ among the prompts and among a prompt's contexts; the pad token is among the tokens.
PROMPTS = [ids(4, 1), ids(9, 2), ids(1, 3)]
PAIRS = [
    [(ids(7 + i + 2 * k, 10 * i + k), ids(11 - 3 * k, 50 + 10 * i + k)) for k in range(2)]
    for i in range(3)
]


def predictions(model: torch.nn.Module, context: Ids, answer: Ids) -> torch.Tensor:
    """Logits of each token of the answer and of what follows it, float64, from the row alone."""
    row = torch.tensor([(*context, *answer)])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model(input_ids=row, attention_mask=torch.ones_like(row))
    model.train(was_training)
    return out.logits[0, -len(answer) - 1 :].double()


def slow(
    model: torch.nn.Module,
    prompt: Ids,
    pairs: Sequence[tuple[Ids, Ids]],
    answer: Ids,
    *,
    alpha: float,
    beta: float = 0.05,
    clip: float = math.inf,
) -> list[torch.Tensor]:
    """log q at each token of the answer and of what follows it; the formula as it is written."""
    start = predictions(model, prompt, answer).softmax(-1)
    ratios = [
        predictions(model, positive, answer).log_softmax(-1)
        - predictions(model, negative, answer).log_softmax(-1)
        for positive, negative in pairs
    ]
    found = []
    for t, p in enumerate(start.tolist()):
        clipped = [[min(max(x, -clip), clip) for x in ratio[t].tolist()] for ratio in ratios]
        moved = [v for v in range(VOCAB) if p[v] >= beta * max(p)]
        q = list(p)
        for v in moved:
            q[v] *= math.exp(alpha * sum(each[v] for each in clipped) / len(clipped))
        scale = sum(p[v] for v in moved) / sum(q[v] for v in moved)
        for v in moved:
            q[v] *= scale
        found.append(torch.tensor(q, dtype=torch.float64).log())
    return found


def generate(model: Any, processor: ContrastLogitsProcessor, **options: Any) -> Any:
    was_training = model.training
    model.eval()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.generation_config = GenerationConfig()
    settings = {"max_new_tokens": 6, "pad_token_id": PAD, "do_sample": False, **options}
    given = {**processor.inputs(), **settings}
    out = model.generate(
        **given,
        logits_processor=LogitsProcessorList([processor]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    model.train(was_training)
    return out


def answers(out: Any, width: int) -> list[Ids]:
    return [tuple(row) for row in out.sequences[:, width:].tolist()]


WIDTH = max(map(len, PROMPTS))


# ---- inside of generate --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_generate_decodes_from_the_slow_formula(name: str, do_sample: bool) -> None:
    model = MODELS[name]()
    # Models whose own `generate` minds padding are given prompts of one length.
    prompts = [ids(5, seed) for seed in range(3)] if name in MIND_PADDING else PROMPTS
    processor = ContrastLogitsProcessor(model, prompts, PAIRS, alpha=0.7)
    torch.manual_seed(4)
    out = generate(model, processor, do_sample=do_sample, top_k=0)
    drawn = answers(out, max(map(len, prompts)))
    for i, answer in enumerate(drawn):
        for t, log_q in enumerate(slow(model, prompts[i], PAIRS[i], answer, alpha=0.7)[:-1]):
            # Cached and padded fp32 against fp64 sums of rows alone.
            torch.testing.assert_close(out.scores[t][i].double(), log_q, atol=1e-3, rtol=0)
            if not do_sample:
                assert answer[t] == int(log_q.argmax())
    assert len(set(drawn)) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.0, "min_p": 0.0},
        {"alpha": 1.5, "min_p": 0.3},
        {"alpha": 1.0, "min_p": 0.0, "clip": 0.4},
        {"alpha": 0.5, "min_p": 0.1, "clip": 2.0},
    ],
)
def test_every_option_is_in_the_formula(options: dict[str, Any]) -> None:
    model = tiny_model("llama", VOCAB)
    processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS, **options)
    out = generate(model, processor)
    options["beta"] = options.pop("min_p")
    for i, answer in enumerate(answers(out, WIDTH)):
        for t, log_q in enumerate(slow(model, PROMPTS[i], PAIRS[i], answer, **options)[:-1]):
            torch.testing.assert_close(out.scores[t][i].double(), log_q, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral, a short window", "lora"])
def test_a_prompt_alone_is_decoded_as_in_a_batch(name: str) -> None:
    model = MODELS[name]()
    together = answers(generate(model, ContrastLogitsProcessor(model, PROMPTS, PAIRS)), WIDTH)
    for i, prompt in enumerate(PROMPTS):
        alone = ContrastLogitsProcessor(model, [prompt], [PAIRS[i]])
        assert answers(generate(model, alone), len(prompt)) == [together[i]]


def test_alpha_0_is_plain_generate() -> None:
    model = tiny_model("llama", VOCAB).eval()
    processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS, alpha=0.0)
    plain = model.generate(
        **processor.inputs(), max_new_tokens=6, pad_token_id=PAD, do_sample=False
    )
    out = generate(model, processor)
    assert torch.equal(out.sequences, plain)
    assert processor._rows is None  # nothing was read for it
    moved = generate(model, ContrastLogitsProcessor(model, PROMPTS, PAIRS, alpha=1.0))
    assert not torch.equal(moved.sequences, plain)


def test_every_token_after_the_first_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", VOCAB)
    processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS)
    read: list[tuple[int, ...]] = []
    embeddings: Any = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape))
    generate(model, processor, max_new_tokens=4)
    hook.remove()
    # The plain rows and the twelve instructed ones, each once and then token by token.
    assert read == [(3, 9), (12, 11), *[(3, 1), (12, 1)] * 3]


def test_the_prompts_are_made_a_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", VOCAB)
    made: list[int] = []
    padded = contrast_decoding.left_padded

    def counted(prompts: Any, *rest: Any) -> Any:
        made.append(len(prompts))
        return padded(prompts, *rest)

    monkeypatch.setattr(contrast_decoding, "left_padded", counted)
    processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS)
    first = answers(generate(model, processor, max_new_tokens=5), WIDTH)
    processor.inputs()["input_ids"].fill_(1)  # the caller's own
    assert answers(generate(model, processor, max_new_tokens=5), WIDTH) == first
    assert made == [3]


def test_a_processor_serves_many_calls() -> None:
    model = tiny_model("qwen2", VOCAB)
    processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS)
    first = answers(generate(model, processor), WIDTH)
    assert answers(generate(model, processor), WIDTH) == first
    # One token, twice: the second call begins where the first began.
    for _ in range(2):
        assert answers(generate(model, processor, max_new_tokens=1), WIDTH) == [
            a[:1] for a in first
        ]
    # Other weights between the calls: nothing of the old ones is used.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = answers(generate(model, processor), WIDTH)
    assert after == answers(generate(model, ContrastLogitsProcessor(model, PROMPTS, PAIRS)), WIDTH)
    assert after != first
    processor.reset()
    assert processor._rows is None


@pytest.mark.parametrize("begun", [1, 2, 4])
def test_an_answer_is_gone_on_with(begun: int) -> None:
    model = tiny_model("llama", VOCAB)
    processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS)
    out = generate(model, processor)
    given = processor.inputs()
    sequences = out.sequences[:, : WIDTH + begun]
    mask = torch.nn.functional.pad(given["attention_mask"], (0, begun), value=1)
    for fresh in (processor, ContrastLogitsProcessor(model, PROMPTS, PAIRS)):
        went_on = generate(
            model, fresh, input_ids=sequences, attention_mask=mask, max_new_tokens=6 - begun
        )
        assert torch.equal(went_on.sequences, out.sequences)


def test_several_answers_to_a_prompt() -> None:
    model = tiny_model("llama", VOCAB)
    processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS, alpha=0.7)
    torch.manual_seed(0)
    out = generate(model, processor, do_sample=True, top_k=0, num_return_sequences=3)
    drawn = answers(out, WIDTH)
    assert len(set(drawn)) == 9
    for i in (0, 4, 8):
        expected = slow(model, PROMPTS[i // 3], PAIRS[i // 3], drawn[i], alpha=0.7)[4]
        torch.testing.assert_close(out.scores[4][i].double(), expected, atol=1e-3, rtol=0)


def test_beams_are_those_of_the_slow_formula() -> None:
    """Beam search itself, written out over the slow distribution."""
    model = tiny_model("llama", VOCAB)
    processor = ContrastLogitsProcessor(model, PROMPTS[:2], PAIRS[:2])
    out = generate(model, processor, num_beams=3, max_new_tokens=5)
    for i in range(2):
        beams: list[tuple[float, Ids]] = [(0.0, ())]
        for _ in range(5):
            grown = []
            for score, answer in beams:
                log_q = slow(model, PROMPTS[i], PAIRS[i], answer, alpha=1.0)[-1]
                grown += [(score + float(log_q[v]), (*answer, v)) for v in range(VOCAB)]
            beams = sorted(grown, reverse=True)[:3]
        assert answers(out, WIDTH)[i] == beams[0][1]


def test_beams_keep_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", VOCAB)
    processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS)
    anew: list[int] = []
    read_rows = contrast_decoding.read_rows
    monkeypatch.setattr(
        contrast_decoding, "read_rows", lambda *a: anew.append(len(a[1])) or read_rows(*a)
    )
    generate(model, processor, num_beams=4, max_new_tokens=8)
    assert anew == [3 * 4 * 4]


def test_an_assistant_model_changes_no_token() -> None:
    model, assistant = tiny_model("llama", VOCAB), tiny_model("llama", VOCAB, seed=1).eval()
    processor = ContrastLogitsProcessor(model, PROMPTS[:1], PAIRS[:1])
    assistant.generation_config = GenerationConfig()
    alone = answers(generate(model, processor, max_new_tokens=8), 4)
    model.eval()
    assisted = model.generate(
        **processor.inputs(),
        assistant_model=assistant,
        logits_processor=LogitsProcessorList([processor]),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=PAD,
    )
    assert [tuple(row) for row in assisted[:, 4:].tolist()] == alone


def test_rows_that_end_early_do_not_disturb_the_others() -> None:
    model = tiny_model("llama", VOCAB)
    free = answers(generate(model, ContrastLogitsProcessor(model, PROMPTS, PAIRS)), WIDTH)
    end = free[1][2]
    out = generate(model, ContrastLogitsProcessor(model, PROMPTS, PAIRS), eos_token_id=end)
    for i, answer in enumerate(answers(out, WIDTH)):
        stop = free[i].index(end) + 1 if end in free[i] else 6
        assert answer[:stop] == free[i][:stop]


def test_rows_may_be_padded_further() -> None:
    model = tiny_model("gpt2", VOCAB)
    processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS)
    expected = answers(generate(model, processor), WIDTH)
    given = {k: torch.nn.functional.pad(v, (7, 0)) for k, v in processor.inputs().items()}
    assert answers(generate(model, processor, **given), WIDTH + 7) == expected


def test_what_generate_suppresses_stays_suppressed() -> None:
    model = tiny_model("llama", VOCAB)
    free = answers(generate(model, ContrastLogitsProcessor(model, PROMPTS, PAIRS)), WIDTH)
    gone = sorted({answer[0] for answer in free})
    for beta in (0.0, 0.05):
        processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS, min_p=beta)
        out = generate(model, processor, suppress_tokens=gone)
        assert not {token for answer in answers(out, WIDTH) for token in answer} & set(gone)
        assert not any(scores.isnan().any() for scores in out.scores)


def test_a_token_that_the_model_rules_out_has_no_contrast() -> None:
    start = torch.tensor([[0.5, 0.5, 0.0]]).log()
    under = torch.tensor([[[0.9, 0.1, 0.0], [0.5, 0.5, 0.0]]]).log()
    for beta in (0.0, 0.05):
        found = contrasted(start, under, Contrast(1.0, beta)).exp()
        # 0.5·1.8 : 0.5·0.2
        torch.testing.assert_close(found, torch.tensor([[0.9, 0.1, 0.0]]))


def test_autocast_and_dropout_are_as_around_generate() -> None:
    """In training mode the instructed rows have no dropout, and autocast is in them too."""
    model = tiny_model("gpt2", VOCAB)
    model.train()
    processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS, alpha=1.0, min_p=0.0)
    rows = processor.inputs()["input_ids"]
    scores = torch.zeros(3, VOCAB)
    first = processor(rows, scores)
    assert torch.equal(processor(rows, scores), first)
    assert model.training
    with torch.autocast("cpu", torch.bfloat16):
        cast = processor(rows, scores)
        assert torch.is_autocast_enabled("cpu")
    assert not torch.equal(cast, first)
    torch.testing.assert_close(cast, first, atol=0.2, rtol=0)


@pytest.mark.parametrize(
    ("prompts", "pairs", "message"),
    [
        ([], [], "there are 0 prompts and pairs for 0"),
        (PROMPTS, PAIRS[:2], "there are 3 prompts and pairs for 2"),
        (PROMPTS[:1], [[]], "the prompts have 0 pairs; all must have equally many, and at least"),
        (PROMPTS, [*PAIRS[:2], PAIRS[2][:1]], "the prompts have 1, 2 pairs"),
        ([()], PAIRS[:1], "a prompt is empty"),
        (PROMPTS[:1], [[((), (1,))]], "a prompt is empty"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(
    prompts: list[Ids], pairs: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ContrastLogitsProcessor(tiny_model("llama", VOCAB), prompts, pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.5}, "alpha is -0.5; it must be a number of 0 or more"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"min_p": 1.0}, "min_p is 1.0; it must be 0"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"clip": 0.0}, "clip is 0.0; it must be above 0 nats, or None"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ContrastLogitsProcessor(tiny_model("llama", VOCAB), PROMPTS, PAIRS, **options)


def test_other_rows_than_its_own_are_refused() -> None:
    model = tiny_model("llama", VOCAB)
    processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS)
    given = processor.inputs()
    swapped = {name: rows[[0, 2, 1]] for name, rows in given.items()}
    with pytest.raises(ConfigError, match=r"row 2 of what generate was given does not begin with"):
        generate(model, processor, **swapped)
    fewer = {name: rows[:2] for name, rows in given.items()}
    with pytest.raises(ConfigError, match=r"generate has 2 rows, and the contrast was made for 3"):
        generate(model, processor, **fewer)
    short = {name: rows[:, :4] for name, rows in given.items()}
    with pytest.raises(ConfigError, match=r"row 1 of what generate was given"):
        generate(model, processor, **short)


def test_an_answer_that_passes_the_context_is_refused() -> None:
    model = tiny_model("gpt2", VOCAB)
    long = [[(ids(510, 1), ids(5, 2))]]
    processor = ContrastLogitsProcessor(model, PROMPTS[:1], long)
    assert generate(model, processor, max_new_tokens=3).sequences.shape == (1, 7)
    message = r"510 tokens under its instructions, and with 3 tokens .* context of 512: lower max_n"
    with pytest.raises(ConfigError, match=message):
        generate(model, processor, max_new_tokens=4)


def test_prompts_of_unequal_lengths_are_refused_where_padding_is_minded() -> None:
    message = "gives a padded prompt other numbers than the prompt alone.*for each length"
    with pytest.raises(ConfigError, match=message):
        ContrastLogitsProcessor(with_virtual_tokens(), PROMPTS, PAIRS)


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match=r"T5ForConditionalGeneration has an encoder"):
        ContrastLogitsProcessor(T5ForConditionalGeneration(config), PROMPTS, PAIRS)


# ---- from prompts and a bank ---------------------------------------------------------------------

TOKENIZER = tiny_tokenizer()
QUESTIONS: list[Prompt] = [
    [{"role": "user", "content": "How do I say that I am sorry?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What now?"}],
]


@pytest.mark.parametrize("placement", ["system", "user_suffix", "affix"])
def test_prompts_are_rendered_and_instructed_as_in_training(placement: Any) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    processor = contrast_processor(
        model, TOKENIZER, QUESTIONS, "politeness", placement=placement, num_pairs=2
    )
    bank = load_bank("politeness")
    for i, prompt in enumerate(QUESTIONS):
        given = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert processor.prompts[i] == tuple(given)
        found = processor._contexts[i]
        rendered = {
            (
                tuple(instructed_prompt_ids(TOKENIZER, prompt, pair.positive, placement)),
                tuple(instructed_prompt_ids(TOKENIZER, prompt, pair.negative, placement)),
            )
            for pair in bank.pairs
        }
        pairs = {found[:2], found[2:]}
        assert len(pairs) == 2
        assert pairs <= rendered
    rows = processor.inputs()
    on_the_left = tiny_tokenizer()
    on_the_left.padding_side = "left"
    padded = on_the_left.apply_chat_template(
        QUESTIONS,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert torch.equal(rows["input_ids"], padded["input_ids"])
    assert torch.equal(rows["attention_mask"], padded["attention_mask"])


def test_the_pairs_depend_on_the_prompt_and_the_seed_alone() -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)

    def contexts(prompts: list[Prompt], **options: Any) -> list[tuple[Ids, ...]]:
        made = contrast_processor(model, TOKENIZER, prompts, "politeness", **options)
        return made._contexts

    both = contexts(QUESTIONS)
    assert contexts(QUESTIONS[::-1]) == both[::-1]
    assert contexts(QUESTIONS[1:]) == both[1:]
    assert contexts(QUESTIONS, seed=1) != both
    assert len(both[0]) == 6
    bank = load_bank("politeness")
    assert len(contexts(QUESTIONS, num_pairs=1000)[0]) == 2 * len(bank.pairs)
    one = InstructionBank("mine", "", bank.pairs[:1])
    plain = contrast_processor(model, TOKENIZER, ["Say it."], one)
    assert len(plain._contexts[0]) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_pairs": 0}, ConfigError, "num_pairs is 0; it must be 1 or more"),
        ({"bank": "politness"}, PromptError, "Did you mean 'politeness'?"),
        ({"placement": "middle"}, PromptError, "the instruction placement is 'middle'"),
        ({"alpha": -1.0}, ConfigError, "alpha is -1.0"),
        ({"prompts": []}, ConfigError, "there are 0 prompts"),
        (
            {"prompts": ["Say it."], "chat_template_kwargs": {"enable_thinking": False}},
            PromptError,
            "chat_template_kwargs are for a chat template, and the prompt is text",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
    given = {"prompts": QUESTIONS, "bank": "politeness", **options}
    with pytest.raises(error, match=re.escape(message)):
        contrast_processor(model, TOKENIZER, **given)


def test_a_template_that_drops_the_instruction_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    model = tiny_model("llama", len(tokenizer), tokenizer=tokenizer)
    with pytest.raises(PromptError, match="drops or changes the system instruction"):
        contrast_processor(model, tokenizer, QUESTIONS, "politeness", placement="system")


# ---- as a sampler --------------------------------------------------------------------------------

BY_PROMPT = {prompt: tuple(pairs) for prompt, pairs in zip(PROMPTS, PAIRS, strict=True)}
PARAMS = SamplingParams(max_new_tokens=7, temperature=0.8, top_p=0.95)
REQUESTS = [
    SampleRequest(prompt, 2**62 + 7 * (3 * i + k))
    for i, prompt in enumerate(PROMPTS)
    for k in range(3)
]


def sampler(
    model: torch.nn.Module, contrast: Contrast, *, batch_size: int = 64, eos: Ids = (2, 7)
) -> ContrastSampler:
    base = TransformersSampler(model, eos, PAD, batch_size)
    return ContrastSampler(base, BY_PROMPT, contrast)


@pytest.mark.parametrize("name", MODELS)
def test_the_sampler_says_the_slow_formulas_numbers(name: str) -> None:
    model = MODELS[name]()
    drawn = sampler(model, Contrast(0.7)).draw(REQUESTS, PARAMS)
    for request, sample in zip(REQUESTS, drawn, strict=True):
        answer, pairs = sample.token_ids, BY_PROMPT[request.prompt_ids]
        log_q = torch.stack(slow(model, request.prompt_ids, pairs, answer, alpha=0.7)[:-1])
        start = predictions(model, request.prompt_ids, answer)[:-1].log_softmax(-1)
        logprob = float(log_q.gather(-1, torch.tensor(answer)[:, None]).sum())
        divergence = float((log_q.exp() * (log_q - start)).sum())
        assert sample.logprob == pytest.approx(logprob, abs=1e-3)
        assert sample.kl == pytest.approx(divergence, abs=1e-3)
        assert sample.kl > 0
    assert len({s.token_ids for s in drawn}) > 6


@pytest.mark.parametrize("name", ["gpt2", "mistral, a short window"])
def test_a_sample_depends_on_its_request_alone(name: str) -> None:
    model = MODELS[name]()
    expected = sampler(model, Contrast(0.7)).draw(REQUESTS, PARAMS)
    # Some leave the batch early, and are taken out of it.
    assert len({len(s.token_ids) for s in expected}) > 2
    for batch_size in (1, 25):
        other = sampler(model, Contrast(0.7), batch_size=batch_size).draw(REQUESTS[::-1], PARAMS)
        assert [s.token_ids for s in other[::-1]] == [s.token_ids for s in expected]
        assert [s.kl for s in other[::-1]] == pytest.approx([s.kl for s in expected], abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "lora", "mamba, a state"])
def test_alpha_0_draws_what_the_plain_sampler_draws(name: str) -> None:
    model = MODELS[name]()
    drawn = sampler(model, Contrast(0.0)).draw(REQUESTS, PARAMS)
    plain = TransformersSampler(model, (2, 7), PAD).sample(REQUESTS, PARAMS)
    for ours, theirs in zip(drawn, plain, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert ours.kl == 0


def test_the_sampler_and_generate_decode_alike() -> None:
    model = tiny_model("llama", VOCAB)
    processor = ContrastLogitsProcessor(model, PROMPTS, PAIRS, alpha=0.7)
    generated = answers(generate(model, processor), WIDTH)
    greedy = replace(PARAMS, max_new_tokens=6, temperature=1.0, top_k=1, top_p=1.0)
    requests = [SampleRequest(prompt, 0) for prompt in PROMPTS]
    drawn = sampler(model, Contrast(0.7), eos=()).draw(requests, greedy)
    assert [s.token_ids for s in drawn] == generated


def test_it_is_a_sampler_of_few_rows_at_once() -> None:
    model = tiny_model("llama", VOCAB)
    ours = sampler(model, Contrast(0.7), batch_size=16, eos=())
    assert isinstance(ours, Sampler)
    assert ours.sample([], PARAMS) == []
    rows: list[int] = []
    counts: list[int] = []
    ours.sampler.settle(PROMPTS)
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    found = ours.sample(REQUESTS, PARAMS, progress=counts.append)
    hook.remove()
    assert len(found) == 9
    # A completion is five rows, so three at a time.
    assert counts == [3, 3, 3]
    assert max(rows) == 15


def test_a_half_precision_copy_is_sampled_from() -> None:
    model = tiny_model("llama", VOCAB)
    copied = half_precision_copy(model, torch.bfloat16)
    assert copied is not None
    for sample in sampler(copied, Contrast(0.7)).draw(REQUESTS, PARAMS):
        assert 0 < sample.kl / len(sample.token_ids) < 5
    cast = replace(sampler(model, Contrast(0.7)).sampler, autocast_dtype=torch.bfloat16)
    assert len(ContrastSampler(cast, BY_PROMPT, Contrast(0.7)).draw(REQUESTS, PARAMS)) == 9


def test_when_memory_runs_out_fewer_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", VOCAB)
    expected = sampler(model, Contrast(0.7)).draw(REQUESTS, PARAMS)
    ours = sampler(model, Contrast(0.7))
    ours.sampler.settle(PROMPTS)
    forward = model.forward

    def small(*args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 20:
            raise torch.OutOfMemoryError
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", small)
    assert [s.token_ids for s in ours.draw(REQUESTS, PARAMS)] == [s.token_ids for s in expected]
    assert ours.batch_limit.limit == 4
    assert ours.sampler.batch_limit.limit is None  # plain rows have more room


def test_a_prompt_without_pairs_is_an_error() -> None:
    model = tiny_model("llama", VOCAB)
    ours = sampler(model, Contrast(0.7))
    with pytest.raises(ValueError, match="have 0, 2 pairs of instructed prompts"):
        ours.sample([*REQUESTS, SampleRequest((1, 2), 0)], PARAMS)


# ---- rows that are read on -----------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_rows_with_and_without_a_cache_say_the_same(data: st.DataObject) -> None:
    """Whatever is read, kept, copied and put in another order."""
    model = tiny_model("llama", VOCAB).eval()
    token = st.integers(0, VOCAB - 1)
    prompts = data.draw(
        st.lists(st.lists(token, min_size=1, max_size=6).map(tuple), min_size=1, max_size=4)
    )
    with torch.no_grad():
        cached, anew = CachedRows(model, prompts, PAD), RecomputedRows(model, prompts, alone=True)
        for _ in range(3):
            torch.testing.assert_close(cached.logits, anew.logits, atol=1e-4, rtol=1e-4)
            count = len(anew.logits)
            stay = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5))
            for rows in (cached, anew):
                rows.keep(stay)
            tokens = torch.tensor(
                data.draw(st.lists(token, min_size=len(stay), max_size=len(stay)))
            )
            for rows in (cached, anew):
                rows.advance(tokens)
