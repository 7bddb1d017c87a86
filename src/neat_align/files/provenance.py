"""Which code, versions and machine made a number."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
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
    known = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
    }
    for name in _PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


def commit() -> str | None:
    """The commit of the source checkout that this package runs from; None outside of one.

    It ends in "-dirty" when files were changed.
    """
    git = shutil.which("git")
    checkout = Path(__file__).resolve().parents[3]
    if git is None or not (checkout / ".git").exists():
        return None
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    described = subprocess.run(  # noqa: S603
        [git, "-C", str(checkout), *describe], capture_output=True, text=True, check=False
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


def peak_rss_bytes() -> int | None:
    """The most memory that this process has held; None on Windows, which has no `resource`."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
