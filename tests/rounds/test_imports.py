"""Rounds are made and read without torch: checked in a process of its own, as pytest has it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["make_round", "completions", "exports", "round_files"])
def test_a_round_needs_neither_torch_nor_transformers(module: str) -> None:
    code = (
        f"import sys, neat_align.rounds.{module}; print(sorted({{'torch', 'transformers'}} & "
        "set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
