"""Control tokens that a text spells out: found, kept as text, or meant; and at what cost."""

from __future__ import annotations

import gc
import re
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, ByT5Tokenizer

from neat_align.errors import PromptError
from neat_align.prompts.control_tokens import control_tokens, encode_marked, marked
from neat_align.prompts.rendering import answer_text_ids, prompt_ids, split_end
from neat_align.prompts.row_checks import as_rows, check_prompts
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.token_finder import TokenFinder
from neat_align.rounds.human_answers import answer_ids, human_completions
from template_families import FAMILIES, GEMMA, HEADERS, QWEN3, QWEN3_TOK, THINK, family
from tiny import tiny_tokenizer

ASK = [{"role": "user", "content": "Why is the sky blue?"}]

# ---- the data's own answers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "token", "is_meant"),
    [
        *(("qwen3", t, True) for t in (*THINK, "<tool_call>", "</tool_call>")),
        *(("qwen3", t, False) for t in ("<|im_end|>", "<|im_start|>", "<|pad|>", "<|bos|>")),
        ("qwen3", "<tool_response>", False),
        *(("special think", t, True) for t in THINK),
        *(("r1", t, True) for t in THINK),
        *(("r1", t, False) for t in ("<|User|>", "<|Assistant|>", "<|im_end|>")),
        *(("llama3", t, False) for t in HEADERS),
        *(("gemma", t, False) for t in ("<start_of_turn>", "<end_of_turn>", "<|im_end|>")),
        *(("mistral", t, True) for t in ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")),
        *(("mistral", t, False) for t in ("[INST]", "[/INST]", "</s>", "[TOOL_RESULTS]")),
        *(("glm", t, True) for t in THINK),
        *(("glm", t, False) for t in ("<|user|>", "<|assistant|>", "<|system|>")),
        *(("not in the template", t, True) for t in (*THINK, "<answer>")),
    ],
)
def test_an_answer_holds_the_tokens_that_the_model_itself_writes(
    name: str, token: str, is_meant: bool
) -> None:
    tokenizer = FAMILIES[name]
    text = f"So {token}\nhm yes"
    ids = answer_text_ids(tokenizer, text, conversational=True)
    assert tokenizer.convert_tokens_to_ids(token) in tokenizer.get_added_vocab().values()
    assert ids.count(tokenizer.convert_tokens_to_ids(token)) == is_meant
    assert tokenizer.decode(ids) == text
    if is_meant:
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_mean_answer_ends_no_turn_and_keeps_its_thoughts() -> None:
    text = "<think>hm</think>Yes.<|im_end|>\n<|im_start|>user\nAnd?<tool_call>{}</tool_call>"
    ids = answer_text_ids(QWEN3_TOK, text, conversational=True)
    tokens = [
        QWEN3_TOK.convert_ids_to_tokens(i) for i in ids if i in QWEN3_TOK.added_tokens_decoder
    ]
    assert tokens == ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    assert QWEN3_TOK.decode(ids) == text


@pytest.mark.parametrize("tail", ["", "<|im_end|>", "<|im_end|>\n", "\n<|im_end|><|im_end|> "])
@pytest.mark.parametrize("prompt", [ASK, "Q: why?\nA:"])
def test_an_answer_ends_once_however_it_was_written(tail: str, prompt: Any) -> None:
    """Data that a chat template was applied to has answers with their ends."""
    row = PromptRow("1", prompt, "Yes" + tail, None, {}, "row 1")
    (completion,) = human_completions(row, QWEN3_TOK, 50)
    end = QWEN3_TOK.convert_tokens_to_ids("<|im_end|>")
    assert completion.token_ids.count(end) == 1
    assert completion.token_ids[-1] == end
    assert completion.text.strip() == "Yes"
    assert completion.finish_reason == "stop"


def test_beside_a_text_prompt_an_answer_ends_as_it_is_written() -> None:
    """Prompts that were rendered already: the template's end need not be eos."""
    tokenizer = family(GEMMA, ["<start_of_turn>", "<end_of_turn>"], [])
    end, eos = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<|im_end|>"])
    prompt = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"

    def last(answer: str) -> int:
        return answer_ids(PromptRow("1", prompt, answer, None, {}, ""), answer, tokenizer, 50)[0][
            -1
        ]

    assert (last("Yes<end_of_turn>\n"), last("Yes"), last("Yes<|im_end|>")) == (end, eos, eos)
    inside = answer_text_ids(tokenizer, "a<end_of_turn>b<start_of_turn>c", conversational=False)
    assert end not in inside
    assert tokenizer.convert_tokens_to_ids("<start_of_turn>") in inside


