"""The data's own answers as the policy would have written them."""

from __future__ import annotations

from typing import Any, Literal

from neat_align.prompts.rendering import answer_text_ids, own_special_tokens, split_end
from neat_align.prompts.rows import PromptRow
from neat_align.rounds.completions import Completion, Origin


def answer_ids(
    row: PromptRow, text: str, tokenizer: Any, max_length: int | None
) -> tuple[tuple[int, ...], Literal["stop", "length"]]:
    """The token ids of a human answer as the policy would write it, and how it ends.

    "stop": with the end-of-turn token, once where the text has it already. "length": cut to
    `max_length` tokens (None: no limit), without one. After a text prompt that does not end in
    white space ("…Assistant:") the answer begins with a space.
    """
    conversational = not isinstance(row.prompt, str)
    text, end = split_end(
        tokenizer, text, conversational=conversational, inputs=row.template_inputs
    )
    if not conversational and _runs_together(str(row.prompt), text):
        text = " " + text
    ids = answer_text_ids(tokenizer, text, conversational=conversational)
    if max_length is not None and len(ids) + 1 > max_length:
        return tuple(ids[:max_length]), "length"
    return (*ids, end), "stop"


def human_completions(row: PromptRow, tokenizer: Any, max_length: int) -> list[Completion]:
    """The data's own chosen and rejected answers, where the row has them.

    One longer than `max_length` tokens is cut, in text too: what is rewarded is what the policy is
    trained on. Special tokens are left out of the text, as they are of the policy's own answers.
    """
    completions: list[Completion] = []
    origins: tuple[tuple[Origin, str | None], ...] = (
        ("chosen", row.chosen),
        ("rejected", row.rejected),
    )
    for origin, text in origins:
        if text is None:
            continue
        ids, finish_reason = answer_ids(row, text, tokenizer, max_length)
        kept_text = _rewarded_text(row, text, tokenizer)
        if finish_reason == "length" or own_special_tokens(tokenizer, text):
            kept_text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        completions.append(
            Completion(
                origin=origin, index=0, text=kept_text, token_ids=ids, finish_reason=finish_reason
            )
        )
    return completions


def _rewarded_text(row: PromptRow, text: str, tokenizer: Any) -> str:
    """The answer without the tokens that end it."""
    conversational = not isinstance(row.prompt, str)
    return split_end(tokenizer, text, conversational=conversational, inputs=row.template_inputs)[0]


def _runs_together(prompt: str, answer: str) -> bool:
    """Whether prompt and answer would meet without white space between them."""
    return bool(prompt and answer) and not prompt[-1].isspace() and not answer[0].isspace()
