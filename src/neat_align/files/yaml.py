"""YAML that a user wrote: read safely, with the line of every option, and with a limit on what a
small file can grow to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neat_align.errors import NEATError

# Values and characters of a document once its aliases are expanded: ten nested aliases make
# gigabytes of one kilobyte.
MAX_EXPANDED = 1_000_000


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """What a YAML file holds, and the line (from 1) of each key at its top."""

    value: Any
    lines: Mapping[str, int]


def read_yaml(path: Path, fail: type[NEATError]) -> YamlDocument:
    """The document in a UTF-8 file.

    Raises `fail` naming file and line, also for a file that cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise fail(
            f"{path}: cannot be read ({error.strerror}): check the path and its permissions"
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise fail(
            f"{path}:{line}: not valid UTF-8 (byte 0x{raw[error.start]:02x}): save the file as "
            "UTF-8"
        ) from error
    return parse_yaml(text, str(path), fail)


def parse_yaml(text: str, where: str, fail: type[NEATError]) -> YamlDocument:
    """The document in a text. Raises `fail` for what is not one YAML document, for a key given
    twice (YAML would silently take the last), for text that UTF-8 cannot hold, and for a document
    that its aliases make huge.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise fail(
            f"{where}{line}: not valid YAML ({error.problem}): correct the line, or put its text "
            "in quotes"
        ) from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
        OverflowError,
        TypeError,
        AttributeError,
        LookupError,
    ) as error:
        # Besides its own errors the library raises Python's on a date such as 2024-13-45, on deep
        # nesting, on `!!int ""`.
        said = " ".join(str(error).split())[:200]
        raise fail(
            f"{where}: not valid YAML ({said}): correct the file, or put its texts in quotes"
        ) from error
    _check_size(value, where, fail)
    return YamlDocument(value, _lines(node, where, fail))


def _lines(root: yaml.Node | None, where: str, fail: type[NEATError]) -> dict[str, int]:
    """Lines of the keys at the top, after a look for repeated keys at every depth."""
    top: dict[str, int] = {}
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            waiting.append(value)
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise fail(
                    f"{where}:{line}: {key.value!r} is also on line {lines[key.value]}, and only "
                    "one could count: keep one"
                )
            lines[key.value] = line
        top = lines if node is root else top
    return top


def _check_size(value: Any, where: str, fail: type[NEATError]) -> None:
    waiting, size = [value], 0
    while waiting:
        item = waiting.pop()
        size += 1
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            waiting += item
        elif isinstance(item, str):
            size += len(item)
            surrogate = next((c for c in item if "\ud800" <= c <= "\udfff"), None)
            if surrogate is not None:
                raise fail(
                    f"{where}: a text holds the lone surrogate U+{ord(surrogate):04X}, half of a "
                    "character: replace it in the text"
                )
        if size > MAX_EXPANDED:
            raise fail(
                f"{where}: with its aliases (*name) written out it holds more than "
                f"{MAX_EXPANDED:,} values and characters: shorten it, "
                "or write what is meant without aliases"
            )
