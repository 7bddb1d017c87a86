"""A prompt ends where the assistant is to answer: refused otherwise, whatever is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import processors
from transformers import ByT5Tokenizer

from neat_align import NEATTrainer
from neat_align.cli.probe_options import ProbeSettings
from neat_align.cli.probe_run import run_probe
from neat_align.errors import DataError, PromptError
from neat_align.prompts.rows import TemplateInputs
from neat_align.prompts.template_check import check_rendering
from small_trainer import config, trainer
from template_families import FAMILIES
from tiny import BOS, CHATML, save_tiny, tiny_model, tiny_tokenizer

TEXTS = [{"prompt": f"Q: {i}?\nA:"} for i in range(8)]


def around_texts(single: str, *, bos: bool = False) -> Any:
    """A tokenizer that puts tokens around every text."""
    tokenizer = tiny_tokenizer("none", bos=bos)
    names = ["<|im_end|>", "<|pad|>", *([BOS] if bos else [])]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(n, tokenizer.convert_tokens_to_ids(n)) for n in names]
    )
    return tokenizer


def templated(template: str) -> Any:
    tokenizer = tiny_tokenizer("none", bos=True)
    tokenizer.chat_template = template
    return tokenizer


GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
assert GENERATION in CHATML


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_of_all_families_pass(name: str) -> None:
    check_rendering(FAMILIES[name], conversational=True)
    check_rendering(FAMILIES[name], conversational=False)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace(
            GENERATION, "{{ '<|im_start|>assistant\\n' }}"
        ),  # always open: one that asks
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",  # DialoGPT's
        "{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else "
        "m.content + eos_token }}{% endfor %}",  # Llama 2's
        "{{ bos_token }}" + CHATML,
        "{% if messages[-1].role == 'assistant' %}{{ raise_exception('ask') }}{% endif %}" + CHATML,
    ],
)
def test_other_ways_to_open_an_answer_pass(template: str) -> None:
    check_rendering(templated(template), conversational=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHATML.replace(GENERATION, ""),
            r"does not read add_generation_prompt: it writes '<\|im_start\|>assistant\\n' before",
        ),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
            r"does not read add_generation_prompt: it writes 'assistant: ' before an answer",
        ),
        (CHATML + "{{ eos_token }}", r"ends every prompt with '<\|im_end\|>', where the assistant"),
        (
            CHATML.replace("assistant\\n' }}{% endif", "assistant\\n' + eos_token }}{% endif"),
            r"ends every prompt with '<\|im_end\|>', where the assistant is to answer",
        ),
        ("{{ bos_token + bos_token }}" + CHATML, r"begins a conversation with '<\|bos\|>' twice"),
    ],
)
def test_templates_that_do_not_open_the_answer_are_refused(template: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        check_rendering(templated(template), conversational=True)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (around_texts("$A <|im_end|>"), r"ends every text with '<\|im_end\|>'.*add_eos_token"),
        (around_texts("$A <|pad|>"), r"ends every text with '<\|pad\|>'.*post-processor"),
        (around_texts(f"{BOS} $A <|im_end|>", bos=True), r"ends every text with '<\|im_end\|>'"),
        (around_texts(f"{BOS} {BOS} $A", bos=True), r"begins every text with '<\|bos\|>' twice"),
        (ByT5Tokenizer(), r"ends every text with '</s>'"),
    ],
)
def test_tokenizers_that_put_tokens_behind_texts_are_refused(tokenizer: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        check_rendering(tokenizer, conversational=False)


def test_a_tokenizer_that_writes_a_blank_behind_every_text_is_refused() -> None:
    class WithBlank:
        """Writes a space token behind every text, as tokenizers of the Moses kind can."""

        def __init__(self) -> None:
            self.inner = tiny_tokenizer("none")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, text: str, **options: Any) -> Any:
            return self.inner(text + " ", **options)

    with pytest.raises(PromptError, match=r"ends every text with 'Ġ'"):
        check_rendering(WithBlank(), conversational=False)


# ---- always, whatever is sampled -----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_positive": 0, "num_negative": 0, "num_plain": 4, "evaluate_contrast": False},
        {"rank_by": "origin", "reward": None},
        {},
    ],
)
def test_training_refuses_a_tokenizer_that_ends_texts(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    options = dict(options)
    reward = options.pop("reward", lambda completions, **_: [float(len(c)) for c in completions])
    with pytest.raises(PromptError, match="ends every text with"):
        NEATTrainer(
            tiny_model("llama", 384),
            reward,
            config(tmp_path, **options),
            TEXTS,
            processing_class=around_texts("$A <|im_end|>"),
        )


def test_training_refuses_a_template_that_does_not_open_the_answer(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{i}"}]} for i in range(8)]
    with pytest.raises(PromptError, match="does not read add_generation_prompt"):
        NEATTrainer(
            tiny_model("llama", 385),
            lambda completions, **_: [1.0 for _ in completions],
            config(tmp_path, num_positive=0, num_negative=0, num_plain=4),
            rows,
            processing_class=templated(CHATML.replace(GENERATION, "")),
        )


def test_the_contrast_of_an_evaluation_needs_the_instructions_too(tmp_path: Path) -> None:
    """Nothing is sampled under an instruction in training, but evaluation does."""
    drops_system = CHATML.replace(
        "{{ '<|im_start|>' + message['role']",
        "{{ '' if message['role'] == 'system' else '<|im_start|>' + message['role']",
    )
    rows = [{"prompt": [{"role": "user", "content": f"{i}"}]} for i in range(8)]

    def build(**options: Any) -> None:
        NEATTrainer(
            tiny_model("llama", 385),
            lambda completions, **_: [1.0 for _ in completions],
            config(
                tmp_path,
                num_positive=0,
                num_negative=0,
                num_plain=4,
                instruction_placement="system",
                **options,
            ),
            rows,
            rows,
            processing_class=templated(drops_system),
        )

    build(evaluate_contrast=False)
    with pytest.raises(PromptError, match="drops or changes the system instruction"):
        build()


def test_a_probe_refuses_them_before_anything_is_sampled(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace(GENERATION, "")
    tokenizer.save_pretrained(folder)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "Tell me of {i}"}}\n' for i in range(8)))
    settings = ProbeSettings("politeness", str(folder), str(data), as_conversations=True, prompts=8)
    with pytest.raises(PromptError, match="does not read add_generation_prompt"):
        run_probe(settings, None, Console(), disable_progress=True)


def test_rows_to_evaluate_on_are_checked_like_those_of_training(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    with pytest.raises(DataError, match=r"row 0: prompt is text, but messages in the training"):
        t.evaluate([{"prompt": "Why?"}])
    with pytest.raises(DataError, match="longer than max_prompt_length=200"):
        t.evaluate([{"prompt": [{"role": "user", "content": "why " * 300}]}])


def test_a_variable_that_no_template_reads_is_refused() -> None:
    inputs = TemplateInputs(kwargs={"enable_thinkng": False})
    with pytest.raises(PromptError, match=r"gives enable_thinkng, which .* never reads: correct"):
        check_rendering(FAMILIES["qwen3"], conversational=True, inputs=inputs)
    with pytest.raises(PromptError, match="chat_template_kwargs are for a chat template, and the"):
        check_rendering(FAMILIES["qwen3"], conversational=False, inputs=inputs)
