"""Files as bytes, unpacked on the way where their name says how: .gz, .bz2, .xz, .zst, .lz4."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from neat_align.errors import DataError, one_line

_BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError)


def _by_arrow(codec: str) -> Callable[[Path], IO[bytes]]:
    def opened(path: Path) -> IO[bytes]:
        import pyarrow as pa

        raw: Any = pa.CompressedInputStream(pa.OSFile(str(path)), codec)
        return cast("IO[bytes]", io.BufferedReader(raw))

    return opened


# By the ending of the file's name; the modules' own classes, since their `open` may give text.
_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _by_arrow("zstd"),
    ".lz4": _by_arrow("lz4"),
}
COMPRESSED = tuple(_OPENERS)


def inner_suffix(path: Path) -> str:
    """The ending of a file's name that says what is in it: `.jsonl` of `a.jsonl.gz`."""
    name = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return name.suffix.lower()


def is_compressed(path: Path) -> bool:
    """Whether the file's name says that it is compressed."""
    return path.suffix.lower() in _OPENERS


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes. DataError for a compressed file that is broken or cut short."""
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        with path.open("rb") as file:
            yield file
        return
    try:
        with opener(path) as file:
            yield file
    except _BROKEN as error:
        raise DataError(
            f"{path}: cannot be unpacked ({one_line(error, 200) or 'it is cut short'}): it is "
            "broken or cut short, or its name ends wrongly; get the file again"
        ) from None