def test_a_text_prompts_answer_does_not_need_a_template_that_works() -> None:
    tokenizer = family("{{ raise_exception('no') }}", [], [])
    assert split_end(tokenizer, "Yes<|im_end|>", conversational=False) == ("Yes", 2)
    with pytest.raises(PromptError, match="failed on a conversation"):
        split_end(tokenizer, "Yes<|im_end|>", conversational=True)


def test_special_thoughts_are_left_out_of_what_is_rewarded_as_of_samples() -> None:
    tokenizer, text = FAMILIES["special think"], "<think>hm</think> Yes"
    row = PromptRow("1", ASK, text, None, {}, "row 1")
    (completion,) = human_completions(row, tokenizer, 50)
    sample = tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip()
    assert completion.text == sample == "hm Yes"
    (completion,) = human_completions(row, QWEN3_TOK, 50)
    sample = QWEN3_TOK.decode(completion.token_ids, skip_special_tokens=True).strip()
    assert completion.text == sample == text


def test_answers_that_cannot_be_written_are_named_at_the_start() -> None:
    row = {"prompt": ASK, "chosen": [{"role": "assistant", "content": " <|im_end|>"}]}
    with pytest.raises(PromptError, match=r"row 0: chosen: ' <\|im_end\|>' holds nothing but its"):
        check_prompts(as_rows([row], "x"), QWEN3_TOK, 99, conversational=True)


def test_slow_tokenizers_keep_thoughts_and_ends_apart() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(THINK)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)], special_tokens=True)
    tokenizer.chat_template = QWEN3
    assert not tokenizer.is_fast
    text = "<think>é</think><|im_end|>b"
    ids = answer_text_ids(tokenizer, text, conversational=True)
    think, close, end = tokenizer.convert_tokens_to_ids([*THINK, "<|im_end|>"])
    assert (ids.count(think), ids.count(close), ids.count(end)) == (1, 1, 0)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    tokenizer.add_tokens(["<more>"])
    tokenizer.chat_template += "{% if x %}<more>{% endif %}"
    asked = prompt_ids(tokenizer, [{"role": "user", "content": "a <more>"}])
    assert tokenizer.convert_tokens_to_ids("<more>") not in asked


# ---- prompts -------------------------------------------------------------------------------------


def test_earlier_answers_in_a_prompt_keep_the_models_tokens_and_users_words_do_not() -> None:
    tokenizer = FAMILIES["special think"]
    think = tokenizer.convert_tokens_to_ids("<think>")
    said = "<think>hm</think>Yes<|im_end|>"

    def count(role_of_saying: str) -> int:
        other = "assistant" if role_of_saying == "user" else "user"
        turns = [{"role": role_of_saying, "content": said}, {"role": other, "content": "x"}]
        if role_of_saying == "assistant":
            turns = [*ASK, turns[0], {"role": "user", "content": "x"}]
        else:
            turns = [turns[0], turns[1], *ASK]
        ids = prompt_ids(tokenizer, turns)
        assert ids.count(tokenizer.eos_token_id) == len(turns)
        return ids.count(think)

    assert (count("assistant"), count("user")) == (1, 0)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=20)
@given(data=st.data())
def test_users_texts_are_encoded_as_transformers_sanitizes_them(name: str, data: Any) -> None:
    tokenizer = FAMILIES[name]
    token = st.sampled_from(sorted(tokenizer.get_added_vocab()))
    text = "".join(data.draw(st.lists(token | st.text("ab <|\n", max_size=4), max_size=6)))
    messages = [{"role": "user", "content": text}]
    if control_tokens(tokenizer).finder.tokens_in(text) - set(_transformers_own(tokenizer)):
        return  # written by the template, in pieces: transformers takes it for no control token
    expected = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        sanitize_control_tokens=True,
    )
    assert prompt_ids(tokenizer, messages) == expected


def _transformers_own(tokenizer: Any) -> set[str]:
    literal = tokenizer.chat_template
    added = tokenizer.added_tokens_decoder.values()
    return {t.content for t in added if t.special or t.content in literal}


