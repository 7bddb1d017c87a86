"""Instruction banks, and how an instruction is put on a prompt.

An instruction makes the model answer well or badly; it is seen while sampling only, never in training. A bank holds
pairs of like form and length, so that the two answers differ in behaviour and in nothing else (the lesson of RLCD,
arXiv:2307.12950). Where an instruction goes decides how strongly it works: next to the answer (`user_suffix`, `affix`)
it steers even small models, in the system turn only those trained to follow one.

Token ids come from the tokenizer's own chat template. What looks like a control token inside a message stays text.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from neat_align.errors import PromptError
from neat_align.groups import Message, Prompt
from neat_align.yaml_files import YamlDocument, parse_yaml, read_yaml

Placement: TypeAlias = Literal["system", "user_suffix", "affix"]

SHIPPED_BANKS = ("harmlessness", "helpfulness", "honesty", "politeness", "sentiment")

_BANK_KEYS = ("name", "description", "source", "pairs")
_PAIR_KEYS = ("positive", "negative")
# The last line of a text prompt that only names who speaks next: "Assistant:", "A:", "### Response:".
_SPEAKER_LINE = re.compile(r"(?:^|(?<=\n))(?P<label>(?:#+ )?[A-Z][\w'-]*(?: [\w'-]+){0,2}):\s*$")
# The end of a text that a chat template has rendered already.
_RENDERED_END = re.compile(r"(?:<\|[\w-]+\|>\s*(?:assistant|model)|<\|(?:assistant|end_header_id)\|>|\[/INST\]|<start_of_turn>model)\s*$")
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]]*$")


# ---- Banks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InstructionPair:
    """Two sentences of like form: one asks for good behaviour, the other for bad."""

    positive: str
    negative: str


@dataclass(frozen=True, slots=True)
class InstructionBank:
    """Pairs that all contrast one value. `source` says where the wording comes from and what was measured."""

    name: str
    description: str
    pairs: tuple[InstructionPair, ...]
    source: str = ""


def load_bank(name_or_path: str) -> InstructionBank:
    """The shipped bank of that name, or the bank in that YAML file. A shipped name wins over a file of the same name.

    Raises PromptError that names the file, the entry, and what to change.
    """
    if name_or_path in SHIPPED_BANKS:
        text = resources.files("neat_align").joinpath("banks", f"{name_or_path}.yaml").read_text("utf-8")
        return _parse_bank(parse_yaml(text, f"{name_or_path}.yaml", PromptError), f"{name_or_path}.yaml")
    path = Path(name_or_path).expanduser()
    looks_like_path = path.suffix in (".yaml", ".yml") or "/" in name_or_path or os.sep in name_or_path
    if not looks_like_path and not path.is_file():
        near = difflib.get_close_matches(name_or_path.lower(), SHIPPED_BANKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PromptError(
            f"there is no instruction bank {name_or_path!r}.{hint} Shipped banks: {', '.join(SHIPPED_BANKS)}. "
            "For a bank of your own, give the path of its .yaml file"
        )
    if not path.exists():
        raise PromptError(
            f"{path}: the instruction bank cannot be read (no such file). Give the path of a YAML file, or one of the shipped names: "
            f"{', '.join(SHIPPED_BANKS)}"
        )
    return _parse_bank(read_yaml(path, PromptError), str(path))


def _parse_bank(document: YamlDocument, where: str) -> InstructionBank:
    raw = document.value
    if not isinstance(raw, dict):
        raise PromptError(f"{where}: a bank is a mapping with the keys {', '.join(_BANK_KEYS)}; this file is a {type(raw).__name__}")
    _check_keys(raw, _BANK_KEYS, where)
    name = raw.get("name", Path(where).stem)
    for key, value in (("name", name), ("description", raw.get("description", "")), ("source", raw.get("source", ""))):
        if not isinstance(value, str):
            raise PromptError(f"{where}: {key} is {value!r}; it must be text (put it in quotes)")
    entries = raw.get("pairs")
    if not isinstance(entries, list) or not entries:
        raise PromptError(f"{where}: pairs must be a list of one or more entries, each with a positive and a negative instruction")
    pairs = tuple(_parse_pair(entry, f"{where}: pairs[{i}]") for i, entry in enumerate(entries, start=1))
    first_seen: dict[InstructionPair, int] = {}
    for i, pair in enumerate(pairs, start=1):
        if pair in first_seen:
            raise PromptError(f"{where}: pairs[{i}] repeats pairs[{first_seen[pair]}]: remove one (a repeat would be drawn twice as often)")
        first_seen[pair] = i
    return InstructionBank(name, raw.get("description", ""), pairs, raw.get("source", ""))


def _parse_pair(entry: object, where: str) -> InstructionPair:
    if not isinstance(entry, dict):
        raise PromptError(f"{where}: an entry must have the keys positive and negative; this one is {entry!r}")
    _check_keys(entry, _PAIR_KEYS, where)
    texts = []
    for key in _PAIR_KEYS:
        value = entry.get(key)
        if value is None:
            raise PromptError(f"{where}: {key} is missing; an entry is a pair, add the {key} instruction of like form and length")
        if not isinstance(value, str):
            raise PromptError(f"{where}: {key} is {value!r}, a {type(value).__name__}; put the instruction in quotes")
        if not value.strip():
            raise PromptError(f"{where}: {key} is empty; write the instruction, or remove the entry")
        texts.append(value.strip())
    if texts[0].casefold().split() == texts[1].casefold().split():
        raise PromptError(f"{where}: positive and negative are the same ({texts[0]!r}): there would be no contrast; change one")
    return InstructionPair(*texts)


def _check_keys(mapping: dict[Any, Any], allowed: Sequence[str], where: str) -> None:
    for key in mapping:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it;"
            raise PromptError(f"{where}: unknown key {key!r}: {hint} allowed are {', '.join(allowed)}")


# ---- Stable draws ----------------------------------------------------------------------------------------------------


def _stable_hash(*parts: str | int) -> int:
    """The first 64 bits of a BLAKE2b hash: the same in every process, on every machine, in every order of calls."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode("ascii"), digest_size=8).digest(), "big")


