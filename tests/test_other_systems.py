"""What would stop a run on Windows, on an Apple GPU, or on a file system with fewer abilities."""

from __future__ import annotations

import ast
import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import neat_align
from neat_align.cli.tables import print_closing
from neat_align.files import atomic
from neat_align.files.provenance import peak_rss_bytes
from neat_align.sampling.draw import summed_on

SOURCE = Path(neat_align.__file__).parent
# Modules of the standard library that Windows does not have, and names of `os` and `signal`.
POSIX_MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog")
POSIX_NAMES = {
    "os": {
        "fork",
        "getuid",
        "geteuid",
        "getpgid",
        "killpg",
        "setsid",
        "uname",
        "getloadavg",
        "nice",
    }
    | {
        "sched_getaffinity",
        "mkfifo",
        "chown",
        "O_DIRECTORY",
        "O_NOFOLLOW",
        "O_SYNC",
        "posix_fadvise",
    },
    "signal": {
        "SIGKILL",
        "SIGUSR1",
        "SIGUSR2",
        "SIGHUP",
        "SIGALRM",
        "SIGQUIT",
        "setitimer",
        "alarm",
    },
}


def test_no_module_needs_what_windows_lacks_to_be_imported() -> None:
    needed = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            needed += [f"{path.name}: {n}" for n in names if n.split(".")[0] in POSIX_MODULES]
    assert needed == []


def test_nothing_names_what_windows_lacks() -> None:
    named = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.attr in POSIX_NAMES.get(node.value.id, ())
            ):
                named.append(f"{path.name}:{node.lineno} {node.value.id}.{node.attr}")
    assert named == []


def test_windows_does_not_say_how_much_memory_a_run_took(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = peak_rss_bytes()
    assert here is not None
    assert here > 1 << 20
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_rss_bytes() is None
    monkeypatch.undo()
    result: dict[str, Any] = {
        "stopped_because": None,
        "wall_seconds": 90.0,
        "rounds": 1,
        "steps": 2,
    }
    print_closing_text(result | {"peak_rss_bytes": None})
    assert "1 round, 2 steps, 1.5 minutes\n" in capsys.readouterr().out
    print_closing_text(result | {"peak_rss_bytes": 3 << 29})
    assert "1 round, 2 steps, 1.5 minutes, 1.5 GiB at most\n" in capsys.readouterr().out


def print_closing_text(result: dict[str, Any]) -> None:
    from rich.console import Console

    print_closing(Console(width=100), result, Path("run"))


def test_folders_are_not_synced_where_the_system_opens_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to open a folder, and to sync a file that is open for reading."""
    opened, real = [], os.open

    def like_windows(path: Any, flags: int, *mode: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        opened.append(flags & (os.O_RDWR | os.O_WRONLY))
        return real(path, flags, *mode)

    monkeypatch.setattr(atomic, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(os, "open", like_windows)
    atomic.write_json(tmp_path / "a.json", {"a": 1})
    atomic.write_folder(tmp_path / "b", lambda folder: (folder / "c").write_text("c"))
    atomic.sync_tree(tmp_path)
    monkeypatch.undo()
    assert atomic.read_json(tmp_path / "a.json") == {"a": 1}
    assert (tmp_path / "b" / "c").read_text() == "c"
    assert opened
    assert all(opened)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_no_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    atomic.write_json(tmp_path / "a.json", {"a": 1})
    assert atomic.read_json(tmp_path / "a.json") == {"a": 1}


def test_a_file_or_disk_that_cannot_be_synced_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        atomic.sync(tmp_path)
    with pytest.raises(OSError, match="Input/output"):
        atomic.write_json(tmp_path / "a.json", {})
    assert not (tmp_path / "a.json").exists()


def test_probabilities_are_summed_where_there_is_a_type_that_can() -> None:
    cpu = torch.device("cpu")
    assert summed_on(cpu) == (cpu, torch.float32)
    assert summed_on(torch.device("mps")) == (cpu, torch.float32)
    assert summed_on(torch.device("cuda", 1)) == (torch.device("cuda", 1), torch.float64)


def test_no_other_tensor_has_a_type_that_apple_gpus_lack() -> None:
    """Two functions say where there is one."""
    wide = [
        f"{path.relative_to(SOURCE).as_posix()}: {line.strip()}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if "torch.float64" in line or ".double()" in line or "torch.complex128" in line
    ]
    assert wide == [
        'learning/step_metrics.py: return torch.float32 if device.type == "mps" else torch.float64',
        "sampling/draw.py: return device, torch.float64",
        "sampling/nccl.py: torch.float64: 8,",  # its number in nccl.h
    ]
