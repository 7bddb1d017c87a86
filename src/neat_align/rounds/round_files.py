"""A finished round on the disk: groups.parquet and, written last, manifest.json.

A round is finished when its manifest is there. The manifest holds the SHA-256 of the groups, so
that a round that was damaged later is not trained on.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from neat_align.errors import DataError
from neat_align.files.atomic import free_name, read_json, sha256_of, sync, write_json
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.group_file import GroupFile, write_groups

logger = logging.getLogger(__name__)
FORMAT = 1


@dataclass(frozen=True)
class FinishedRound:
    """A finished round: its groups, each with something to learn from, and its metrics.

    The groups of a round on the disk are a `GroupFile`: they are read when they are asked for.
    `next_position` is where the next round goes on in the stream of prompts (`prompt_order`).
    """

    index: int
    groups: Sequence[CompletionGroup]
    metrics: dict[str, float]
    next_position: int


@dataclass(frozen=True)
class WrittenGroups:
    """A round's groups in their file: how many, and the SHA-256 of the file as it was written."""

    file: Path
    count: int
    sha256: str


def write_round_groups(
    folder: Path, groups: Iterable[CompletionGroup], reward_names: Sequence[str]
) -> WrittenGroups:
    """Write a round's groups as they come: `ROW_GROUP` of them in memory at a time.

    Where `groups` raises, the round has no file of groups yet. What was written until then lies in
    its `work` folder and is written over by the next try.
    """
    path, part = folder / "groups.parquet", folder / "work" / "groups.parquet.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as file:
        hashed = _Hashed(file)
        count = write_groups(hashed, groups, reward_names)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(folder)
    return WrittenGroups(path, count, hashed.digest.hexdigest())


class _Hashed(io.RawIOBase):
    """Writes into a file and takes its SHA-256 on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()


def write_manifest(
    folder: Path,
    index: int,
    groups: WrittenGroups,
    metrics: dict[str, float],
    *,
    next_position: int,
    num_prompts: int,
    reward_names: Sequence[str],
) -> FinishedRound:
    """Write a round's manifest, which makes it finished; `num_prompts` were sampled for it."""
    manifest = {
        "format": FORMAT,
        "round": index,
        "groups": groups.count,
        "prompts": num_prompts,
        "next_position": next_position,
        "groups_sha256": groups.sha256,
        "reward_names": reward_names,
        "metrics": metrics,
    }
    write_json(folder / "manifest.json", manifest)
    _remove_unfinished(folder)
    return FinishedRound(index, GroupFile(groups.file), metrics, next_position)


def read_round(folder: Path) -> FinishedRound | None:
    """The finished round in a folder, or None when there is none.

    The file of groups is read through once, for its SHA-256; the groups stay in it. Raises
    DataError when they are not those that the manifest was written for.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return None
    facts = read_json(manifest)
    groups_file = folder / "groups.parquet"
    if not groups_file.is_file() or sha256_of(groups_file) != facts["groups_sha256"]:
        raise DataError(
            f"{groups_file} does not match {manifest}: delete the folder {folder} and the round "
            "is made again"
        )
    return FinishedRound(
        facts["round"], GroupFile(groups_file), facts["metrics"], facts["next_position"]
    )


def finished_round(folder: Path) -> FinishedRound | None:
    """`read_round` for the process that makes rounds: without what a kill has left beside it."""
    made = read_round(folder)
    if made is not None:
        _remove_unfinished(folder)
    return made


def _remove_unfinished(folder: Path) -> None:
    """Remove a finished round's unfinished work, and files that a kill left half written."""
    shutil.rmtree(folder / "work", ignore_errors=True)
    for path in folder.glob(".*-*"):  # `write_atomic`'s temporary names
        path.unlink(missing_ok=True)


def next_position(folder: Path) -> int | None:
    """Where the prompts of the next round begin; None when the folder holds no finished round."""
    manifest = folder / "manifest.json"
    return int(read_json(manifest)["next_position"]) if manifest.is_file() else None


def set_aside_round(folder: Path, why: str) -> None:
    """Rename a round that is not to be read, with a warning."""
    aside = free_name(folder, ".incomplete")
    if (folder / "manifest.json").is_file():  # nobody is to take it for a finished round
        (folder / "manifest.json").replace(folder / "manifest.old.json")
    folder.replace(aside)
    logger.warning("%s is now %s and is made again: %s", folder, aside.name, why)


def read_or_set_aside(folder: Path) -> FinishedRound | None:
    """The finished round in a folder; None, and set aside, when its groups are not as written.

    Only for a round that can be made again: the policy must be the one that sampled it.
    """
    try:
        return finished_round(folder)
    except DataError as error:
        set_aside_round(folder, str(error))
        return None
