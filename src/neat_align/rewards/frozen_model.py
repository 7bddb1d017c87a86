"""The models that shipped judges read their features from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from neat_align.modeling.device import compute_device


def frozen_model(source: str, options: Mapping[str, Any]) -> Any:
    """A transformers model without a head, in fp32, frozen, on the accelerator where there is one.

    `options` are those of `from_pretrained` that the model needs. transformers does not warn of
    parts of the checkpoint that they leave out. Raises OSError where nothing can be loaded.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        model: Any = AutoModel.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, **options
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    return model.to(compute_device()).eval().requires_grad_(False)
