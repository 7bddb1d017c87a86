"""Hooks of the site's build (mkdocs.yml): links, formulas, and pages that are made from the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# A Markdown link to a file of the repository that is no page of the site.
_OUT_OF_DOCS = re.compile(r"\]\(((?:\.\./)+)((?!\.\./)[^)#\s]+)(#[^)\s]*)?\)")
_RESULT = re.compile(r"\]\((?:\.\./)*(results/[^)#\s]+)\)")
# What pymdownx.arithmatex leaves of a formula.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Files of the repository beside docs/ are named, as code: the site does not have them."""
    folder = Path("docs") / Path(page.file.src_uri).parent

    def said(match: re.Match[str]) -> str:
        path = (ROOT / folder / match[1] / match[2]).resolve().relative_to(ROOT)
        if path.parts[0] == "docs":
            return match[0]
        return f"](#repository '{path} in the repository')"

    text = _OUT_OF_DOCS.sub(said, markdown)
    text = re.sub(r"\[([^\]]+)\]\(#repository '([^']+)'\)", r"\1 (`\2`)", text)
    return re.sub(
        r"\[([^\]]+)\]\((?:\.\./)*(results/[^)#\s]+)\)", r"\1 (`docs/\2` in the repository)", text
    )


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
