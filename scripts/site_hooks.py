"""Hooks of the site's build (mkdocs.yml): links, formulas, pages that are made from the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# A Markdown link to a file, without its anchor.
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s:]+\.\w+)(?:#[^)\s]*)?\)")
# What pymdownx.arithmatex leaves of a formula.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
# Shown by the page about Python before the rest.
_FIRST = ("NEATTrainer", "NEATConfig")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A file of the repository that the site does not have is named instead of linked."""
    folder = ROOT / "docs" / Path(page.file.src_uri).parent

    def named(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.is_file():
            return match[0]
        path = target.relative_to(ROOT)
        is_on_site = path.parts[0] == "docs" and path.parts[1] != "results"
        return match[0] if is_on_site else f"{match[1]} (`{path}`)"

    return _LINK.sub(named, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas become MathML, which browsers draw by themselves."""

    def drawn(match: re.Match[str]) -> str:
        display = "inline" if match[2] == "(" else "block"
        formula = match[3].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return str(convert(formula, display=display))

    return _FORMULA.sub(drawn, html)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """The pages that are made from the code."""
    for uri, content in (
        ("reference/python.md", python_page()),
        ("reference/options.md", options_page()),
        ("reference/commands.md", commands_page()),
    ):
        files.append(File.generated(config, uri, content=content))
    return files


def python_page() -> str:
    """Everything that the package promises, from its docstrings."""
    import neat_align

    rest = sorted(set(neat_align.__all__) - set(_FIRST))
    parts = [
        "# Python\n",
        "What `neat_align` exports is the public API; nothing else is promised. Options of "
        "`NEATConfig` are on [their own page](options.md).\n",
    ]
    for name in (*_FIRST, *rest):
        kind = getattr(neat_align, name)
        parts.append(f"::: {kind.__module__}.{kind.__name__}\n")
        if name == "NEATConfig":
            parts.append("    options:\n      members: false\n")
    return "\n".join(parts)


def options_page() -> str:
    """Every option of a run, in the groups of `neat-align train --help`."""
    from neat_align.cli.option_facts import every_option
    from neat_align.cli.option_groups import GROUPS, TRAINER_GROUPS

    facts = every_option()
    parts = [
        "# Options\n",
        "Every option of `neat-align train`, in a recipe (`name: value`) and on the command line "
        "(`--name value`); `NEATConfig` has those of training as fields.\n",
    ]
    for title, names in {**GROUPS, **TRAINER_GROUPS}.items():
        parts += [f"## {title}\n", "| option | value | default | |", "|---|---|---|---|"]
        for name in names:
            option = facts[name]
            value = " \\| ".join(f"`{c}`" for c in option.choices) or option.kind
            default = option.default.removeprefix("default: ")
            words = option.help.replace("|", "\\|")
            parts.append(f"| `{name}` | {value} | {default} | {words} |")
        parts.append("")
    return "\n".join(parts)


def commands_page() -> str:
    """The help of every verb, as a terminal shows it."""
    from typer.testing import CliRunner

    from neat_align.cli import app

    runner = CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})
    verbs = sorted(command.name or "" for command in _commands(app))
    parts = ["# Commands\n"]
    for words in ([], *([verb] for verb in verbs)):
        shown = runner.invoke(app, [*words, "--help"], prog_name="neat-align").output
        parts += [
            f"## neat-align {' '.join(words)}".rstrip(),
            "",
            f"```text\n{shown.rstrip()}\n```\n",
        ]
    return "\n".join(parts)


def _commands(app: Any) -> list[Any]:
    import typer.main

    return list(typer.main.get_command(app).commands.values())  # type: ignore[attr-defined]
