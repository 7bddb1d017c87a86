"""The house keeps its rules: short files and functions, rooms that list their files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Trainer

import neat_align
from neat_align import NEATTrainer

SOURCE = Path(neat_align.__file__).parent
ROOT = SOURCE.parents[1]
FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = sorted(p.parent for p in SOURCE.glob("*/__init__.py"))
MAX_FILE, MAX_FUNCTION, MAX_TRAINER = 400, 50, 300


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, lines) of every function in a file, methods and inner functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE
    long = {name: n for name, n in functions(path) if n > MAX_FUNCTION}
    assert not long


def test_the_trainer_is_one_thin_subclass_of_trainer() -> None:
    assert NEATTrainer.__bases__ == (Trainer,)
    text = (SOURCE / "trainer" / "neat_trainer.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_TRAINER


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: p.name)
def test_a_room_lists_its_files(room: Path) -> None:
    said = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    missing = [p.name for p in room.glob("*.py") if p.name not in said and p.stem[:2] != "__"]
    assert not missing
    named = set(re.findall(r"^\s*(\w+\.py)\b", said, re.MULTILINE))
    assert named <= {p.name for p in room.glob("*.py")}


def test_contributing_shows_every_room_and_stays_short() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    top = [p.name for p in SOURCE.glob("*.py") if p.stem[:2] != "__"]
    missing = [n for n in (*top, *(f"{room.name}/" for room in ROOMS)) if f"      {n} " not in text]
    assert not missing


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_contract_has_at_most_ten_layers() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r"^layers = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert layers is not None
    lines = layers.group(1).splitlines()
    assert len(lines) <= 10
    named = set(re.findall(r"neat_align\.(\w+)", layers.group(1)))
    assert named == {room.name for room in ROOMS} | {
        p.stem for p in SOURCE.glob("*.py") if p.stem[:2] != "__"
    }


def test_text_files_name_their_encoding() -> None:
    """Where the locale's encoding is not UTF-8 (Windows), a file without one could not be read."""
    unnamed = []
    for path in sorted(SOURCE.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            opens = isinstance(call.func, ast.Name) or isinstance(
                call.args[0] if call.args else ast.Constant("r"), ast.Constant
            )
            if name not in ("read_text", "write_text", "fdopen") and not (name == "open" and opens):
                continue
            words = [a.value for a in call.args if isinstance(a, ast.Constant)]
            is_binary = any(isinstance(w, str) and "b" in w and len(w) <= 3 for w in words)
            says = "utf-8" in words or any(k.arg == "encoding" for k in call.keywords)
            if not is_binary and not says:
                unnamed.append(f"{path.name}:{call.lineno} {name}")
    assert not unnamed
