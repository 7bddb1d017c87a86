"""Scripts that run in several processes: `launch(script, folder, *arguments, processes=2)`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ports import free_port

HERE = Path(__file__).resolve().parent
# Seconds after which processes that wait for each other for ever are ended.
LIMIT = 200


def launch(script: str, folder: Path, *arguments: str, processes: int = 2) -> str:
    """Run `script FOLDER ARGUMENTS…` with torchrun, or alone; what it said on stderr.

    Fails when a process failed, or when they were not done in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = launched(script, folder, *arguments, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def launched(
    script: str, folder: Path, *arguments: str, processes: int, limit: int = LIMIT
) -> subprocess.CompletedProcess[str]:
    """The same, however it ends. Raises TimeoutExpired after `limit` seconds."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes))
    launcher = (*torchrun, "--master-port", str(free_port())) if processes > 1 else ()
    return subprocess.run(
        [sys.executable, *launcher, str(HERE / script), str(folder), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=limit,
        check=False,
    )
