"""Which code, versions and machine made a number."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "neat-align",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "pyarrow",
    "numpy",
)


def versions() -> dict[str, str]:
    """Versions of Python, the machine and the packages that decide the numbers."""
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source checkout that this package runs from ("-dirty" when changed);

    None outside of one.
    """
    git = shutil.which("git")
    here = Path(__file__).resolve()
    if git is None or not (here.parents[3] / ".git").exists():
        return None
    described = subprocess.run(  # noqa: S603
        [
            git,
            "-C",
            str(here.parents[3]),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
            "--exclude=*",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None


def cpu_name() -> str:
    """What the system calls its processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if "model name" in line),
        platform.processor(),
    )
