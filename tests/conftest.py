"""Every test runs offline, on two threads, with shapes and types of the whole package checked at run time."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from jaxtyping import install_import_hook

# The numeric tower: an int is a float to beartype as it is to mypy (`beta: 2` in a YAML file).
install_import_hook("neat_align", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
torch.set_num_threads(1)
