"""Drift around every round, against the start that a resumed run reads from the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from neat_align.config import NEATConfig
from neat_align.evaluation.drift_limits import drift_ratios, limit_passed, measure_drift
from neat_align.evaluation.held_out import EvalTools
from neat_align.files.atomic import read_json, write_json
from neat_align.prompts.rows import PromptRow

Facts = dict[str, float]


@dataclass(frozen=True)
class DriftMeasurement:
    """A measurement, the start's, and why training should stop (None: it should not)."""

    facts: Facts
    start: Facts
    stop_because: str | None


@dataclass(frozen=True)
class DriftMonitor:
    """Measures entropy, variety, length and KL on plain samples of a fixed set of prompts.

    `with_tools` calls a function with who samples and scores now, and gives its result: on every
    process of a run, the one result. `start_file` keeps the start's numbers.
    """

    args: NEATConfig
    rows: Sequence[PromptRow]
    with_tools: Callable[[Callable[[EvalTools], Facts]], Facts]
    start_file: Path

    def measure_start(self, *, write: bool) -> Facts | None:
        """The start's numbers, read where they were measured before; None when drift is off."""
        if not self.args.drift_prompts:
            return None
        if self.start_file.is_file():
            return dict(read_json(self.start_file))
        facts = self._measure()
        if write:
            write_json(self.start_file, facts)
        return facts

    def measure(self) -> DriftMeasurement | None:
        """The numbers now, against the start and against the limits; None when drift is off."""
        if not self.args.drift_prompts:
            return None
        facts, start = self._measure(), read_json(self.start_file)
        facts |= drift_ratios(facts, start)
        stop_because = limit_passed(
            facts, max_kl=self.args.max_kl, min_distinct2_ratio=self.args.min_distinct2_ratio
        )
        return DriftMeasurement(facts, start, stop_because)

    def _measure(self) -> Facts:
        seed, prompts = self.args.seed, self.args.drift_prompts
        return self.with_tools(lambda t: measure_drift(self.rows, t, seed=seed, prompts=prompts))
