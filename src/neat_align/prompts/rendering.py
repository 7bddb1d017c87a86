"""From prompts and answers to token ids, by the tokenizer's own chat template.

What looks like a control token inside a message stays text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from neat_align.errors import PromptError
from neat_align.prompts.control_tokens import control_tokens, encode, encode_marked, marked
from neat_align.prompts.rows import NO_INPUTS, Message, Prompt, TemplateInputs, check_messages

# Of an assistant's turn, what the model itself would have written.
_OWN_WORDS = ("content", "reasoning_content", "thinking", "reasoning")


def prompt_text(
    tokenizer: Any, prompt: Prompt, assistant_prefix: str = "", inputs: TemplateInputs = NO_INPUTS
) -> str:
    """The prompt as the policy reads it, generation prompt included: for people and logs.

    Sample from `prompt_ids`: text cannot tell a control token from a user who wrote one.
    """
    if isinstance(prompt, str):
        return prompt + assistant_prefix
    return render(tokenizer, check_messages(prompt), inputs) + assistant_prefix


def prompt_ids(
    tokenizer: Any, prompt: Prompt, assistant_prefix: str = "", inputs: TemplateInputs = NO_INPUTS
) -> list[int]:
    """The prompt's token ids, generation prompt included.

    A conversation gives exactly what `apply_chat_template(..., add_generation_prompt=True)` gives
    with the tools and variables of `inputs`, unless a message, a tool or a variable contains a
    control token as text ("what does <|im_end|> mean?"): that stays text, so that nothing can end
    its own turn. In an assistant's turn, what the model itself writes (`<think>`) is meant. A text
    prompt is tokenised as the tokenizer does by default, with its BOS convention (once, where the
    text begins with BOS already); control tokens in it are meant.

    Raises PromptError where the tokenizer has no chat template, where its template fails, and for
    `inputs` with a text prompt, which no template is given.
    """
    ordinary = text_to_encode(tokenizer, prompt, assistant_prefix, inputs)
    if ordinary is not None:
        return encode(tokenizer, ordinary[0], add_special_tokens=ordinary[1])
    assert not isinstance(prompt, str)
    known = control_tokens(tokenizer)
    _refuse_names(tokenizer, [inputs.tools, inputs.kwargs, *prompt])
    messages = [
        {
            key: marked(value, known.finder, known.own if _is_own(message, key) else ())
            for key, value in message.items()
        }
        for message in prompt
    ]
    safe = TemplateInputs(marked(inputs.tools, known.finder), marked(inputs.kwargs, known.finder))
    text = render(tokenizer, messages, safe)
    return encode_marked(tokenizer, text + str(marked(assistant_prefix, known.finder)))


def text_to_encode(
    tokenizer: Any, prompt: Prompt, assistant_prefix: str = "", inputs: TemplateInputs = NO_INPUTS
) -> tuple[str, bool] | None:
    """The text whose encoding is `prompt_ids`, and whether special tokens are added to it.

    For encoding many prompts at once. None for a conversation in which something spells a control
    token, which only `prompt_ids` can encode. Raises what `prompt_ids` raises.
    """
    if isinstance(prompt, str):
        refuse_inputs_of_text(inputs)
        text = prompt + assistant_prefix
        has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        return text, not has_bos
    _refuse_without_template(tokenizer)
    data = [check_messages(prompt), assistant_prefix, inputs.tools, inputs.kwargs]
    if control_tokens(tokenizer).finder.tokens_in(data):
        return None
    return prompt_text(tokenizer, prompt, assistant_prefix, inputs), False


def refuse_inputs_of_text(inputs: TemplateInputs) -> None:
    """Raise PromptError for tools or template variables of a text prompt."""
    if inputs:
        names = ["tools"] * bool(inputs.tools) + ["chat_template_kwargs"] * bool(inputs.kwargs)
        raise PromptError(
            f"{' and '.join(names)} are for a chat template, and the prompt is text, which is "
            "used without one: give messages (--as_conversations true makes them of texts), or "
            "leave them out"
        )


def answer_text_ids(tokenizer: Any, text: str, *, conversational: bool) -> list[int]:
    """The ids of an answer's text, without what ends its turn (see `split_end`).

    Tokens that the model itself writes in its turn (`<think>`, `<tool_call>`) are those tokens;
    what would end the turn or begin another stays text. Beside a text prompt every other control
    token is meant.
    """
    known = control_tokens(tokenizer)
    spelled = known.finder.tokens_in(text)
    if not spelled:
        return encode(tokenizer, text)
    own = known.own if conversational else spelled - set(_ends(tokenizer, conversational=False))
    if spelled <= own:
        return encode(tokenizer, text)
    return encode_marked(tokenizer, str(marked(text, known.finder, own)))


def own_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether an answer holds special tokens that it keeps, which decoding takes out of a text."""
    known = control_tokens(tokenizer)
    return bool(known.finder.tokens_in(text) & known.own & known.special)


