"""Where models compute that nobody has placed, and how much memory is free there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def compute_device() -> torch.device:
    """The machine's accelerator where one is there to be used, else the CPU."""
    # A build for an accelerator names it on a machine without one, too.
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return accelerator


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that could still be taken; None where nobody can say.

    On a CPU within the limit of a container, too (cgroup).
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    limits = [n for n in (_available(), _left_in_container()) if n is not None]
    return min(limits, default=None)


def _available() -> int | None:
    """What Linux says that programs can have without swapping; elsewhere all of the memory."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_container() -> int | None:
    folder = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most = (folder / limit).read_text(encoding="ascii").strip()
            now = (folder / used).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return None if most == "max" else max(0, int(most) - int(now))
    return None
