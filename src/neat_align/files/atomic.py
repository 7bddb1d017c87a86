"""Files that are complete or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

CHECKSUM_BLOCK = (
    256 << 20
)  # bytes; written into checkpoints, so that another value reads no old one
CHECKSUM_THREADS = 8
# What fsync of a folder answers where there is no such thing (CIFS, some FUSE file systems).
_CANNOT_SYNC_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Give `write` a binary file, sync it and rename it to `path`.

    On any failure `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a folder's entries durable (a rename is not, before this), or a file's bytes.

    Windows opens no folders and writes renames through by itself; some network file systems open
    them and cannot sync them.
    """
    is_folder = path.is_dir()
    on_windows = sys.platform == "win32"
    if is_folder and on_windows:
        return
    # Windows syncs only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in _CANNOT_SYNC_FOLDERS):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder, its name, and everything below it durable: contents before names."""
    paths = sorted(folder.rglob("*"), key=lambda p: -len(p.parts))
    files = [path for path in paths if path.is_file()]
    folders = [path for path in paths if path.is_dir()]
    for path in (*files, *folders, folder, folder.parent):
        sync(path)


def write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Give `write` an empty folder, sync it and rename it to `path`.

    A folder that was there is replaced only after that.
    """
    temporary, old = (path.with_name(f".{path.name}-{word}") for word in ("new", "old"))
    for left_over in (temporary, old):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        sync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():  # a folder cannot be renamed over a full one
        path.replace(old)
    temporary.replace(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def free_name(path: Path, suffix: str) -> Path:
    """The path with a suffix, and a number where that is taken, too."""
    aside, n = path.with_name(path.name + suffix), 1
    while aside.exists():
        n += 1
        aside = path.with_name(f"{path.name}{suffix}-{n}")
    return aside


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically.

    Raises ValueError for NaN and infinities: they are not JSON.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    write_atomic(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


def size_of(path: Path) -> int:
    """Bytes in a file, synced; 0 when there is none."""
    if not path.is_file():
        return 0
    sync(path)
    return path.stat().st_size


def cut_to(path: Path, size: int) -> int:
    """Cut a file back to `size` bytes, synced; gives the number of bytes that went."""
    extra = max(0, size_of(path) - size)
    if extra:
        os.truncate(path, size)
        sync(path)
    return extra


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow table as Parquet, atomically."""
    import pyarrow.parquet as pq

    write_atomic(
        path, lambda file: pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    )


def checksums_of(path: Path, block: int = CHECKSUM_BLOCK) -> list[str]:
    """CRC-32 of each block of a file, in hex; several blocks are read at the same time."""
    starts = range(0, path.stat().st_size, block)
    if len(starts) <= 1:  # no thread for small files
        return [_crc32(path, start, block) for start in starts]
    with ThreadPoolExecutor(min(len(starts), CHECKSUM_THREADS)) as threads:
        return list(threads.map(lambda start: _crc32(path, start, block), starts))


def _crc32(path: Path, start: int, size: int) -> str:
    checksum = 0
    with path.open("rb") as file:
        file.seek(start)
        while size and (part := file.read(min(size, 1 << 20))):
            checksum = zlib.crc32(part, checksum)
            size -= len(part)
    return f"{checksum:08x}"


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
