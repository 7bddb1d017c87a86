"""Every test runs offline, on one thread (more only wait for each other), with shapes and types
checked at run time.
"""

from __future__ import annotations

import gc
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from jaxtyping import install_import_hook

# The numeric tower: an int is a float to beartype as it is to mypy (`beta: 2` in a YAML file).
# config and script_arguments are left out: argparse fills their inherited fields with values that
# transformers annotates otherwise. So is cli: typer passes a context that is not of the class which
# it names `typer.Context`.
PACKAGE = Path(__file__).resolve().parent.parent / "src" / "neat_align"
LEFT_OUT = {"cli", "config", "script_arguments"}
CHECKED = [
    f"neat_align.{m.name}" for m in pkgutil.iter_modules([str(PACKAGE)]) if m.name not in LEFT_OUT
]
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Take what is imported by now out of the garbage collector's sight.

    Every `train()` ends in a full collection, which would go through all of torch and transformers
    each time: a third of the time of a tiny run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def all_cores() -> Iterator[None]:
    """For a test of the real model, which runs alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)