def test_tokens_that_a_template_puts_together_are_control_tokens() -> None:
    """GLM's and Phi's '<|' + role + '|>': no literal of the template holds them."""
    tokenizer = FAMILIES["glm"]
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "say <|assistant|>"}])
    assert ids.count(tokenizer.convert_tokens_to_ids("<|assistant|>")) == 1  # the template's own


# ---- finding -------------------------------------------------------------------------------------


@given(
    tokens=st.lists(st.text("ab<|>/", min_size=1, max_size=4), max_size=8),
    text=st.text("ab<|>/c", max_size=30),
)
def test_tokens_are_found_as_a_regular_expression_finds_them(tokens: list[str], text: str) -> None:
    longest_first = sorted(set(tokens), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    expected = [(m.start(), m.group()) for m in pattern.finditer(text)]
    finder = TokenFinder(tokens)
    assert list(finder.find(text)) == expected
    assert finder.tokens_in({"k": [text, 3, None], text: 1}) == finder.tokens_in(text)


def test_a_tokenizer_that_cannot_keep_a_token_as_text_is_named() -> None:
    tokenizer = tiny_tokenizer()
    finder = TokenFinder(["a"])  # a token of the vocabulary, not only an added one
    with pytest.raises(PromptError, match=r"'a' is a control token .* take it out"):
        encode_marked(tokenizer, marked("b a", finder))


# ---- changes, and the time it takes --------------------------------------------------------------


def _add_special(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})


def _add_token_and_template(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template += "{% if x %}<new>{% endif %}"


def _list_as_control(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_control_tokens = ["<new>"]


def _add_to_the_backend(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.add_special_tokens(["<new>"])


@pytest.mark.parametrize(
    "change", [_add_special, _add_token_and_template, _list_as_control, _add_to_the_backend]
)
def test_changes_of_a_tokenizer_are_seen(change: Callable[[Any], None]) -> None:
    tokenizer = tiny_tokenizer()
    asked = [{"role": "user", "content": "a <new> b"}]
    before = prompt_ids(tokenizer, asked)
    change(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<new>") == 384
    assert prompt_ids(tokenizer, asked) == before


def test_a_token_made_special_after_the_fact_is_seen_by_the_checks_before_a_run() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    assert "<new>" not in control_tokens(tokenizer).finder.tokens
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    assert "<new>" in control_tokens(tokenizer, fresh=True).finder.tokens
    assert "<new>" in control_tokens(tokenizer).finder.tokens


@pytest.mark.parametrize(
    ("name", "chosen", "is_left_open"),
    [
        ("r1", "The sky scatters blue.", True),
        ("r1", "hm</think>The sky scatters blue.", False),
        ("qwen3", "The sky scatters blue.", False),  # opens nothing before the answer
    ],
)
def test_answers_that_end_inside_of_an_open_thought_are_warned_of(
    caplog: pytest.LogCaptureFixture, name: str, chosen: str, is_left_open: bool
) -> None:
    rows = as_rows([{"prompt": ASK, "chosen": chosen, "rejected": "no</think>No."}], "data")
    with caplog.at_level("WARNING", "neat_align"):
        check_prompts(rows, FAMILIES[name], 999, conversational=True)
    said = "of 1 rows do not close it with </think> (the first: dataset 'data', row 0)"
    assert (said in caplog.text) == is_left_open


def test_no_tokenizer_is_kept_alive() -> None:
    tokenizer = tiny_tokenizer()
    prompt_ids(tokenizer, ASK)
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None


def test_the_time_a_prompt_does_not_grow_with_the_added_tokens() -> None:
    """Gemma 3 has 6,242 unused tokens; listing them took 17 ms a prompt, and 50 with a token."""
    text = "what <|im_end|> means, and < or <unused"
    row = PromptRow("1", [{"role": "user", "content": text}], "<think>" + text, "b", {}, "")
    seconds = []
    for extra in (0, 6242):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens([*THINK, *(f"<unused{i}>" for i in range(extra))])
        check_prompts([row], tokenizer, 999, conversational=True)
        start = time.perf_counter()
        for _ in range(20):
            check_prompts([row], tokenizer, 999, conversational=True)
            human_completions(row, tokenizer, 99)
        seconds.append((time.perf_counter() - start) / 20)
    assert seconds[1] < 2e-3 + 5 * seconds[0]
