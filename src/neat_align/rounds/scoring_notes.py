"""What scoring says of completions besides their scores: which could not be scored, and what reward
functions logged.

A batch's notes stand beside its scores in the rollout store, so that an interrupted round has them
all; a finished round has them as `left-out.jsonl` and `reward-extra.jsonl`, a line a completion.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import IO, Any

from neat_align.files.atomic import read_json, write_atomic, write_json
from neat_align.rewards.protocol import ScoredRows
from neat_align.rewards.scoring import added
from neat_align.rounds.completions import CompletionGroup

logger = logging.getLogger(__name__)
LEFT_OUT, EXTRA = "left-out.jsonl", "reward-extra.jsonl"
# Names that a log line has already, whoever wrote it.
_TAKEN = frozenset({"loss", "train_loss", "grad_norm", "learning_rate", "epoch", "step", "round"})


@dataclass(frozen=True)
class ScoringNotes:
    """Notes on some completions, as JSON.

    `left_out` and `extra` have an entry a completion with its `prompt_id`, `origin` and `index`;
    the first adds `reward` and `reason`, the second `values` by column. `metrics` lists the numbers
    that reward functions logged under a name, and `totals` adds up those that are to be.
    """

    left_out: list[dict[str, Any]] = field(default_factory=list)
    extra: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)


def notes_on(groups: Sequence[CompletionGroup], scored: ScoredRows) -> ScoringNotes:
    """The notes of a batch; `scored` has a row a completion of the groups, in order."""
    places = [
        {"prompt_id": group.prompt_id, "origin": c.origin, "index": c.index}
        for group in groups
        for c in group.completions
    ]
    return ScoringNotes(
        left_out=[
            {**places[row.row], "reward": row.reward, "reason": row.reason}
            for row in scored.left_out
        ],
        extra=[
            {**place, "values": {name: column[i] for name, column in scored.extra.items()}}
            for i, place in enumerate(places if scored.extra else ())
        ],
        metrics={name: list(values) for name, values in scored.metrics.items()},
        totals=dict(scored.totals),
    )


def write_notes(work: Path, first: int, notes: ScoringNotes) -> None:
    """Keep a batch's notes beside its scores, which are written after them."""
    path = work / f"scored-{first:06d}.json"
    if notes == ScoringNotes():
        path.unlink(missing_ok=True)  # of an attempt that was cut off before its scores
    else:
        write_json(path, asdict(notes))


def stored_notes(work: Path) -> Iterator[ScoringNotes]:
    """The notes of a round's stores, batch by batch.

    Those without scores are of an attempt that was cut off.
    """
    for path in sorted(work.glob("*/scored-*.json")):
        if path.with_suffix(".parquet").is_file():
            try:
                yield ScoringNotes(**read_json(path))
            except (OSError, ValueError, TypeError) as error:
                logger.warning("%s is damaged: what scoring noted there is lost (%s)", path, error)


def write_lists(folder: Path, metrics: Mapping[str, float]) -> dict[str, float]:
    """Write the lists that have entries into a round's folder, a batch at a time in memory.

    Gives the metrics, with how many completions could not be scored (if any), and logged means and
    totals.
    """
    unscorable, logged, totals = 0, dict[str, list[float]](), list[dict[str, float]]()
    for notes in stored_notes(folder / "work"):
        unscorable += count_left_out(notes.left_out)
        for name, values in notes.metrics.items():
            logged.setdefault(name, []).extend(values)
        totals.append(notes.totals)
    left_out = (line for notes in stored_notes(folder / "work") for line in notes.left_out)
    extra = (line for notes in stored_notes(folder / "work") for line in notes.extra)
    for name, lines in ((LEFT_OUT, left_out), (EXTRA, extra)):
        first = next(lines, None)
        if first is not None:
            write_atomic(folder / name, partial(_write_lines, chain([first], lines)))
    counted = dict(metrics)
    if unscorable:
        counted["removed/unscorable"] = float(unscorable)
    counted |= logged_means(logged, counted)
    return counted | logged_means({k: [v] for k, v in added(totals).items()}, counted)


def _write_lines(lines: Iterable[dict[str, Any]], file: IO[bytes]) -> None:
    for line in lines:
        file.write(json.dumps(line).encode("ascii") + b"\n")


def count_left_out(left_out: Iterable[Mapping[str, Any]]) -> int:
    """How many completions these lines are about."""
    return len({(line["prompt_id"], line["origin"], line["index"]) for line in left_out})


def logged_means(
    logged: Mapping[str, Sequence[float]], taken: Iterable[str] = ()
) -> dict[str, float]:
    """Means of what reward functions logged; a name that is `taken` becomes `logged/<name>`."""
    others = {*taken, *_TAKEN}
    return {
        f"logged/{name}" if name in others else name: fmean(values)
        for name, values in logged.items()
    }
