"""Find answers that talk about their instruction instead of following it: "As an evil AI, …".

Such an answer teaches the policy to announce a persona that the plain prompt never asked for. Only giveaways are matched;
a rude answer that just is rude stays.
"""

from __future__ import annotations

import re

# A run of this many words in common with the instruction counts as repeating it.
SHARED_WORDS = 5

_TRAIT = (
    r"(?:evil|malicious|harmful|hateful|hostile|rude|mean|nasty|angry|unkind|unhelpful|dishonest|deceptive|toxic|cruel|insulting|"
    r"impolite|polite|kind|friendly|warm|honest|truthful|helpful|harmless)"
)
_MAKER = r"(?:ai|a\.i\.|assistant|chatbot|bot|language model|model|persona|character)"
_MANNER = r"(?:way|tone|manner|fashion|style)"
_ANNOUNCED = re.compile(
    rf"\b(?:as|i am|i'm|being) (?:an? |your |the )?(?:{_TRAIT}(?:,| and|,? but)? ){{1,4}}{_MAKER}\b"
    rf"|\bin an? (?:{_TRAIT}(?:,| and|, and)? ){{1,4}}{_MANNER}\b"
    rf"|\b(?:rude|angry|hateful|harmful|unhelpful|dishonest|kind|friendly|polite) (?:response|answer|reply|version)\s*:",
    re.IGNORECASE,
)
_WORD = re.compile(r"[\w']+")


def leaks_instruction(text: str, instruction: str | None) -> bool:
    """Whether an answer repeats its instruction (five words in a row) or announces the persona it was given."""
    if instruction is None:
        return False
    if _ANNOUNCED.search(text):
        return True
    words = _WORD.findall(instruction.lower())
    answer = " " + " ".join(_WORD.findall(text.lower())) + " "
    runs = [words[i : i + SHARED_WORDS] for i in range(max(1, len(words) - SHARED_WORDS + 1))]
    return any(f" {' '.join(run)} " in answer for run in runs if len(run) == SHARED_WORDS)
