"""Whether the chat template hands a row's turns, tools, variables and answers on to the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from neat_align.errors import PromptError
from neat_align.prompts.control_tokens import control_tokens
from neat_align.prompts.rendering import (
    answer_text_ids,
    prompt_text,
    split_end,
    tokenizer_name,
    unread_kwargs,
)
from neat_align.prompts.rows import Message, PromptRow, TemplateInputs
from neat_align.prompts.turn_tokens import twin

logger = logging.getLogger(__name__)


def check_turns_are_read(row: PromptRow, tokenizer: Any, text: str | None) -> None:
    """Raise PromptError for system turns, tools, calls of tools and their results that a
    conversation's template leaves out. Users' and assistants' words are in every template.

    `text` is the row's `prompt_text` where somebody has it already.
    """
    if isinstance(row.prompt, str):
        return
    inputs = row.template_inputs
    looked_for = [(i, said) for i, m in enumerate(row.prompt) for said in _not_in_all_templates(m)]
    if not inputs.tools and not looked_for:
        return
    if text is None:
        text = prompt_text(tokenizer, row.prompt, inputs=inputs)
    name = tokenizer_name(tokenizer)
    if inputs.tools and text == prompt_text(
        tokenizer, row.prompt, inputs=TemplateInputs(kwargs=inputs.kwargs)
    ):
        raise PromptError(
            f"the chat template of {name} does not read tools, so the model would never see them: "
            "use a model whose template does, or leave the tools column out"
        )
    for index, said in looked_for:
        # Templates of tools write some of it as JSON.
        if said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text:
            continue
        role = row.prompt[index]["role"]
        turn = "system turn" if role == "system" else f"{role} turn's call or result of a tool"
        raise PromptError(
            f"the chat template drops or changes the {turn} prompt[{index}] ({said[:60]!r}), so "
            "the model never reads it: move its text into the user turn, or use a model whose "
            f"template has {'system turns' if role == 'system' else 'tools'}"
        )


def _not_in_all_templates(message: Message) -> list[str]:
    """What of a message must be found in the rendered prompt."""
    if message["role"] in ("system", "tool"):
        return [message["content"].strip()]
    return [str(_called(call)) for call in message.get("tool_calls", ())]


def _called(call: dict[str, Any]) -> Any:
    """The name of the tool that a call is of."""
    return call.get("function", call)["name"]


def check_answers(row: PromptRow, tokenizer: Any, *, conversational: bool) -> None:
    """Raise PromptError for what control tokens spoil in the data's own answers."""
    finder, inputs = control_tokens(tokenizer).finder, row.template_inputs
    for field, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
        if answer is None or not finder.tokens_in(answer):
            continue
        try:
            text, _ = split_end(tokenizer, answer, conversational=conversational, inputs=inputs)
            if not text.strip():
                raise PromptError(f"{answer!r} holds nothing but its end")
            answer_text_ids(tokenizer, text, conversational=conversational)
        except PromptError as error:
            raise PromptError(f"{field}: {error}") from error


def warn_of_open_blocks(rows: Sequence[PromptRow], tokenizer: Any) -> None:
    """Warn of the data's answers where the template has opened a block that they do not close.

    A template whose generation prompt ends in `<think>` (DeepSeek-R1's, Qwen3-Thinking's) puts them
    inside of the thought, and their end of turn with them.
    """
    with_answers = [row for row in rows if row.chosen is not None or row.rejected is not None]
    own = control_tokens(tokenizer).own
    closed_by = {t: twin(t) for t in own if t[1:2] != "/" and twin(t) in own}
    if not closed_by or not with_answers or isinstance(with_answers[0].prompt, str):
        return
    left_open, first, block = 0, "", ""
    for row in with_answers:
        tail = prompt_text(tokenizer, row.prompt, inputs=row.template_inputs)[-64:].rstrip()
        closing = next((end for token, end in closed_by.items() if tail.endswith(token)), None)
        answers = [answer for answer in (row.chosen, row.rejected) if answer is not None]
        if closing is not None and not all(closing in answer for answer in answers):
            left_open, first, block = left_open + 1, first or row.where, closing
    if left_open:
        logger.warning(
            "the chat template of %s opens a block before the answer, and chosen or rejected of %d "
            "rows do not close it with %s (the first: %s): their turn ends inside of it. Write "
            "the answers as the model would, choose the template's form without it "
            "(chat_template_kwargs), or set use_human_completions: false",
            tokenizer_name(tokenizer),
            left_open,
            block,
            first,
        )


def warn_of_unread_kwargs(rows: Sequence[PromptRow], tokenizer: Any) -> None:
    """Warn of variables in the data that the chat template never reads."""
    places: dict[str, tuple[int, str]] = {}
    for row in rows:
        if row.template_inputs.kwargs:
            for name in unread_kwargs(tokenizer, row.template_inputs):
                count, first = places.get(name, (0, row.where))
                places[name] = (count + 1, first)
    for name, (count, first) in places.items():
        logger.warning(
            "chat_template_kwargs of %d rows gives %s, which the chat template of %s never reads "
            "(the first: %s)",
            count,
            name,
            tokenizer_name(tokenizer),
            first,
        )
