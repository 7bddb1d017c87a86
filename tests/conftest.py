"""Every test runs offline, on one thread (more only wait for each other), with shapes and types
checked at run time.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from jaxtyping import install_import_hook

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "neat_align"
# Every file that says shapes. The numeric tower: an int is a float to beartype as it is to mypy.
CHECKED = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.glob("*/*.py")
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
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
