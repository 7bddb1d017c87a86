"""`neat-align doctor`: what a run will find on this machine, one line each."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neat_align.cli.help_page import width as page_width
from neat_align.cli.option_names import flags

if TYPE_CHECKING:
    from neat_align.cli.doctor_checks import Finding

_COLOURS = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}
_HANG = " " * 17


def doctor(
    output_dir: Annotated[
        Path, typer.Option(*flags("output_dir"), help="Where runs would go.")
    ] = Path("runs"),
    vllm_server: Annotated[
        str | None, typer.Option("--vllm_server", help="URL of a vLLM server to ask, without /v1.")
    ] = None,
    allow_http_hosts: Annotated[
        list[str] | None,
        typer.Option("--allow_http_hosts", help="Private host that may be asked over http."),
    ] = None,
) -> None:
    """Check versions, devices, disk, hub and extras; exit code 1 where something fails.

    The hub is asked whether it answers, unless HF_HUB_OFFLINE is set, and so is the vLLM server
    that is named. Nothing else leaves the machine.
    """
    from neat_align.cli.doctor_checks import examine

    width = page_width()
    failed = False
    for finding in examine(output_dir, vllm_server, tuple(allow_http_hosts or ())):
        failed |= finding.word == "fail"
        typer.echo(_shown(finding, width))
    if failed:
        sys.exit(1)


def _shown(finding: Finding, width: int) -> str:
    """A finding as a line; one that is longer goes on under its text."""
    lines = textwrap.wrap(
        finding.text,
        max(20, width - len(_HANG)),
        break_on_hyphens=False,
        break_long_words=False,
    )
    word = typer.style(f"{finding.word:<5}", fg=_COLOURS[finding.word], bold=finding.word != "ok")
    return f"\n{_HANG}".join([f"{finding.name:<12}{word}{lines[0]}", *lines[1:]])
