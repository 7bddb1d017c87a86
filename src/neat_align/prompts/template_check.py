"""What tokenizer and chat template must do, checked before anything is sampled.

`check_rendering`: a prompt ends where the assistant is to answer. `check_template`: an instruction
is kept, and makes a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neat_align.errors import PromptError
from neat_align.prompts.control_tokens import control_tokens
from neat_align.prompts.instruction_banks import InstructionBank
from neat_align.prompts.placement import instructed, parenthesised
from neat_align.prompts.rendering import (
    end_of_turn_id,
    prompt_ids,
    prompt_text,
    refuse_inputs_of_text,
    render,
    tokenizer_name,
    unread_kwargs,
)
from neat_align.prompts.rows import NO_INPUTS, Message, Prompt, TemplateInputs

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
_ANSWER = "neat-answer"
# What to try where a template does not keep an instruction.
_OTHER_PLACEMENT = {
    "system": "user_suffix, which every template keeps",
    "affix": "user_suffix",
    "user_suffix": "affix",
}


def check_rendering(
    tokenizer: Any, *, conversational: bool, inputs: TemplateInputs = NO_INPUTS
) -> None:
    """Refuse a tokenizer whose prompts do not end where the assistant is to answer.

    `inputs` are those of the run. Raises PromptError when conversations meet a tokenizer without a
    chat template, when its template fails, does not open the assistant's turn, writes an end behind
    its opening, or never reads a variable that it is given, and when the tokenizer puts a token
    behind every text or two BOS in front.
    """
    if conversational:
        _check_conversations(tokenizer, inputs)
    else:
        refuse_inputs_of_text(inputs)
    _check_texts(tokenizer, conversational=conversational)


def _check_texts(tokenizer: Any, *, conversational: bool) -> None:
    """What is put around a text, of which answers consist also beside conversations."""
    name = tokenizer_name(tokenizer)
    for text in _TEXT_PROBES:
        bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not bare:
            raise PromptError(f"the tokenizer of {name} makes no tokens of {text!r}: use another")
        ids = bare if conversational else prompt_ids(tokenizer, text)
        last, longer = ids[-1], len(ids) - len(bare)
        added = ids[-1:] if ids[-len(bare) :] != bare or last == tokenizer.eos_token_id else []
        if not added and tokenizer.decode([last]).isspace():
            added = ids[-1:]
        if added:
            token = tokenizer.convert_ids_to_tokens(last)
            raise PromptError(
                f"the tokenizer of {name} ends every text with {token!r}, so the model would be "
                "asked to write after its end: set tokenizer.add_eos_token = False, or take that "
                "token out of its post-processor"
            )
        if (
            tokenizer.bos_token_id is not None
            and longer > 1
            and (ids[:2] == [tokenizer.bos_token_id] * 2)
        ):
            raise PromptError(
                f"the tokenizer of {name} begins every text with {tokenizer.bos_token!r} twice: "
                "take one out of its post-processor"
            )


def _check_conversations(tokenizer: Any, inputs: TemplateInputs) -> None:
    name = tokenizer_name(tokenizer)
    control_tokens(tokenizer, fresh=True)
    for probe in _PROBES:
        ids = prompt_ids(tokenizer, probe, inputs=inputs)
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            raise PromptError(
                f"the chat template of {name} begins a conversation with {tokenizer.bos_token!r} "
                "twice: take one out of tokenizer.chat_template"
            )
        _check_opening(tokenizer, probe, inputs)
    unread = unread_kwargs(tokenizer, inputs)
    if unread:
        raise PromptError(
            f"chat_template_kwargs gives {', '.join(unread)}, which the chat template of {name} "
            "never reads: correct the name, or take it out"
        )


def _check_opening(tokenizer: Any, probe: list[Message], inputs: TemplateInputs) -> None:
    """A prompt ends as a conversation with an answer goes up to that answer, blocks of thought
    apart.
    """
    answered = [*probe, {"role": "assistant", "content": _ANSWER}]
    prompt = prompt_text(tokenizer, probe, inputs=inputs)
    try:
        closed = render(tokenizer, probe, inputs, add_generation_prompt=False)
        whole = render(tokenizer, answered, inputs, add_generation_prompt=False)
    except PromptError:
        return  # a template that only asks: nothing to compare with
    question = probe[-1]["content"]
    if _ANSWER not in whole or question not in prompt:
        return
    opening = prompt.rpartition(question)[2]
    expected = whole.rpartition(_ANSWER)[0].rpartition(question)[2]
    pairs = enumerate(zip(opening, expected, strict=False))
    shorter = min(len(opening), len(expected))
    same = next((i for i, (a, b) in pairs if a != b), shorter)
    tokens = control_tokens(tokenizer)
    end = end_of_turn_id(tokenizer, conversational=True, inputs=inputs)
    ends = {tokenizer.eos_token, tokenizer.convert_ids_to_tokens(end)}
    behind = tokens.finder.tokens_in(opening[same:]) & ends
    if behind:
        raise PromptError(
            f"the chat template of {tokenizer_name(tokenizer)} ends every prompt with "
            f"{min(behind)!r}, where the assistant is to answer, so the model would be asked to "
            "write after its end: take it out of tokenizer.chat_template"
        )
    missing = expected[same:]
    for token in tokens.own:
        missing = missing.replace(token, "")
    if prompt == closed and missing.strip():
        raise PromptError(
            f"the chat template of {tokenizer_name(tokenizer)} does not read "
            f"add_generation_prompt: it writes {missing!r} before an answer, and a prompt ends "
            "without it, so the model would be asked to write that itself: add "
            "{% if add_generation_prompt %} with it to tokenizer.chat_template"
        )


def check_template(
    tokenizer: Any,
    bank: InstructionBank,
    placement: str,
    *,
    conversational: bool,
    inputs: TemplateInputs = NO_INPUTS,
) -> None:
    """Refuse a tokenizer with which the contrast between instructions would be wrong or empty.

    Raises PromptError when conversations meet a tokenizer without a chat template, when the
    template raises on or drops the turn that carries the instruction, and when positive and
    negative give the same ids or the same ids as the plain prompt.
    """
    probes: Sequence[Prompt] = _PROBES if conversational else _TEXT_PROBES
    for probe in probes:
        plain = prompt_ids(tokenizer, probe, inputs=inputs)
        for i, pair in enumerate(bank.pairs, start=1):
            where = f"pairs[{i}] of bank {bank.name!r}"
            positive, negative = (
                _checked_ids(tokenizer, probe, text, placement, where, inputs)
                for text in (pair.positive, pair.negative)
            )
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
    tokenizer: Any,
    probe: Prompt,
    instruction: str,
    placement: str,
    where: str,
    inputs: TemplateInputs,
) -> list[int]:
    """The instructed prompt's token ids, if its text holds the instruction as it is written."""
    prompt, prefix = instructed(probe, instruction, placement)
    try:
        text = prompt_text(tokenizer, prompt, prefix, inputs)
        ids = prompt_ids(tokenizer, prompt, prefix, inputs)
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
