"""A verb of the command line: how its help looks, what it completes, how its lists are written."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from neat_align.cli import completion, help_page
from neat_align.cli.option_facts import OptionFacts, every_option, our_options
from neat_align.cli.pages import BEGIN, LOOK, MEASURE, PAGES, RUN, Page

HELP_ALL = "--help-all"
_KINDS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: ""}


class Verbs(TyperGroup):
    """The command line as a whole: its verbs in groups."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The first page."""
        parts = [
            f"Usage: {ctx.command_path} VERB [OPTIONS]\n",
            help_page.paragraph(inspect.cleandoc(self.help or "")),
            f"\n`{ctx.command_path} VERB --help` has examples and every option of a verb.",
        ]
        for group in (BEGIN, RUN, MEASURE, LOOK):
            verbs = [(n, c) for n, c in self.commands.items() if PAGES[n].group == group]
            lines = [help_page.verb(n, inspect.cleandoc(c.help or "")) for n, c in verbs]
            parts.append(help_page.option_group(group, lines))
        params: list[Any] = self.get_params(ctx)
        own = [help_page.entry(p.opts, "", p.help or "", "") for p in params]
        parts.append(help_page.option_group("Options", own))
        formatter.write("\n".join(parts) + "\n")


class Verb(TyperCommand):
    """A command whose help has the form of all, whose list options take their values in a row
    (`--alpha 0.5 1`, beside `--alpha 0.5 --alpha 1`), and which completes a run's options where it
    takes them.
    """

    @property
    def page(self) -> Page:
        """What the verb's help says besides its own options."""
        return PAGES[self.name or ""]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Every value with the name of its option before it."""
        if self.page.run_options and any(_bare(word) == _bare(HELP_ALL) for word in args):
            typer.echo(self._text(ctx, every=True), color=ctx.color)
            ctx.exit()
        options = [p for p in self.params if isinstance(p, TyperOption) and p.multiple]
        return super().parse_args(ctx, _one_each(args, {_bare(o) for p in options for o in p.opts}))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The verb's page."""
        formatter.write(self._text(ctx, every=False))

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Names of options, or values of the run's option that stands before."""
        takes_run = bool(self.page.run_options)
        if incomplete.startswith("-"):
            own = [name for p in self.get_params(ctx) for name in _names(p)]
            own += [name for names, _, _ in self.page.more for name in names]
            offered = own + ([HELP_ALL, *completion.run_flags()] if takes_run else [])
            return completion.items(offered, incomplete)
        return completion.values_after(ctx.args, incomplete) if takes_run else []

    def _text(self, ctx: Any, *, every: bool) -> str:
        page = self.page
        parts = [
            f"{help_page.usage(ctx.command_path, _usage(self, page))}\n",
            help_page.paragraph(inspect.cleandoc(self.help or "")),
            *(["\nExamples:"] if page.examples else []),
            *(f"  {line}" for line in page.examples),
            *([f"\n{help_page.paragraph(page.note)}"] if page.note else []),
            *self._own_groups(ctx),
            *_run_groups(page, {n for p in self.params for n in _names(p)}, every=every),
        ]
        return "\n".join(parts) + "\n"

    def _own_groups(self, ctx: Any) -> Iterator[str]:
        hints = typing.get_type_hints(inspect.unwrap(typing.cast("Any", self.callback)))
        titled: dict[str, list[str]] = {"This command": []}
        params: list[Any] = self.get_params(ctx)
        for param in params:
            title = str(param.rich_help_panel or "This command")
            titled.setdefault(title, []).append(_own_entry(param, hints.get(str(param.name))))
        titled["This command"] += [help_page.entry(*words, "") for words in self.page.more]
        if self.page.run_options:
            titled["This command"].append(help_page.entry([HELP_ALL], "", "Every option.", ""))
        for title, entries in titled.items():
            yield help_page.option_group(title, entries)


def _run_groups(page: Page, taken: Collection[str], *, every: bool) -> Iterator[str]:
    """The groups of a run's options; `taken` are the names that the verb has itself."""
    if not page.run_options:
        return
    known: Mapping[str, OptionFacts] = every_option() if every else our_options()
    shown: set[str] = set()
    for title, names in page.groups(every=every).items():
        left = [n for n in names if n in known and n not in shown and f"--{n}" not in taken]
        shown |= {*names}
        if left:
            entries = (help_page.run_option(known[n], taken, page.has_model) for n in left)
            yield help_page.option_group(title, entries)


def _own_entry(param: Any, hint: Any) -> str:
    if isinstance(param, TyperArgument):
        return help_page.entry([str(param.name).upper()], "", param.help or "", "")
    default = param.default
    shown = "required" if param.required else ""
    if not param.required and default not in (None, "", [], ()) and not callable(default):
        value = str(default).lower() if isinstance(default, bool) else str(default)
        shown = "" if param.is_flag and not param.secondary_opts and not default else value
        shown = f"default: {shown}" if shown else ""
    kind, choices = _value_word(param, hint)
    return help_page.entry(_names(param), kind, param.help or "", shown, choices)


def _value_word(param: Any, hint: Any) -> tuple[str, tuple[str, ...]]:
    if param.is_flag or hint is None:
        return "", ()
    if param.metavar:
        return str(param.metavar), ()
    kinds = [k for k in (typing.get_args(hint) or (hint,)) if k is not type(None)]
    inner = typing.get_args(kinds[0]) or kinds[0:1]
    choices = [str(member.value) for member in inner[0]] if inner[0] not in _KINDS else []
    word = _KINDS.get(inner[0], "TEXT")
    return (f"{word} ..." if param.multiple else word), tuple(choices)


def _names(param: Any) -> list[str]:
    """An option's spellings as the help writes them, with underscores."""
    if not isinstance(param, TyperOption):
        return []
    written = [*param.opts, *param.secondary_opts]
    return list(dict.fromkeys("--" + _bare(name) for name in written if name.startswith("--")))


def _usage(command: TyperCommand, page: Page) -> list[str]:
    """The arguments of a verb, and its options that must be given, by their shortest names."""
    words = []
    for param in command.params:
        if isinstance(param, TyperArgument):
            words.append(str(param.name).upper())
        elif param.required:
            words.append(f"{min(_names(param), key=len)} {str(param.name).upper()}")
    words += ["[OPTIONS]"] if any(not p.required for p in command.params) else []
    return words + (["[--option VALUE ...]"] if page.run_options else [])


def _one_each(args: list[str], lists: set[str]) -> list[str]:
    spread: list[str] = []
    option: str | None = None  # the list option whose values these are
    has_value = True
    for word in args:
        if not has_value:  # the first value may begin with a minus
            spread.append(word)
            has_value = True
        elif word.startswith("-"):
            name, _, value = word.partition("=")
            option = name if _bare(name) in lists else None
            has_value = bool(value) or option is None
            spread.append(word)
        else:
            spread += [word] if option is None else [option, word]
    return spread


def _bare(name: str) -> str:
    return name.lstrip("-").replace("-", "_")
