"""How the help of every verb looks: usage, examples, then options in groups, within 80 columns."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Collection, Iterable, Sequence

import typer

from neat_align.cli.option_facts import OptionFacts
from neat_align.cli.option_names import flags

_WIDEST = 80
_INDENT = " " * 6


def width() -> int:
    """Columns of a page: those of the terminal, 80 at most."""
    return min(_WIDEST, shutil.get_terminal_size().columns)


def paragraph(text: str) -> str:
    """A text in lines of the page's width; what is indented (a command) is left as it is."""
    blocks = text.strip("\n").split("\n\n")
    return "\n\n".join(b if b.startswith(" ") else textwrap.fill(b, width()) for b in blocks)


def option_group(title: str, entries: Iterable[str]) -> str:
    """A titled group of entries."""
    return f"\n{typer.style(title, bold=True, underline=True)}\n" + "\n".join(entries)


def verb(name: str, text: str) -> str:
    """A verb and what it is for, beside it."""
    words = " ".join(text.split("\n\n")[0].split())
    body = textwrap.fill(words, width(), initial_indent=" " * 14, subsequent_indent=" " * 14)
    return f"  {typer.style(name, bold=True)}{' ' * max(1, 12 - len(name))}{body.lstrip()}"


def run_option(facts: OptionFacts, taken: Collection[str] = (), is_optional: bool = False) -> str:
    """The entry of an option of a run, without the names that the verb has `taken` for others."""
    names = [name for name in flags(facts.name) if name not in taken]
    default = "" if is_optional and facts.default == "required" else facts.default
    return entry(names, facts.kind, facts.help, default, facts.choices)


def usage(command: str, words: Sequence[str]) -> str:
    """The first line of a page, or the first few."""
    begin = f"Usage: {command} "
    folded = textwrap.wrap(
        " ".join(word.replace(" ", "\0") for word in words),
        width(),
        initial_indent=begin,
        subsequent_indent=" " * len(begin),
        break_on_hyphens=False,
    )
    return "\n".join(folded).replace("\0", " ")


def entry(
    names: Sequence[str], kind: str, help_text: str, default: str, choices: Sequence[str] = ()
) -> str:
    """An option: its names, the word for its value and the default, and below them what it does."""
    value = "|".join(choices) if choices else kind
    shown = f"[{default}]" if default else ""
    head = ", ".join(names)
    plain = "  " + " ".join(filter(None, (head, value, shown)))
    lines = [plain]
    if len(plain) > width():
        lines = [f"  {head}", *_folded(value, "|"), *([_INDENT + shown] if shown else [])]
    lines[0] = lines[0].replace(head, ", ".join(typer.style(name, bold=True) for name in names), 1)
    body = textwrap.fill(
        help_text,
        width(),
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join([*lines, *([body] if body else [])])


def _folded(text: str, separator: str) -> list[str]:
    """A text broken after separators, where it is too long for a line."""
    spaced = text.replace(separator, f"{separator} ")
    folded = textwrap.wrap(spaced, width() - len(_INDENT), break_on_hyphens=False)
    return [_INDENT + line.replace(f"{separator} ", separator) for line in folded]
