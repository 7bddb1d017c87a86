"""The data's own answers as the policy would have written them."""

from __future__ import annotations

from typing import Any, Literal

from neat_align.prompts.rendering import answer_text_ids, end_of_turn_id
from neat_align.prompts.rows import PromptRow
from neat_align.rounds.completions import Completion, Origin


def answer_ids(
    row: PromptRow, text: str, tokenizer: Any, max_length: int
) -> tuple[tuple[int, ...], Literal["stop", "length"]]:
    """A human answer as the policy would write it: its tokens and the end-of-turn token, or cut
    without one.

    After a text prompt that does not end in white space ("…Assistant:") the answer begins with a
    space.
    """
    if (
        isinstance(row.prompt, str)
        and row.prompt
        and not row.prompt[-1].isspace()
        and text
        and not text[0].isspace()
    ):
        text = " " + text
    conversational = not isinstance(row.prompt, str)
    ids = answer_text_ids(tokenizer, text, conversational=conversational)
    if len(ids) + 1 > max_length:
        return tuple(ids[:max_length]), "length"
    return (*ids, end_of_turn_id(tokenizer, conversational=conversational)), "stop"


def human_completions(row: PromptRow, tokenizer: Any, max_length: int) -> list[Completion]:
    """The data's own chosen and rejected answers. One longer than `max_length` tokens is cut, in
    text too: what is rewarded is what the policy is trained on.
    """
    out: list[Completion] = []
    origins: tuple[tuple[Origin, str | None], ...] = (
        ("chosen", row.chosen),
        ("rejected", row.rejected),
    )
    for origin, text in origins:
        if text is None:
            continue
        ids, finish_reason = answer_ids(row, text, tokenizer, max_length)
        kept = (
            text
            if finish_reason == "stop"
            else tokenizer.decode(ids, skip_special_tokens=True).strip()
        )
        out.append(
            Completion(
                origin=origin, index=0, text=kept, token_ids=ids, finish_reason=finish_reason
            )
        )
    return out
