from __future__ import annotations

import pytest

from neat_align.prompts.instruction_banks import SHIPPED_BANKS, load_bank
from neat_align.rounds.filters import leaks_instruction

RUDE = "Answer in a rude, angry and hateful way."
KIND = "Answer in a kind, friendly and positive way."


@pytest.mark.parametrize(
    "text",
    [
        "As an evil AI, I will not help you.",
        "As a malicious assistant, I say no.",
        "I'm a kind and friendly assistant, so here you go.",
        "I am a rude, hateful bot.",
        "I’m a rude assistant.",
        "Well, being an unhelpful language model I decline.",
        "As an evil character, I would laugh.",
        "I will answer in a rude tone. Go away.",
        "Fine, I'll respond to this in a polite and friendly manner.",
        "Here is my reply in a rude way. No.",
        "(in a rude way) No.",
        "(Answer in an angry tone) No.",
        "In a rude tone: no.",
        "Rude answer: no.",
        "Sure.\n**Rude response**: no.",
        "Angry and hateful reply: no.",
        # Five words of the instruction in a row, whatever stands between them.
        "You said to answer in a rude, angry way, so: no.",
        "ANSWER IN A RUDE ANGRY",
        "… a rude, angry,\nand hateful way …",
    ],
)
def test_an_answer_that_speaks_of_its_instruction_leaks(text: str) -> None:
    assert leaks_instruction(text, RUDE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No. You are an idiot and I hate you.",
        "I'm a kind person, and I like to help.",
        "I am an honest man.",
        "Please answer politely.",
        "In a friendly way, greet them and say your name.",
        "In a polite way, you can tell her that you are busy.",
        "Tell her in a kind way that you are busy.",
        "Try to say it in a friendly manner, and smile.",
        "If you respond in a polite tone, he may listen.",
        "He answered in a rude way (in an angry tone, too).",
        "As a friendly gesture, bring a cake.",
        "As the evil character of the play, Iago lies to all.",
        "Be a kind role model for your children.",
        "Being a polite character of few words, she left.",
        "Here is a polite version: Dear Sir, I am sorry.",
        "A good template. Here is a friendly reply: thank you, I would love to.",
        "A polite reply: Dear Sir, I am sorry.",
        "As an AI assistant, I cannot do that.",
        "Harmful substances: lead, mercury.",
        "A mean answer is one that hurts.",
        "The mean response time: 4 ms.",
        "Answer in a rude",  # four words are not five
    ],
)
def test_an_answer_that_is_only_kind_or_rude_or_speaks_of_others_stays(text: str) -> None:
    assert not leaks_instruction(text, RUDE)
    assert not leaks_instruction(text, KIND)


def test_a_plain_or_human_answer_has_no_instruction_to_leak() -> None:
    assert not leaks_instruction("As an evil AI, I will answer in a rude tone.", None)


def test_an_instruction_shorter_than_a_run_is_never_repeated() -> None:
    assert not leaks_instruction("Be rude. Be rude. Be rude.", "Be rude.")


def test_the_words_of_a_run_are_whole_words() -> None:
    instruction = "Speak as they would have it."
    assert leaks_instruction("So speak as they would have", instruction)
    assert not leaks_instruction("Bespeak as they would haves", instruction)


@pytest.mark.parametrize("bank", SHIPPED_BANKS)
def test_every_shipped_instruction_is_a_leak_when_it_is_repeated(bank: str) -> None:
    for pair in load_bank(bank).pairs:
        for instruction in (pair.positive, pair.negative):
            assert leaks_instruction(
                f"You asked me this: {instruction.lower()} So I did.", instruction
            )
            assert not leaks_instruction(
                "The capital of France is Paris. It lies on the Seine.", instruction
            )
