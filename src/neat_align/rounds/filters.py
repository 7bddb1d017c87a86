"""Find answers that talk about their instruction instead of following it: "As an evil AI, …".

Such an answer teaches the policy to announce a persona that the plain prompt never asked for. Only
giveaways are matched; a rude answer that just is rude stays.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from neat_align.rounds.completions import Completion, CompletionGroup

# A run of this many words in common with the instruction counts as repeating it.
SHARED_WORDS = 5
_TRAIT = (
    r"(?:evil|malicious|harmful|hateful|hostile|rude|mean|nasty|angry|unkind|unhelpful|dishonest|deceptive|toxic|cruel|insulting|"
    r"impolite|polite|kind|friendly|warm|honest|truthful|helpful|harmless)"
)
_TRAITS = rf"(?:{_TRAIT}(?:,? and|,? but|,)? ){{1,4}}"
_MANNER = rf"in an? {_TRAITS}(?:way|tone|manner|fashion|style)\b"
# Advice ("tell her in a kind way", "as the evil character of the play") uses the same words; only
# what the answer says of itself is matched: who it is, how it will answer, or a label in front of
# it.
_ANNOUNCED = re.compile(
    rf"\b(?:as|i am|i'm|being) (?:an? |your "
    rf")?{_TRAITS}(?:ai|a\.i\.|assistant|chatbot|bot|language model)\b"
    rf"|\b(?:as an?|i am an?|i'm an?) {_TRAITS}(?:persona|character|model), i\b"
    rf"|\b(?:i will|i'll|i'm going to|i am going to|i must|i have to|let me) "
    rf"(?:answer|reply|respond|say|write)\b[^.!?\n]{{0,40}} {_MANNER}"
    rf"|\bmy (?:answer|reply|response),? {_MANNER}"
    rf"|\A\W*(?:\w+ ){{0,2}}{_MANNER}\s*[:)]"
    rf"|^\W*{_TRAITS}(?:response|answer|reply)\W{{0,3}}:",
    re.IGNORECASE | re.MULTILINE,
)
_WORD = re.compile(r"[\w']+")


def leaks_instruction(text: str, instruction: str | None) -> bool:
    """Whether an answer repeats its instruction (five words in a row) or announces the persona it
    was given.
    """
    if instruction is None:
        return False
    text, instruction = text.replace("’", "'"), instruction.replace("’", "'")
    if _ANNOUNCED.search(text):
        return True
    words = _WORD.findall(instruction.lower())
    answer = " " + " ".join(_WORD.findall(text.lower())) + " "
    runs = [words[i : i + SHARED_WORDS] for i in range(max(1, len(words) - SHARED_WORDS + 1))]
    return any(f" {' '.join(run)} " in answer for run in runs if len(run) == SHARED_WORDS)


# ---- filter --------------------------------------------------------------------------------------


def without_unusable(group: CompletionGroup, removed: Counter[str]) -> CompletionGroup:
    """Without blank answers, repeats of another's text, and leaked instructions; each is counted by
    its reason.
    """
    kept: list[Completion] = []
    seen: set[str] = set()
    for c in group.completions:
        if not c.text.strip():
            removed["empty"] += 1
        elif c.text in seen:
            removed["duplicate"] += 1
        elif leaks_instruction(c.text, c.instruction):
            removed["leak"] += 1
        else:
            seen.add(c.text)
            kept.append(c)
    return replace(group, completions=tuple(kept))
