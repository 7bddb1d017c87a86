"""Where models compute that nobody has placed."""

from __future__ import annotations

import torch


def compute_device() -> torch.device:
    """The machine's accelerator where one is there to be used, else the CPU."""
    # A build for an accelerator names it on a machine without one, too.
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return accelerator
