"""What this package uses of Trainer's private names is there, by name, in this transformers."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

import neat_align
from neat_align.runs import trainer_internals
from neat_align.runs.trainer_internals import ATTRIBUTES, METHODS

SOURCE = Path(neat_align.__file__).parent
HERE = "runs/trainer_internals.py"


def assigned_attributes(cls: type) -> set[str]:
    """Names that methods of a class assign to `self`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    stored = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    return {n.attr for n in stored if isinstance(n.ctx, ast.Store)}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_trainer_still_keeps(name: str) -> None:
    assert name in assigned_attributes(Trainer), f"transformers.Trainer no longer keeps {name}"


@pytest.mark.parametrize("name", METHODS)
def test_trainer_still_has(name: str) -> None:
    method: Any = getattr(Trainer, name, None)
    assert method is not None, f"transformers.Trainer no longer has {name}"
    parameters = tuple(inspect.signature(method).parameters)
    assert parameters == METHODS[name], f"transformers.Trainer.{name} takes {parameters} now"
    # It is called where a checkpoint is written; a method that nobody calls would be no seam.
    assert f"self.{name}(" in inspect.getsource(Trainer)


def test_private_names_of_trainer_stand_in_one_file() -> None:
    own = {n for n in vars(Trainer) if n.startswith("_") and not n.startswith("__")}
    private = own | {n for n in assigned_attributes(Trainer) if n.startswith("_")}
    used: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            of_trainer = isinstance(node, ast.Attribute) and node.attr in private
            if of_trainer and isinstance(node.value, ast.Name) and node.value.id != "cls":
                holder = node.value.id
                if holder in ("self", "trainer", "t", "Trainer"):
                    used.setdefault(name, set()).add(node.attr)
    assert used.pop(HERE) == set(ATTRIBUTES)
    # The override of a method that is named there is called once more by its own class.
    assert used == {"trainer/neat_trainer.py": {"_save_checkpoint"}}
    assert trainer_internals.__doc__ is not None