def split_end(
    tokenizer: Any, text: str, *, conversational: bool, inputs: TemplateInputs = NO_INPUTS
) -> tuple[str, int]:
    """An answer without the tokens that end it, where it is written with them, and its end's id.

    Data that a chat template was applied to has them. In a conversation every answer ends as the
    template ends it; beside a text prompt as it is written, else with eos.
    """
    ends = _ends(tokenizer, conversational=conversational, inputs=inputs)
    # In a conversation, the one that the template writes comes first; beside a text, eos.
    end = int(tokenizer.convert_tokens_to_ids(ends[0]))
    while (last := next((e for e in ends if text.rstrip().endswith(e)), None)) is not None:
        text = text.rstrip().removesuffix(last)
        if not conversational:
            end = int(tokenizer.convert_tokens_to_ids(last))
    return text, end


def _ends(tokenizer: Any, *, conversational: bool, inputs: TemplateInputs = NO_INPUTS) -> list[str]:
    """The tokens that end an answer: eos and what the chat template writes after one.

    The latter first in a conversation; beside a text prompt eos is, and the template may even fail.
    """
    turn_end = None
    if getattr(tokenizer, "chat_template", None):
        try:
            turn_end = _end_of_turn(tokenizer, inputs)
        except PromptError:
            if conversational:
                raise
    ends = [turn_end, tokenizer.eos_token] if conversational else [tokenizer.eos_token, turn_end]
    return list(dict.fromkeys(end for end in ends if end))


def end_of_turn_id(
    tokenizer: Any, *, conversational: bool, inputs: TemplateInputs = NO_INPUTS
) -> int:
    """The token that ends an answer.

    The one that the chat template writes after it (Gemma's and Phi's is not their eos); eos for
    text prompts and templates that write none.
    """
    ends = _ends(tokenizer, conversational=conversational, inputs=inputs)
    return int(tokenizer.convert_tokens_to_ids(ends[0]))


def _end_of_turn(tokenizer: Any, inputs: TemplateInputs) -> str | None:
    answer = "neat-answer"
    turns: list[Message] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": answer},
    ]
    rendered = render(tokenizer, turns, inputs, add_generation_prompt=False)
    _, found, after = rendered.rpartition(answer)
    return control_tokens(tokenizer).finder.at(after.lstrip(), 0) if found else None


def eos_token_ids(
    tokenizer: Any, model: Any, *, conversational: bool, inputs: TemplateInputs = NO_INPUTS
) -> tuple[int, ...]:
    """Tokens that end a completion, in order of their ids.

    The tokenizer's eos, the template's end of a turn, and the model's own list.
    """
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [listed] if isinstance(listed, int) else listed or []
    turn_end = end_of_turn_id(tokenizer, conversational=conversational, inputs=inputs)
    return tuple(sorted({tokenizer.eos_token_id, turn_end, *own}))


def _is_own(message: Message, key: str) -> bool:
    return message["role"] == "assistant" and key in _OWN_WORDS


def _refuse_names(tokenizer: Any, data: list[Any]) -> None:
    """Raise PromptError where the name of a field holds a control token: it cannot stay text."""
    names = [name for part in data for name in _names(part)]
    spelled = control_tokens(tokenizer).finder.tokens_in(names)
    if spelled:
        raise PromptError(
            f"the name of a field of tools, variables or messages holds the control token "
            f"{min(spelled)!r}: rename the field"
        )


def _names(value: object) -> list[str]:
    """The names of all fields of plain data."""
    if isinstance(value, Mapping):
        return [*map(str, value), *(n for item in value.values() for n in _names(item))]
    if isinstance(value, list | tuple):
        return [n for item in value for n in _names(item)]
    return []


def _refuse_without_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            f"the prompt is a conversation, but the tokenizer of {tokenizer_name(tokenizer)} has "
            "no chat template: use an instruct model, set tokenizer.chat_template, or give the "
            "prompts as text"
        )


def render(
    tokenizer: Any,
    messages: list[Message],
    inputs: TemplateInputs,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """What the chat template makes of the messages. Raises PromptError."""
    _refuse_without_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=inputs.tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **inputs.kwargs,
        )
    except Exception as error:  # a template is somebody's program and can raise anything
        roles = ", ".join(m["role"] for m in messages)
        given = ", ".join(["tools"] * bool(inputs.tools) + list(inputs.kwargs))
        raise PromptError(
            f"the chat template of {tokenizer_name(tokenizer)} failed on a conversation with the "
            f"turns {roles}{given and f' and {given}'}: {error}"
        ) from error
    return cast("str", text)


def unread_kwargs(tokenizer: Any, inputs: TemplateInputs) -> list[str]:
    """The variables that the chat template does not even name."""
    template = str(tokenizer.get_chat_template(tools=inputs.tools))
    return [name for name in inputs.kwargs if name not in template]


def tokenizer_name(tokenizer: Any) -> str:
    """What messages call a tokenizer: where it was loaded from, else its class."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
