"""Where an export's groups come from: a run, one of its rounds, an expansion, or a file of groups.

An expansion's own data set has not all that other formats need; its groups lie beside it, in the
folder that `expand` keeps (`OUTPUT-run`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neat_align.errors import ConfigError, DataError
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.group_file import GroupFile, without_tokens


@dataclass(frozen=True)
class GroupSource:
    """Groups and what is known of them: the run's folder, if any, and (name, groups) a round."""

    run: Path | None
    rounds: tuple[tuple[str, Sequence[CompletionGroup]], ...]

    def groups(self) -> Iterator[CompletionGroup]:
        """All groups in order, without their tokens; a few in memory at a time.

        A terminal shows how far it is, once it takes more than a moment.
        """
        from tqdm import tqdm

        total = sum(len(groups) for _, groups in self.rounds)
        with tqdm(total=total, unit="group", leave=False, disable=None, delay=2) as bar:
            for _, groups in self.rounds:
                for group in without_tokens(groups, texts=True):
                    yield group
                    bar.update()

    @property
    def reward_names(self) -> list[str]:
        """Names of the reward functions, as the first file says."""
        first = self.rounds[0][1]
        return first.reward_names if isinstance(first, GroupFile) else []

    def settings(self) -> dict[str, Any]:
        """The options that the groups were made with; empty where the folder does not say."""
        from neat_align.reporting.data_card import data_origin

        return data_origin(self.run, [], []).config


def find_groups(path: Path, wanted: str | None = None) -> GroupSource:
    """The groups at a path; of a run only the `wanted` rounds ("0,2-3", as their folders count).

    Raises ConfigError or DataError where there are none.
    """
    from neat_align.reporting.terminal import load_any

    source = _with_groups(path)
    rounds = load_any(source)
    if wanted is not None:
        rounds = _only(rounds, wanted, source)
    if not any(len(groups) for _, groups in rounds):
        raise DataError(f"{source} holds no group: nothing can be exported from it")
    return GroupSource(_run_of(source), tuple(rounds))


def _with_groups(path: Path) -> Path:
    """The path itself, or the folder beside an expansion's data set."""
    if not path.is_file() or _is_group_file(path):
        return path
    folder = path.with_name(f"{path.stem}-run")
    if (folder / "rounds").is_dir():
        return folder
    raise DataError(
        f"{path} is not a file of groups, and the groups of an expansion are not beside it "
        f"({folder} is not there): give a run's output_dir, the OUTPUT-run folder that expand "
        "keeps, or a file of `neat-align expand --format groups`"
    )


def _is_group_file(path: Path) -> bool:
    try:
        GroupFile(path)
    except (DataError, ValueError):  # other columns, or no Parquet
        return False
    return True


def _run_of(source: Path) -> Path | None:
    """The folder of the run that these groups are of."""
    folder = source.parent if source.is_file() else source
    folder = folder.absolute()
    if (folder / "rounds").is_dir():
        return folder
    at = folder if folder.name == "rounds" else folder.parent
    return at.parent if at.name == "rounds" else None


def _only(
    rounds: list[tuple[str, Sequence[CompletionGroup]]], wanted: str, source: Path
) -> list[tuple[str, Sequence[CompletionGroup]]]:
    numbers = {int(name): name for name, _ in rounds if name.isdigit()}
    chosen = {numbers.get(n) for n in _numbers(wanted)}
    if not numbers or None in chosen:
        there = ", ".join(map(str, sorted(numbers))) or "no numbered round"
        raise ConfigError(f"rounds is {wanted!r} and {source} holds {there}")
    return [(name, groups) for name, groups in rounds if name in chosen]


def _numbers(wanted: str) -> list[int]:
    found: list[int] = []
    for part in wanted.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"rounds is {wanted!r}; write numbers and ranges, such as 0,2-3")
        if dash and int(last) < int(first):
            raise ConfigError(f"rounds is {wanted!r}, and {part.strip()} goes down")
        if dash and int(last) - int(first) > 100_000:
            raise ConfigError(f"rounds is {wanted!r}: {part.strip()} is more rounds than any run's")
        found += range(int(first), int(last or first) + 1)
    return found
