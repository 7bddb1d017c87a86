"""The notebook of the documentation runs, cell by cell, as a reader would run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "first-run.ipynb"


def cells(kind: str) -> list[str]:
    read = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in read["cells"] if cell["cell_type"] == kind]


def test_it_holds_no_output() -> None:
    read = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert [c["outputs"] for c in read["cells"] if c["cell_type"] == "code"] == [[]] * len(
        cells("code")
    )


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_every_cell_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf", reason="the demo's model is not installed")
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells("code")):
        exec(compile(source, f"cell {number}", "exec"), names)
    said = capsys.readouterr().out
    assert "round 1" in said
    assert "(negative: folded away)" in said
    assert "pairs; [" in said
    assert "README.md" in said
    assert "adapter_model.safetensors" in said
