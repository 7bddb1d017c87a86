from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neat_align.rounds.text_metrics import REFUSAL_WINDOW, distinct_n, is_refusal, repetition

TEXTS = st.text(alphabet="ab \n", max_size=20)


def test_distinct_bigrams_by_hand() -> None:
    # "a b", "b a", "a b" and, in another answer, "A B": two different of four. Nothing spans two
    # answers.
    assert distinct_n(["a b a b", "A  B"]) == 0.5
    assert distinct_n(["a b", "c d"]) == 1.0
    assert distinct_n(["a a a a"], n=1) == 0.25
    assert distinct_n(["a b c", "a b c"], n=3) == 0.5
    for nothing in ([], [""], ["one", "two"]):
        assert math.isnan(distinct_n(nothing))


def test_repetition_by_hand() -> None:
    # abc bca cab abc: one of four came before.
    assert repetition("a b c a b c") == 0.25
    assert repetition("no no no no no no") == 0.75
    assert repetition("No no NO no", n=1) == 0.75
    assert repetition("every word here is its own") == 0.0
    for short in ("", "one two", "  \n"):
        assert repetition(short) == 0.0


@given(TEXTS)
def test_repetition_is_what_variety_leaves_in_one_answer(text: str) -> None:
    variety = distinct_n([text], n=3)
    assert repetition(text) == pytest.approx(0.0 if math.isnan(variety) else 1 - variety)
    assert 0 <= repetition(text) < 1


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but I can\u2019t help with that.",
        "I am really sorry but no.",
        "I cannot assist you.",
        "I can't provide that.",
        "I can\u2019t discuss this.",
        "I won't help with this.",
        "I will not engage in it.",
        "I am unable to answer.",
        "I'm unable to help with that.",
        "I\u2019m unable to help with that.",
        "I'm not able to help.",
        "I am not able to give advice.",
        "I\u2019m not allowed to say this.",
        "I'm not going to say it.",
        "As an AI, I have no view.",
        "Well, as an AI language model I pass.",
        "I don't feel comfortable doing so.",
        "We do not condone this.",
        "It's not appropriate to say so.",
        "It is not okay to do this.",
        "I'd rather not.",
        "I would rather not say.",
        "AS AN AI I REFUSE",
    ],
)
def test_refusals(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Of course, I can help with that.",
        "I'm sorry to hear that. Talk to her.",
        "I can't wait to help you!",
        "I cannot recommend it enough.",
        "Was an aim of yours to say no?",
        "It is not far.",
        "Has an airline called?",
        "Hawaii am unable to help",
    ],
)
def test_no_refusals(text: str) -> None:
    assert not is_refusal(text)


def test_only_the_beginning_of_an_answer_is_a_refusal() -> None:
    begins = "Tell him what you saw. " * 5
    quoted = begins + "If he says: I am sorry, but no, let it be."
    assert quoted.index("but") < REFUSAL_WINDOW
    assert is_refusal(quoted)  # the price of not reading: quoted early on, it counts
    assert not is_refusal("Tell him what you saw. " * 2 + quoted)
    assert not is_refusal("." * REFUSAL_WINDOW + " As an AI I refuse.")
