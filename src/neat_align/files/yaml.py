"""YAML that a user wrote: read safely, with the line of every option, and with a limit on what a
small file can grow to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from neat_align.errors import NEATError, one_line

# Values and characters of a document once its aliases are expanded: ten nested aliases make
# gigabytes of one kilobyte.
MAX_EXPANDED = 1_000_000
# Besides its own errors, PyYAML lets through what Python raises on a date such as 2024-13-45, on
# deep nesting, or on `!!int ""`.
_PYTHON_ERRORS = (
    ValueError,
    RecursionError,
    OverflowError,
    TypeError,
    AttributeError,
    LookupError,
)


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """What a YAML file holds, the line (from 1) of each key at its top, and the file's name."""

    value: Any
    lines: Mapping[str, int]
    where: str

    def place(self, key: str) -> str:
        """`file:line` of a key at the top; the file alone where the key has no line of its own
        (one that was merged in with `<<`).
        """
        return f"{self.where}:{self.lines[key]}" if key in self.lines else self.where


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
        byte = f"0x{raw[error.start]:02x}"
        raise fail(
            f"{path}:{line}: not valid UTF-8 (byte {byte}): save the file as UTF-8"
        ) from error
    return parse_yaml(text, str(path), fail)


def parse_yaml(text: str, where: str, fail: type[NEATError]) -> YamlDocument:
    """The document in a text.

    Raises `fail` for what is not one YAML document, for a key given twice (YAML would silently take
    the last), for text that UTF-8 cannot hold, and for a document that its aliases make huge.
    """
    with _syntax_errors(where, fail):
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    # Before the values are made: merge keys (<<) copy what their aliases name.
    _check_nodes(root, where, fail)
    with _syntax_errors(where, fail):
        value = None if root is None else loader.construct_document(root)
    lines = _key_lines(root, where, fail) if isinstance(root, yaml.MappingNode) else {}
    return YamlDocument(value, lines, where)


@contextlib.contextmanager
def _syntax_errors(where: str, fail: type[NEATError]) -> Iterator[None]:
    """What PyYAML raises, as `fail` with the line."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise fail(
            f"{where}{line}: not valid YAML ({error.problem}): correct the line, or put its text "
            "in quotes"
        ) from error
    except (yaml.YAMLError, *_PYTHON_ERRORS) as error:
        said = one_line(error, 200)
        raise fail(
            f"{where}: not valid YAML ({said}): correct the file, or put its texts in quotes"
        ) from error


def _check_nodes(root: yaml.Node | None, where: str, fail: type[NEATError]) -> None:
    """Refuse repeated keys, lone surrogates, and too much; an alias counts as what it names.

    A node is looked at once, however many aliases name it: what it holds, written out, is the sum
    over its children. A node inside of itself holds too much.
    """
    sizes: dict[int, int] = {}
    waiting = [] if root is None else [root]
    opened: set[int] = set()
    while waiting:
        node = waiting[-1]
        children = _children(node)
        if id(node) not in opened:
            opened.add(id(node))
            _check_node(node, where, fail)
            waiting += [child for child in children if id(child) not in opened]
            continue
        waiting.pop()
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        size = 1 + own + sum(sizes.get(id(child), MAX_EXPANDED) for child in children)
        sizes[id(node)] = size
        if size > MAX_EXPANDED:
            raise fail(
                f"{where}: with its aliases (*name) written out it holds more than "
                f"{MAX_EXPANDED:,} values and characters: shorten it, or write what is meant "
                "without aliases"
            )


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if isinstance(node, yaml.MappingNode):
        return list(chain.from_iterable(node.value))
    return []


def _check_node(node: yaml.Node, where: str, fail: type[NEATError]) -> None:
    if isinstance(node, yaml.ScalarNode):
        _check_text(node.value, where, fail)
    elif isinstance(node, yaml.MappingNode):
        _key_lines(node, where, fail)


def _key_lines(node: yaml.MappingNode, where: str, fail: type[NEATError]) -> dict[str, int]:
    """The line of each key that is plain text, a number or a date. Raises `fail` for a key given
    twice.
    """
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            raise fail(
                f"{where}:{line}: {key.value!r} is also on line {lines[key.value]}, and only one "
                "could count: keep one"
            )
        lines[key.value] = line
    return lines


def _check_text(text: str, where: str, fail: type[NEATError]) -> None:
    surrogate = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    if surrogate is not None:
        raise fail(
            f"{where}: a text holds the lone surrogate U+{ord(surrogate):04X}, half of a "
            "character: replace it in the text"
        )