def draw_pair(bank: InstructionBank, *, run_seed: int, round_index: int, prompt_id: str) -> InstructionPair:
    """The pair that a prompt is sampled with in a round; it depends on the arguments alone. Rounds draw anew."""
    return bank.pairs[_stable_hash("pair", run_seed, round_index, prompt_id) % len(bank.pairs)]


def completion_seed(run_seed: int, round_index: int, prompt_id: str, origin: str, index: int) -> int:
    """A completion's seed, in [0, 2**63): the same whatever the batch, the order, the ranks or an interruption."""
    return _stable_hash("completion", run_seed, round_index, prompt_id, origin, index) >> 1


# ---- Putting an instruction on a prompt ------------------------------------------------------------------------------


def instructed(prompt: Prompt, instruction: str, placement: str) -> tuple[Prompt, str]:
    """The prompt with the instruction on it, and the text that the assistant's answer is made to begin with.

    Conversations:
    - `system`: the system turn, after a blank line when there is one already, else a new one. A template that writes a
      default system turn when none is given (SmolLM2's, Qwen's) writes the instruction *instead* of that default.
    - `user_suffix`: the end of the last user turn; on the same line after a finished sentence, else on its own line.
    - `affix`: "(instruction)" as the first line of the assistant's turn, right before the answer. It is returned as
      the second value, and is part of the sampling prompt, never of the completion.

    Text prompts:
    - `system`: a paragraph before the prompt.
    - `user_suffix`: as above, before a last line that only names the next speaker ("Assistant:", "### Response:").
    - `affix`: inside that last line, as RLCD has it: "Assistant (instruction):". Without such a line, a line of its own
      after the prompt. The second value is always ''.

    The affix drops the instruction's full stop and its first capital: "(answer in a kind way)".
    """
    if placement not in ("system", "user_suffix", "affix"):
        raise PromptError(f"the instruction placement is {placement!r}; it must be one of system, user_suffix, affix")
    if isinstance(prompt, str):
        return _instructed_text(prompt, instruction, cast("Placement", placement)), ""
    _check_messages(prompt)
    messages: list[Message] = [dict(m) for m in prompt]
    if placement == "affix":
        return messages, f"{_parenthesised(instruction)}\n"
    if placement == "system":
        if messages[0]["role"] in ("system", "developer"):
            messages[0]["content"] = f"{messages[0]['content'].rstrip()}\n\n{instruction}".lstrip()
        else:
            messages.insert(0, {"role": "system", "content": instruction})
        return messages, ""
    last_user = next((m for m in reversed(messages) if m["role"] == "user"), None)
    if last_user is None:
        raise PromptError("the conversation has no user turn, so user_suffix has nothing to stand on: add one, or use placement system")
    last_user["content"] = _with_suffix(last_user["content"], instruction)
    return messages, ""


