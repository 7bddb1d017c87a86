"""From prompts and answers to token ids, by the tokenizer's own chat template.

What looks like a control token inside a message stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from neat_align.errors import PromptError
from neat_align.prompts.rows import Message, Prompt, check_messages


def prompt_text(tokenizer: Any, prompt: Prompt, assistant_prefix: str = "") -> str:
    """The prompt as the policy reads it, generation prompt included: for people and logs.

    Sample from `prompt_ids`: text cannot tell a control token from a user who wrote one.
    """
    if isinstance(prompt, str):
        return prompt + assistant_prefix
    return _render(tokenizer, prompt) + assistant_prefix


def prompt_ids(tokenizer: Any, prompt: Prompt, assistant_prefix: str = "") -> list[int]:
    """The prompt's token ids, generation prompt included.

    A conversation gives exactly what `apply_chat_template(..., add_generation_prompt=True)` gives,
    unless a message contains a control token as text ("what does <|im_end|> mean?"): that stays
    text, so that no message can end its own turn. A text prompt is tokenised as the tokenizer does
    by default, with its BOS convention (once, where the text begins with BOS already); control
    tokens in it are meant.

    Raises PromptError where the tokenizer has no chat template, or its template fails.
    """
    if isinstance(prompt, str):
        text = prompt + assistant_prefix
        has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        return _encode(tokenizer, text, add_special_tokens=not has_bos)
    texts = [m["content"] for m in check_messages(prompt)] + [assistant_prefix]
    if not any(token in text for token in _control_tokens(tokenizer) for text in texts):
        return _encode(
            tokenizer, prompt_text(tokenizer, prompt, assistant_prefix), add_special_tokens=False
        )
    # The prefix goes through the template too, so that it is kept as text and joined as in the
    # ordinary case.
    template = tokenizer.get_chat_template().removesuffix("\n") + "{{ neat_assistant_prefix }}"
    ids = _apply(
        tokenizer,
        prompt,
        chat_template=template,
        neat_assistant_prefix=assistant_prefix,
        tokenize=True,
        return_dict=False,
        sanitize_control_tokens=True,
    )
    return [int(i) for i in cast("Sequence[int]", ids)]


def text_to_encode(tokenizer: Any, prompt: Prompt) -> tuple[str, bool] | None:
    """The text whose encoding is `prompt_ids`, and whether special tokens are added to it.

    For encoding many prompts at once. None for a conversation in which a message spells a control
    token, which only `prompt_ids` can encode. Raises what `prompt_ids` raises.
    """
    if isinstance(prompt, str):
        has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        return prompt, not has_bos
    texts = [m["content"] for m in check_messages(prompt)]
    if any(token in text for token in _control_tokens(tokenizer) for text in texts):
        return None
    return prompt_text(tokenizer, prompt), False


def answer_text_ids(tokenizer: Any, text: str, *, conversational: bool) -> list[int]:
    """The ids of an answer's text, without what ends its turn.

    In a conversation, what looks like a control token stays text; beside a text prompt it is meant.
    """
    if not conversational or not any(token in text for token in _control_tokens(tokenizer)):
        return _encode(tokenizer, text, add_special_tokens=False)
    # The template is kept, unused, because its literals say which added tokens are control tokens.
    template = "{% if false %}" + tokenizer.get_chat_template() + "{% endif %}{{ neat_answer }}"
    ids = _apply(
        tokenizer,
        [{"role": "user", "content": ""}],
        chat_template=template,
        neat_answer=text,
        tokenize=True,
        return_dict=False,
        sanitize_control_tokens=True,
    )
    return [int(i) for i in cast("Sequence[int]", ids)]


def end_of_turn_id(tokenizer: Any, *, conversational: bool) -> int:
    """The token that ends an answer.

    The one that the chat template writes after it (Gemma's and Phi's is not their eos); eos for
    text prompts and templates that write none.
    """
    if not conversational or not getattr(tokenizer, "chat_template", None):
        return int(tokenizer.eos_token_id)
    answer = "neat-answer"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    rendered = str(_apply(tokenizer, turns, add_generation_prompt=False, tokenize=False))
    after = rendered.rpartition(answer)[2].lstrip()
    for token in _control_tokens(tokenizer):
        if after.startswith(token):
            return int(tokenizer.convert_tokens_to_ids(token))
    return int(tokenizer.eos_token_id)


def eos_token_ids(tokenizer: Any, model: Any, *, conversational: bool) -> tuple[int, ...]:
    """Tokens that end a completion, in order of their ids.

    The tokenizer's eos, the template's end of a turn, and the model's own list.
    """
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [listed] if isinstance(listed, int) else listed or []
    turn_end = end_of_turn_id(tokenizer, conversational=conversational)
    return tuple(sorted({tokenizer.eos_token_id, turn_end, *own}))


def _control_tokens(tokenizer: Any) -> list[str]:
    """Special tokens, and added tokens that the chat template writes (Qwen's `<think>`)."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    control = []
    for token in tokenizer.added_tokens_decoder.values():
        written = token.content in template and not token.content.isspace()
        if token.special or written:
            control.append(token.content)
    return control


def _encode(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return [int(i) for i in ids]


def _render(tokenizer: Any, messages: list[Message]) -> str:
    check_messages(messages)
    return cast("str", _apply(tokenizer, messages, tokenize=False))


def _apply(
    tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool = True, **kwargs: Any
) -> object:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            f"the prompt is a conversation, but the tokenizer of {tokenizer_name(tokenizer)} has "
            "no chat template: use an instruct model, set tokenizer.chat_template, or give the "
            "prompts as text"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, **kwargs
        )
    except Exception as error:  # a template is somebody's program and can raise anything
        roles = ", ".join(m["role"] for m in messages)
        raise PromptError(
            f"the chat template of {tokenizer_name(tokenizer)} failed on a conversation with the "
            f"turns {roles}: {error}"
        ) from error


def tokenizer_name(tokenizer: Any) -> str:
    """What messages call a tokenizer: where it was loaded from, else its class."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
