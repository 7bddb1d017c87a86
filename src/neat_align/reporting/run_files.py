"""What a run directory holds, read for the report.

Missing pieces are left out, damaged ones are named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from neat_align.errors import ConfigError
from neat_align.files.atomic import read_json
from neat_align.files.secrets import redacted
from neat_align.reporting.round_rewards import RoundRewards, rewards_of
from neat_align.rounds.completions import CompletionGroup

_FILES = (
    "run.json",
    "metrics.jsonl",
    "result.json",
    "evaluation-before.json",
    "evaluation-after.json",
    "rounds",
)


def number(value: Any) -> float | None:
    """A finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: Any) -> dict[str, Any]:
    """A mapping, empty where something else came."""
    return value if isinstance(value, dict) else {}


def interval_of(ends: Any) -> tuple[float | None, float | None]:
    """The two ends of an interval; (None, None) where either is missing."""
    low, high = map(number, ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return (None, None) if low is None or high is None else (low, high)


@dataclass(frozen=True)
class RoundGroups:
    """A finished round: its folder's name, metrics and groups, and what their rewards say.

    The groups stay in their file (`GroupFile`); a page shows a few of them and says the rest in
    numbers.
    """

    name: str
    metrics: dict[str, float]
    groups: Sequence[CompletionGroup]
    rewards: RoundRewards


@dataclass(frozen=True)
class RunContents:
    """What a run directory holds.

    A file that is not there is an empty mapping; `problems` says what could not be read.
    """

    name: str
    record: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    rounds: list[RoundGroups] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return cast("dict[str, Any]", self.record.get("config") or {})

    @property
    def training_log(self) -> list[dict[str, Any]]:
        """The lines with a loss; of a step that was logged twice (a resumed run) the later one."""
        lines = {
            line.get("step"): line for line in self.log if number(line.get("loss")) is not None
        }
        return sorted(lines.values(), key=lambda line: number(line.get("epoch")) or 0.0)

    def last(self, name: str) -> float | None:
        """The newest number logged under a name."""
        for line in reversed(self.log):
            value = number(line.get(name))
            if value is not None:
                return value
        return None

    def both(self, name: str) -> tuple[float, float] | None:
        """A number of the result before and after training; None unless both are there."""
        before = number(self.result.get(f"{name}_before"))
        after = number(self.result.get(f"{name}_after"))
        return None if before is None or after is None else (before, after)

    def delta(self, name: str) -> float | None:
        """The paired difference, else the difference of the means.

        The two are not the same where some prompts have one number only.
        """
        paired, both = number(self.result.get(f"{name}_delta")), self.both(name)
        if paired is not None:
            return paired
        return None if both is None else both[1] - both[0]

    def interval(self, name: str) -> tuple[float | None, float | None]:
        """The difference's 95 % interval; (None, None) without one."""
        return interval_of(self.result.get(f"{name}_delta_ci95"))

    def single(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        """(name, its before, after, delta, delta_ci95) of each of several rewards (`by_reward`) or
        judges (`by_judge`); empty for a result that does not have them.
        """
        return [(str(name), mapping(v)) for name, v in mapping(self.result.get(kind)).items()]


def read_run(run_dir: Path, *, rounds: bool = True, may_be_empty: bool = False) -> RunContents:
    """Everything the report needs.

    Damaged pieces are left out and named in `problems`. `rounds=False` leaves the rounds out, which
    are most of what there is to read. Raises ConfigError when nothing of a run is there, unless it
    `may_be_empty`.
    """
    if not may_be_empty and not any((run_dir / name).exists() for name in _FILES):
        raise ConfigError(
            f"{run_dir} holds no run (none of {', '.join(_FILES)} is there): give the output_dir "
            "of a training run"
        )
    problems: list[str] = []
    parts = {
        name: _json_object(run_dir / f"{name}.json", problems)
        for name in ("run", "result", "evaluation-before", "evaluation-after")
    }
    return RunContents(
        name=str(parts["result"].get("name") or run_dir.resolve().name),
        record=redacted(parts["run"]),
        log=_log_lines(run_dir / "metrics.jsonl", problems),
        result=parts["result"],
        before=parts["evaluation-before"],
        after=parts["evaluation-after"],
        rounds=_rounds(run_dir / "rounds", problems) if rounds else [],
        problems=problems,
    )


def _json_object(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        problems.append(f"{path.name} could not be read and is left out.")
        return {}
    return value


def _log_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines, damaged = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text) if text.strip() else {}
        except ValueError:  # a run that was killed leaves half a line
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            damaged += 1
    if damaged:
        problems.append(
            f"{damaged} line{'s' if damaged > 1 else ''} of metrics.jsonl could not be read and "
            f"{'are' if damaged > 1 else 'is'} left out."
        )
    return [line for line in lines if line]


def _rounds(folder: Path, problems: list[str]) -> list[RoundGroups]:
    from neat_align.rounds.round_files import read_round

    rounds = []
    for path in sorted(p for p in folder.glob("*") if p.is_dir()):
        try:
            made = read_round(path)
            if made is not None:
                rewards = rewards_of(made.groups)
                rounds.append(RoundGroups(path.name, made.metrics, made.groups, rewards))
        except (ValueError, KeyError, OSError):  # DataError and pyarrow's errors are ValueErrors
            problems.append(f"Round {path.name} does not match its manifest and is left out.")
    return rounds