def _instructed_text(prompt: str, instruction: str, placement: Placement) -> str:
    if _RENDERED_END.search(prompt):
        raise PromptError(
            f"the text prompt ends in a chat template's control tokens ({prompt[-40:]!r}), so an instruction would land in "
            "the wrong turn: give the prompt as a list of messages instead, and the template is applied for you"
        )
    if placement == "system":
        return f"{instruction}\n\n" + prompt.lstrip("\n")
    speaker = _SPEAKER_LINE.search(prompt)
    if placement == "affix":
        if speaker:
            end = speaker.end("label")
            return f"{prompt[:end]} {_parenthesised(instruction)}{prompt[end:]}"
        return f"{prompt.rstrip()}\n{_parenthesised(instruction)}\n"
    cut = speaker.start() if speaker and prompt[: speaker.start()].strip() else len(prompt)
    return _with_suffix(prompt[:cut], instruction) + prompt[cut:]


def _with_suffix(turn: str, instruction: str) -> str:
    """The instruction after the turn's last word; white space that the turn ends in stays behind it."""
    text = turn.rstrip()
    separator = " " if _SENTENCE_END.search(text) else "\n"
    return f"{text}{separator if text else ''}{instruction}{turn[len(text) :]}"


def _parenthesised(instruction: str) -> str:
    text = instruction.strip().removesuffix(".")
    first = text.partition(" ")[0]
    # "Answer …" loses its capital; "I", "AI" and "NASA" keep theirs.
    if len(first) > 1 and first[1:].islower():
        text = text[0].lower() + text[1:]
    return f"({text})"


# ---- Rendering -------------------------------------------------------------------------------------------------------


def prompt_text(tokenizer: Any, prompt: Prompt, assistant_prefix: str = "") -> str:
    """The prompt as the policy reads it, generation prompt included: for people and logs.

    Sample from `prompt_ids`: text cannot tell a control token from a user who wrote one.
    """
    if isinstance(prompt, str):
        return prompt + assistant_prefix
    return _render(tokenizer, prompt) + assistant_prefix


def prompt_ids(tokenizer: Any, prompt: Prompt, assistant_prefix: str = "") -> list[int]:
    """The prompt's token ids, generation prompt included.

    A conversation gives exactly what `apply_chat_template(..., add_generation_prompt=True)` gives, unless a message
    contains a control token as text ("what does <|im_end|> mean?"): that stays text, so that no message can end its
    own turn. A text prompt is tokenised as the tokenizer does by default, with its BOS convention (once, where the text
    begins with BOS already); control tokens in it are meant.
    """
    if isinstance(prompt, str):
        text = prompt + assistant_prefix
        has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        return _encode(tokenizer, text, add_special_tokens=not has_bos)
    texts = [m["content"] for m in _check_messages(prompt)] + [assistant_prefix]
    if not any(token in text for token in _control_tokens(tokenizer) for text in texts):
        return _encode(tokenizer, prompt_text(tokenizer, prompt, assistant_prefix), add_special_tokens=False)
    # The prefix goes through the template too, so that it is kept as text and joined as in the ordinary case.
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


def answer_text_ids(tokenizer: Any, text: str, *, conversational: bool) -> list[int]:
    """The ids of an answer's text, without what ends its turn. In a conversation, what looks like a control token stays text;
    beside a text prompt it is meant."""
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
    """The token that ends an answer: the one that the chat template writes after it (Gemma's and Phi's is not their eos), or
    eos for text prompts and templates that write none."""
    if not conversational or not getattr(tokenizer, "chat_template", None):
        return int(tokenizer.eos_token_id)
    answer = "neat-answer"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    after = str(_apply(tokenizer, turns, add_generation_prompt=False, tokenize=False)).rpartition(answer)[2].lstrip()
    written = next((token for token in _control_tokens(tokenizer) if after.startswith(token)), None)
    return int(tokenizer.eos_token_id if written is None else tokenizer.convert_tokens_to_ids(written))


def eos_token_ids(tokenizer: Any, model: Any, *, conversational: bool) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's eos, the template's end of a turn, and the model's own list."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    turn_end = end_of_turn_id(tokenizer, conversational=conversational)
    return tuple(sorted({tokenizer.eos_token_id, turn_end, *([listed] if isinstance(listed, int) else listed or [])}))


