"""Every verb explains itself, and asking for help costs no heavy import."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import typer

from neat_align.cli import app, main

VERBS = sorted(typer.main.get_group(app).commands)


def test_the_verbs_are_these() -> None:
    assert VERBS == [
        "capability",
        "compare",
        "demo",
        "evaluate",
        "expand",
        "inspect",
        "merge",
        "probe",
        "push",
        "report",
        "train",
    ]


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from neat_align.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as stopped:\n"
        "    assert stopped.code == 0, stopped.code\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert "Commands" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"neat-align {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_no_name_of_an_option_is_cut_within_80_columns(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert not re.findall(r"-\S*…", shown)
    assert max(map(len, shown.splitlines())) <= 80 or verb == "train"  # which has addresses in it
