"""What a chat template must keep, checked before anything is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neat_align.errors import PromptError
from neat_align.prompts.instruction_banks import InstructionBank
from neat_align.prompts.placement import instructed, parenthesised
from neat_align.prompts.rendering import prompt_ids, prompt_text, tokenizer_name
from neat_align.prompts.rows import Message, Prompt

# A question alone, and at the end of a conversation.
_QUESTION: Message = {"role": "user", "content": "What would you do with a free evening?"}
_PROBES: tuple[list[Message], ...] = (
    [_QUESTION],
    [
        _QUESTION,
        {"role": "assistant", "content": "I would read a book."},
        {"role": "user", "content": "Which one would you read?"},
    ],
)
_TEXT_PROBES = (
    "What would you do with a free evening?",
    "\n\nHuman: What would you do with a free evening?\n\nAssistant:",
)
# What to try where a template does not keep an instruction.
_OTHER_PLACEMENT = {
    "system": "user_suffix, which every template keeps",
    "affix": "user_suffix",
    "user_suffix": "affix",
}


def check_template(
    tokenizer: Any, bank: InstructionBank, placement: str, *, conversational: bool
) -> None:
    """Refuse a tokenizer with which the contrast between instructions would be wrong or empty.

    Raises PromptError when conversations meet a tokenizer without a chat template, when the
    template raises on or drops the turn that carries the instruction, when positive and negative
    give the same ids or the same ids as the plain prompt, or when the tokenizer closes a text
    prompt with an end-of-sequence token.
    """
    probes: Sequence[Prompt] = _PROBES if conversational else _TEXT_PROBES
    for probe in probes:
        plain = prompt_ids(tokenizer, probe)
        if not conversational and plain and plain[-1] == tokenizer.eos_token_id:
            raise PromptError(
                f"the tokenizer of {tokenizer_name(tokenizer)} ends every text with "
                f"{tokenizer.eos_token!r}, so the model would be asked to write after its end: "
                "set tokenizer.add_eos_token = False"
            )
        for i, pair in enumerate(bank.pairs, start=1):
            where = f"pairs[{i}] of bank {bank.name!r}"
            positive = _checked_ids(tokenizer, probe, pair.positive, placement, where)
            negative = _checked_ids(tokenizer, probe, pair.negative, placement, where)
            if positive == negative:
                raise PromptError(
                    f"{where}: the positive and the negative instruction give the same token ids "
                    f"with the tokenizer of {tokenizer_name(tokenizer)} (its unknown token?): "
                    "there would be no contrast; change the wording, or use another tokenizer"
                )
            if plain in (positive, negative):
                raise PromptError(
                    f"{where}: with placement {placement} an instructed prompt equals the plain "
                    "one; use another placement"
                )


def _checked_ids(
    tokenizer: Any, probe: Prompt, instruction: str, placement: str, where: str
) -> list[int]:
    """The instructed prompt's token ids, if its text holds the instruction as it is written."""
    prompt, prefix = instructed(probe, instruction, placement)
    try:
        text = prompt_text(tokenizer, prompt, prefix)
        ids = prompt_ids(tokenizer, prompt, prefix)
    except PromptError as error:
        if placement == "system" and getattr(tokenizer, "chat_template", None):
            raise PromptError(
                f"{error}. It takes no system turn: set instruction_placement to user_suffix, "
                "which every template keeps"
            ) from error
        raise
    expected = parenthesised(instruction) if placement == "affix" else instruction
    if expected not in text:
        raise PromptError(
            f"{where}: the chat template of {tokenizer_name(tokenizer)} drops or changes the "
            f"{placement} instruction {expected!r}, so good and bad answers would be sampled "
            f"alike: set instruction_placement to {_OTHER_PLACEMENT.get(placement, 'user_suffix')}"
        )
    return ids
