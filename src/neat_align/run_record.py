"""run.json: what was run, on what, with which versions. Secrets are masked."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from neat_align.config import NEATConfig
from neat_align.data import PromptRow
from neat_align.storage import redacted, write_json

_PACKAGES = ("neat-align", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "pyarrow", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python, the machine and the packages that decide the numbers."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source checkout that this package runs from ("-dirty" when changed); None outside of one."""
    git = shutil.which("git")
    here = Path(__file__).resolve()
    if git is None or not (here.parents[2] / ".git").exists():
        return None
    described = subprocess.run(  # noqa: S603
        [git, "-C", str(here.parents[2]), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None


def cpu_name() -> str:
    """What the system calls its processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())


def fingerprint(rows: Sequence[PromptRow]) -> str:
    """SHA-256 over the rows' ids, prompts and answers, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.id, row.prompt, row.chosen, row.rejected]).encode("ascii"))
    return digest.hexdigest()


def write_run_record(output_dir: Path, args: NEATConfig, rows: Sequence[PromptRow], reward_names: Sequence[str]) -> None:
    """Write run.json into the run directory."""
    record: dict[str, Any] = {
        "config": redacted(cast("Any", args).to_dict()),
        "versions": versions(),
        "seed": args.seed,
        "data": {"rows": len(rows), "sha256": fingerprint(rows)},
        "rewards": list(reward_names),
    }
    write_json(output_dir / "run.json", record)
