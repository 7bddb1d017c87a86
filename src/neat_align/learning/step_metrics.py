"""Training metrics between two log lines: numerators and denominators, added up step by step."""

from __future__ import annotations

from collections.abc import Mapping

# name -> [numerator, denominator]
Sums = dict[str, list[float]]


class StepMetrics:
    """Sums of training metrics since the last log line.

    A value added with weight 0 is a share of one step's loss: shares add up and are divided by the
    steps. Every other metric is divided by the sum of its weights.
    """

    def __init__(self) -> None:
        self.sums: Sums = {}
        self.steps = 0

    def begin_step(self) -> None:
        """An optimizer step begins."""
        self.steps += 1

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add to a metric's numerator and denominator."""
        entry = self.sums.setdefault(name, [0.0, 0.0])
        entry[0] += value
        entry[1] += weight

    def copy(self) -> Sums:
        """The sums now, for `restore`."""
        return {name: list(entry) for name, entry in self.sums.items()}

    def restore(self, sums: Mapping[str, list[float]]) -> None:
        """Go back to earlier sums of the same step."""
        self.sums = {name: list(entry) for name, entry in sums.items()}

    def go_on(self, sums: Mapping[str, list[float]], steps: int) -> None:
        """Go on from a checkpoint that was written `steps` optimizer steps after a log line."""
        self.restore(sums)
        self.steps = steps

    def take(self) -> dict[str, float]:
        """The metrics of the optimizer steps since the last call; counting begins anew."""
        metrics, steps = {}, max(1, self.steps)
        for name, (value, weight) in self.sums.items():
            if weight == 0 and name.startswith("loss/"):
                metrics[name] = value / steps
            elif weight > 0:
                metrics[name] = value / weight
        self.sums, self.steps = {}, 0
        return metrics
