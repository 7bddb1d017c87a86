"""Slices of a round that other processes make: a shard is a slice's groups, complete or absent.

    work/000512/unrewarded.parquet  the shard's groups without rewards, once the policy is done
                finished.parquet    the shard's groups, sampled, filtered and scored
                *.json              written after each: the shard's key, the file's SHA-256, and how
                                    many completions were filtered

beside what the rollout store keeps of it while it is made. A shard's key is a hash of everything
that decides its groups (rows, parameters, instructions, rewards, the run's model and options), so
the same work has the same key whoever does it; a shard that is finished under its key is not made
again. All processes see one folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from neat_align.errors import one_line
from neat_align.files.atomic import read_json, sha256_of, write_atomic, write_json
from neat_align.prompts.rows import PromptRow
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.group_file import GroupFile, write_groups
from neat_align.rounds.params import RoundProgress

logger = logging.getLogger(__name__)
# How far a shard is.
ShardStage: TypeAlias = Literal["unrewarded", "finished"]


@dataclass(frozen=True)
class Slice:
    """Prompts of a round that are sampled and scored together.

    What is finished of it is kept in `folder`. `plan` is JSON: what decides its samples and scores.
    `measured` are the ids of the prompts whose current log-probabilities are wanted.
    """

    rows: tuple[PromptRow, ...]
    folder: Path
    plan: Mapping[str, Any]
    measured: frozenset[str]


@dataclass(frozen=True)
class RolledOut:
    """A slice's groups, one a prompt, scored; `removed` counts filtered completions by reason."""

    groups: Sequence[CompletionGroup]
    removed: Counter[str]


# Makes slices of a round, and gives them in order; tells how far it is.
SliceMaker: TypeAlias = Callable[[Iterable[Slice], RoundProgress], Iterator[RolledOut]]


def shard_key(part: Slice, made_by: Mapping[str, Any]) -> str:
    """The SHA-256 of what decides a slice's groups; `made_by` is JSON: the run's model and options.

    Where the slice is kept, and who makes it, has no part in it.
    """
    content = [part.plan, sorted(part.measured), made_by]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def write_shard(
    folder: Path, stage: ShardStage, key: str, made: RolledOut, reward_names: Sequence[str] = ()
) -> None:
    """Write a shard's groups, then the mark without which they do not count."""
    file, mark = folder / f"{stage}.parquet", folder / f"{stage}.json"
    mark.unlink(missing_ok=True)  # of groups that are written over now
    write_atomic(file, lambda opened: write_groups(opened, made.groups, reward_names))
    write_json(mark, {"key": key, "sha256": sha256_of(file), "removed": dict(made.removed)})


def read_shard(folder: Path, stage: ShardStage, key: str) -> RolledOut | None:
    """A shard's groups at this stage; None where there are none under this key, or damaged ones.

    The groups stay in their file until they are asked for.
    """
    file, mark = folder / f"{stage}.parquet", folder / f"{stage}.json"
    try:
        facts = read_json(mark)
        if facts["key"] != key:
            return None
        if sha256_of(file) != facts["sha256"]:
            raise ValueError("the groups are not those that were written")
        return RolledOut(GroupFile(file), Counter(facts["removed"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s is damaged and is made again (%s)", file, one_line(error, 200))
        return None
