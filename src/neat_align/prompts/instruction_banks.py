"""Banks of instruction pairs: what makes the model answer well or badly while it samples.

A bank holds pairs of like form and length, so that the two answers differ in behaviour and in
nothing else (the lesson of RLCD, arXiv:2307.12950).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from neat_align.errors import PromptError, did_you_mean
from neat_align.files.yaml import YamlDocument, parse_yaml, read_yaml

Polarity: TypeAlias = Literal["positive", "negative", "plain"]
# The two that a pair contrasts.
Contrasted: TypeAlias = Literal["positive", "negative"]
CONTRASTED: tuple[Contrasted, ...] = get_args(Contrasted)
SHIPPED_BANKS = ("harmlessness", "helpfulness", "honesty", "politeness", "sentiment")
_BANK_KEYS = ("name", "description", "source", "pairs")
_PAIR_KEYS = ("positive", "negative")


@dataclass(frozen=True, slots=True)
class InstructionPair:
    """Two sentences of like form: one asks for good behaviour, the other for bad."""

    positive: str
    negative: str

    def of(self, polarity: Contrasted) -> str:
        """The instruction of this polarity."""
        return self.positive if polarity == "positive" else self.negative


@dataclass(frozen=True, slots=True)
class InstructionBank:
    """Pairs that all contrast one value.

    `source` says where the wording comes from and what was measured.
    """

    name: str
    description: str
    pairs: tuple[InstructionPair, ...]
    source: str = ""


def load_bank(name_or_path: str) -> InstructionBank:
    """The shipped bank of that name, or the bank in that YAML file.

    A shipped name wins over a file of the same name. Raises PromptError that names the file, the
    entry, and what to change.
    """
    if name_or_path in SHIPPED_BANKS:
        file = f"{name_or_path}.yaml"
        text = resources.files("neat_align.prompts").joinpath("banks", file).read_text("utf-8")
        return _parse_bank(parse_yaml(text, file, PromptError), file)
    path = Path(name_or_path).expanduser()
    has_separator = "/" in name_or_path or os.sep in name_or_path
    looks_like_path = has_separator or path.suffix in (".yaml", ".yml")
    if not looks_like_path and not path.is_file():
        meant = did_you_mean(name_or_path, SHIPPED_BANKS)
        hint = f" D{meant[1:]}" if meant else ""
        raise PromptError(
            f"there is no instruction bank {name_or_path!r}.{hint} Shipped banks: "
            f"{', '.join(SHIPPED_BANKS)}. For a bank of your own, give the path of its .yaml file"
        )
    if not path.exists():
        raise PromptError(
            f"{path}: the instruction bank cannot be read (no such file). Give the path of a YAML "
            f"file, or one of the shipped names: {', '.join(SHIPPED_BANKS)}"
        )
    return _parse_bank(read_yaml(path, PromptError), str(path))


def _parse_bank(document: YamlDocument, where: str) -> InstructionBank:
    raw = document.value
    if not isinstance(raw, dict):
        raise PromptError(
            f"{where}: a bank is a mapping with the keys {', '.join(_BANK_KEYS)}; this file is a "
            f"{type(raw).__name__}"
        )
    _check_keys(raw, _BANK_KEYS, where)
    texts = {
        "name": raw.get("name", Path(where).stem),
        "description": raw.get("description", ""),
        "source": raw.get("source", ""),
    }
    for key, value in texts.items():
        if not isinstance(value, str):
            raise PromptError(f"{where}: {key} is {value!r}; it must be text (put it in quotes)")
    entries = raw.get("pairs")
    if not isinstance(entries, list) or not entries:
        raise PromptError(
            f"{where}: pairs must be a list of one or more entries, each with a positive and a "
            "negative instruction"
        )
    pairs = tuple(
        _parse_pair(entry, f"{where}: pairs[{i}]") for i, entry in enumerate(entries, start=1)
    )
    first_seen: dict[InstructionPair, int] = {}
    for i, pair in enumerate(pairs, start=1):
        if pair in first_seen:
            raise PromptError(
                f"{where}: pairs[{i}] repeats pairs[{first_seen[pair]}]: remove one (a repeat "
                "would be drawn twice as often)"
            )
        first_seen[pair] = i
    return InstructionBank(texts["name"], texts["description"], pairs, texts["source"])


def _parse_pair(entry: object, where: str) -> InstructionPair:
    if not isinstance(entry, dict):
        raise PromptError(
            f"{where}: an entry must have the keys positive and negative; this one is {entry!r}"
        )
    _check_keys(entry, _PAIR_KEYS, where)
    texts = []
    for key in _PAIR_KEYS:
        value = entry.get(key)
        if value is None:
            raise PromptError(
                f"{where}: {key} is missing; an entry is a pair, add the {key} instruction of "
                "like form and length"
            )
        if not isinstance(value, str):
            raise PromptError(
                f"{where}: {key} is {value!r}, a {type(value).__name__}; put the instruction in "
                "quotes"
            )
        if not value.strip():
            raise PromptError(
                f"{where}: {key} is empty; write the instruction, or remove the entry"
            )
        texts.append(value.strip())
    if texts[0].casefold().split() == texts[1].casefold().split():
        raise PromptError(
            f"{where}: positive and negative are the same ({texts[0]!r}): there would be no "
            "contrast; change one"
        )
    return InstructionPair(*texts)


def _check_keys(mapping: dict[Any, Any], allowed: Sequence[str], where: str) -> None:
    for key in mapping:
        if key not in allowed:
            hint = did_you_mean(key, allowed) or "remove it;"
            raise PromptError(
                f"{where}: unknown key {key!r}: {hint} allowed are {', '.join(allowed)}"
            )
