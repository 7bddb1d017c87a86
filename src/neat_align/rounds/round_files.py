"""A finished round on the disk: groups.parquet and, written last, manifest.json.

A round is finished when its manifest is there. The manifest holds the SHA-256 of the groups, so
that a round that was damaged later is not trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neat_align.errors import DataError
from neat_align.files.atomic import free_name, read_json, sha256_of, write_json, write_table
from neat_align.rounds.completions import CompletionGroup, groups_to_table, read_groups

logger = logging.getLogger(__name__)
FORMAT = 1


@dataclass(frozen=True)
class FinishedRound:
    """A finished round: its groups, all of them with a pair, and its metrics.

    `next_position` is where the next round goes on in the stream of prompts (`prompt_order`).
    """

    index: int
    groups: tuple[CompletionGroup, ...]
    metrics: dict[str, float]
    next_position: int


def write_round(
    folder: Path, made: FinishedRound, *, num_prompts: int, reward_names: Sequence[str]
) -> None:
    """Write a round's groups and then its manifest; `num_prompts` were sampled to get them."""
    groups_file = folder / "groups.parquet"
    write_table(groups_file, groups_to_table(made.groups, reward_names))
    manifest = {
        "format": FORMAT,
        "round": made.index,
        "groups": len(made.groups),
        "prompts": num_prompts,
        "next_position": made.next_position,
        "groups_sha256": sha256_of(groups_file),
        "reward_names": reward_names,
        "metrics": made.metrics,
    }
    write_json(folder / "manifest.json", manifest)


def read_round(folder: Path) -> FinishedRound | None:
    """The finished round in a folder, or None when there is none.

    Raises DataError when the groups are not those that the manifest was written for.
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
        facts["round"], tuple(read_groups(groups_file)), facts["metrics"], facts["next_position"]
    )


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


def set_aside_if_damaged(folder: Path) -> None:
    """Set a finished round aside when its groups are not what was written.

    Only for a round that can be made again: the policy must be the one that sampled it.
    """
    try:
        read_round(folder)
    except DataError as error:
        set_aside_round(folder, str(error))
