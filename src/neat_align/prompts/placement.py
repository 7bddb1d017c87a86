"""Putting an instruction on a prompt: in the system turn, after the user's words, or at the answer.

Where an instruction goes decides how strongly it works: next to the answer (`user_suffix`, `affix`)
it steers even small models, in the system turn only those trained to follow one.
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias, cast

from neat_align.errors import PromptError
from neat_align.prompts.rows import Message, Prompt, check_messages

Placement: TypeAlias = Literal["system", "user_suffix", "affix"]
# The last line of a text prompt, where it only names who speaks next: "Assistant:",
# "### Response:".
_SPEAKER_LINE = re.compile(r"(?:^|(?<=\n))(?P<label>(?:#+ )?[A-Z][\w'-]*(?: [\w'-]+){0,2}):\s*$")
# The end of a text that a chat template has rendered already.
_RENDERED_END = re.compile(
    r"(?:<\|[\w-]+\|>\s*(?:assistant|model)|<\|(?:assistant|end_header_id)\|>"
    r"|\[/INST\]|<start_of_turn>model)\s*$"
)
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]]*$")


def instructed(prompt: Prompt, instruction: str, placement: str) -> tuple[Prompt, str]:
    """The instructed prompt, and the text that the assistant's answer is made to begin with.

    Conversations:
    - `system`: the system turn, after a blank line when there is one already, else a new one. A
      template that writes a default system turn when none is given (SmolLM2's, Qwen's) writes the
      instruction *instead* of that default.
    - `user_suffix`: the end of the last user turn; on the same line after a finished sentence, else
      on its own line.
    - `affix`: "(instruction)" as the first line of the assistant's turn, right before the answer.
      It is returned as the second value, and is part of the sampling prompt, never of the
      completion.

    Text prompts:
    - `system`: a paragraph before the prompt.
    - `user_suffix`: as above, before a last line that only names the next speaker ("Assistant:",
      "### Response:").
    - `affix`: inside that last line, as RLCD has it: "Assistant (instruction):". Without such a
      line, a line of its own after the prompt. The second value is always ''.

    The affix drops the instruction's full stop and its first capital: "(answer in a kind way)".

    Raises PromptError where there is no place for the instruction.
    """
    if placement not in ("system", "user_suffix", "affix"):
        raise PromptError(
            f"the instruction placement is {placement!r}; it must be one of system, user_suffix, "
            "affix"
        )
    if isinstance(prompt, str):
        return _instructed_text(prompt, instruction, cast("Placement", placement)), ""
    check_messages(prompt)
    messages: list[Message] = [dict(m) for m in prompt]
    if placement == "affix":
        return messages, f"{parenthesised(instruction)}\n"
    if placement == "system":
        if messages[0]["role"] in ("system", "developer"):
            messages[0]["content"] = f"{messages[0]['content'].rstrip()}\n\n{instruction}".lstrip()
        else:
            messages.insert(0, {"role": "system", "content": instruction})
        return messages, ""
    last_user = next((m for m in reversed(messages) if m["role"] == "user"), None)
    if last_user is None:
        raise PromptError(
            "the conversation has no user turn, so user_suffix has nothing to stand on: add one, "
            "or use placement system"
        )
    last_user["content"] = _with_suffix(last_user["content"], instruction)
    return messages, ""


def _instructed_text(prompt: str, instruction: str, placement: Placement) -> str:
    if _RENDERED_END.search(prompt):
        raise PromptError(
            f"the text prompt ends in a chat template's control tokens ({prompt[-40:]!r}), so an "
            "instruction would land in the wrong turn: give the prompt as a list of messages "
            "instead, and the template is applied for you"
        )
    if placement == "system":
        return f"{instruction}\n\n" + prompt.lstrip("\n")
    speaker = _SPEAKER_LINE.search(prompt)
    if placement == "affix":
        if speaker:
            end = speaker.end("label")
            return f"{prompt[:end]} {parenthesised(instruction)}{prompt[end:]}"
        return f"{prompt.rstrip()}\n{parenthesised(instruction)}\n"
    cut = speaker.start() if speaker and prompt[: speaker.start()].strip() else len(prompt)
    return _with_suffix(prompt[:cut], instruction) + prompt[cut:]


def _with_suffix(turn: str, instruction: str) -> str:
    """The instruction after the turn's last word, before white space that the turn ends in."""
    text = turn.rstrip()
    separator = " " if _SENTENCE_END.search(text) else "\n"
    return f"{text}{separator if text else ''}{instruction}{turn[len(text) :]}"


def parenthesised(instruction: str) -> str:
    """The instruction as an affix: in parentheses, without its full stop and first capital."""
    text = instruction.strip().removesuffix(".")
    first = text.partition(" ")[0]
    # "Answer …" loses its capital; "I", "AI" and "NASA" keep theirs.
    if len(first) > 1 and first[1:].islower():
        text = text[0].lower() + text[1:]
    return f"({text})"
