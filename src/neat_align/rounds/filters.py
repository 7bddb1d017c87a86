"""What is left out before anything is scored: blank answers, repeats, and leaked instructions.

A leak talks about its instruction instead of following it ("As an evil AI, …"). It teaches the
policy to announce a persona that the plain prompt never asked for. Only giveaways are matched; a
rude answer that just is rude stays.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from neat_align.rounds.completions import Completion, CompletionGroup

# A run of this many words in common with the instruction counts as repeating it.
SHARED_WORDS = 5
_TRAIT = (
    r"(?:evil|malicious|harmful|hateful|hostile|rude|mean|nasty|angry|unkind|unhelpful|dishonest"
    r"|deceptive|toxic|cruel|insulting|impolite"
    r"|polite|kind|friendly|warm|honest|truthful|helpful|harmless)"
)
_TRAITS = rf"(?:{_TRAIT}(?:,? and|,? but|,)? ){{1,4}}"
_MANNER = rf"in an? {_TRAITS}(?:way|tone|manner|fashion|style)\b"
# Advice ("tell her in a kind way", "as the evil character of the play") uses the same words; only
# what the answer says of itself is matched: who it is, how it will answer, or a label before it.
_ANNOUNCED = re.compile(
    rf"\b(?:as|i am|i'm|being) (?:an? |your )?{_TRAITS}"
    rf"(?:ai|a\.i\.|assistant|chatbot|bot|language model)\b"
    rf"|\b(?:as an?|i am an?|i'm an?) {_TRAITS}(?:persona|character|model), i\b"
    rf"|\b(?:i will|i'll|i'm going to|i am going to|i must|i have to|let me) "
    rf"(?:answer|reply|respond|say|write)\b[^.!?\n]{{0,40}} {_MANNER}"
    rf"|\bmy (?:answer|reply|response),? {_MANNER}"
    rf"|\A\W*(?:\w+ ){{0,2}}{_MANNER}\s*[:)]"
    rf"|^\W*{_TRAITS}(?:response|answer|reply)\W{{0,3}}:",
    re.IGNORECASE | re.MULTILINE,
)
_WORD = re.compile(r"[\w']+")


def without_unusable(group: CompletionGroup, removed: Counter[str]) -> CompletionGroup:
    """The group without blank answers, repeats of another's text, and leaked instructions.

    Each is counted in `removed` by its reason: "empty", "duplicate" or "leak".
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


def leaks_instruction(text: str, instruction: str | None) -> bool:
    """Whether an answer repeats its instruction or announces the persona that it was given.

    Repeats: `SHARED_WORDS` words in a row. Without an instruction nothing can leak.
    """
    if instruction is None:
        return False
    text, instruction = text.replace("’", "'"), instruction.replace("’", "'")
    if _ANNOUNCED.search(text):
        return True
    words = _WORD.findall(instruction.lower())
    answer = " " + " ".join(_WORD.findall(text.lower())) + " "
    starts = range(len(words) - SHARED_WORDS + 1)
    runs = [" ".join(words[i : i + SHARED_WORDS]) for i in starts]
    return any(f" {run} " in answer for run in runs)