def _control_tokens(tokenizer: Any) -> list[str]:
    """Special tokens, and added tokens that the chat template writes (Qwen's `<think>`)."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = tokenizer.added_tokens_decoder.values()
    return [t.content for t in added if t.special or (t.content in template and not t.content.isspace())]


def _encode(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return [int(i) for i in ids]


def _render(tokenizer: Any, messages: list[Message]) -> str:
    _check_messages(messages)
    return cast("str", _apply(tokenizer, messages, tokenize=False))


def _apply(tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool = True, **kwargs: Any) -> object:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            f"the prompt is a conversation, but the tokenizer of {_name(tokenizer)} has no chat template: use an instruct model, set "
            "tokenizer.chat_template, or give the prompts as text"
        )
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **kwargs)
    except Exception as error:  # a template is somebody's program and can raise anything
        roles = ", ".join(m["role"] for m in messages)
        raise PromptError(f"the chat template of {_name(tokenizer)} failed on a conversation with the turns {roles}: {error}") from error


def _check_messages(messages: list[Message]) -> list[Message]:
    if not messages:
        raise PromptError("the conversation is empty: a prompt needs at least one user turn")
    for i, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise PromptError(f"turn {i} of the conversation is {message!r}; a turn needs a role and a content, both text")
    if messages[-1]["role"] == "assistant":
        raise PromptError(
            "the conversation ends in an assistant turn: a prompt must end where the assistant is to answer; remove that turn"
        )
    return messages


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


# ---- Checks before a run ---------------------------------------------------------------------------------------------

_QUESTION: Message = {"role": "user", "content": "What would you do with a free evening?"}
_PROBES: tuple[list[Message], ...] = (
    [_QUESTION],
    [_QUESTION, {"role": "assistant", "content": "I would read a book."}, {"role": "user", "content": "Which one would you read?"}],
)
_TEXT_PROBES = ("What would you do with a free evening?", "\n\nHuman: What would you do with a free evening?\n\nAssistant:")


def check_template(tokenizer: Any, bank: InstructionBank, placement: str, *, conversational: bool) -> None:
    """Refuse, before anything is sampled, a tokenizer with which the contrast would be wrong or empty.

    Raises PromptError when conversations meet a tokenizer without a chat template, when the template raises on or drops
    the turn that carries the instruction, when positive and negative give the same ids or the same ids as the plain
    prompt, or when the tokenizer closes a text prompt with an end-of-sequence token.
    """
    probes: Sequence[Prompt] = _PROBES if conversational else _TEXT_PROBES
    for probe in probes:
        plain = prompt_ids(tokenizer, probe)
        if not conversational and plain and plain[-1] == tokenizer.eos_token_id:
            raise PromptError(
                f"the tokenizer of {_name(tokenizer)} ends every text with {tokenizer.eos_token!r}, so the model would be asked to write "
                "after its end: set tokenizer.add_eos_token = False"
            )
        for i, pair in enumerate(bank.pairs, start=1):
            where = f"pairs[{i}] of bank {bank.name!r}"
            positive = _checked_ids(tokenizer, probe, pair.positive, placement, where)
            negative = _checked_ids(tokenizer, probe, pair.negative, placement, where)
            if positive == negative:
                raise PromptError(
                    f"{where}: the positive and the negative instruction give the same token ids with the tokenizer of "
                    f"{_name(tokenizer)} (its unknown token?): there would be no contrast; change the wording, or use another tokenizer"
                )
            if plain in (positive, negative):
                raise PromptError(f"{where}: with placement {placement} an instructed prompt equals the plain one; use another placement")


def _checked_ids(tokenizer: Any, probe: Prompt, instruction: str, placement: str, where: str) -> list[int]:
    other = {"system": "user_suffix, which every template keeps", "affix": "user_suffix", "user_suffix": "affix"}
    prompt, prefix = instructed(probe, instruction, placement)
    try:
        text = prompt_text(tokenizer, prompt, prefix)
        ids = prompt_ids(tokenizer, prompt, prefix)
    except PromptError as error:
        if placement == "system" and getattr(tokenizer, "chat_template", None):
            raise PromptError(f"{error}. It takes no system turn: set instruction_placement to {other['system']}") from error
        raise
    expected = _parenthesised(instruction) if placement == "affix" else instruction
    if expected not in text:
        raise PromptError(
            f"{where}: the chat template of {_name(tokenizer)} drops or changes the {placement} instruction {expected!r}, so good and bad "
            f"answers would be sampled alike: set instruction_placement to {other.get(placement, 'user_suffix')}"
        )
    return ids
