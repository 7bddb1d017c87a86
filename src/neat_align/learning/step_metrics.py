"""Training metrics between two log lines: numerators and denominators, added up step by step.

They stay on the device, and on their rank, until a log line asks for them: one number read back for
every metric of every micro-batch would make the CPU wait for the device as often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# name -> [numerator, denominator]
Sums = dict[str, list[float]]


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type in which many numbers are added up: fp64, or fp32 on Apple's GPUs (no fp64)."""
    return torch.float32 if device.type == "mps" else torch.float64


class StepMetrics:
    """Sums of training metrics since the last log line, of one rank.

    A value added with weight 0 is a share of one step's loss: shares add up and are divided by the
    steps. Every other metric is divided by the sum of its weights, and left out while that is 0.

    Args:
        names: every metric, in the order of the log. All ranks have the same, whatever each of them
            has seen, so that their sums can be added.
        needs: metric -> metric without which it is left out, too.
        device: where the values are.
    """

    def __init__(
        self, names: Sequence[str], device: torch.device, *, needs: Mapping[str, str] | None = None
    ) -> None:
        self.names = tuple(names)
        self.needs = dict(needs or {})
        self.device = device
        self.steps = 0
        self._sums = self._zeros()

    def begin_step(self) -> None:
        """An optimizer step begins."""
        self.steps += 1

    def add(self, values: Float[Tensor, "metrics 2"]) -> None:
        """Add to every metric's numerator and denominator."""
        self._sums = self._sums + values

    @property
    def sums(self) -> Sums:
        """The sums as numbers, for a checkpoint. Reads them from the device."""
        return dict(zip(self.names, self._sums.tolist(), strict=True))

    def copy(self) -> Float[Tensor, "metrics 2"]:
        """The sums now, for `restore`."""
        return self._sums

    def restore(self, sums: Float[Tensor, "metrics 2"]) -> None:
        """Go back to earlier sums of the same step."""
        self._sums = sums

    def go_on(self, sums: Mapping[str, Sequence[float]], steps: int) -> None:
        """Go on from a checkpoint that was written `steps` optimizer steps after a log line."""
        rows = [list(sums.get(name, (0.0, 0.0))) for name in self.names]
        self._sums = torch.tensor(rows, dtype=self._sums.dtype, device=self.device)
        self.steps = steps

    def take(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The metrics of all ranks' optimizer steps since the last call; counting begins anew.

        `over_ranks` adds a tensor up over the ranks: call this on all of them. Nothing is asked of
        the others where no step was made.
        """
        if self.steps == 0:
            return {}
        sums = dict(zip(self.names, over_ranks(self._sums).tolist(), strict=True))
        metrics = {}
        for name, (value, weight) in sums.items():
            if weight == 0 and name.startswith("loss/"):
                metrics[name] = value / self.steps
            elif weight > 0 and sums[self.needs.get(name, name)][1] > 0:
                metrics[name] = value / weight
        self._sums, self.steps = self._zeros(), 0
        return metrics

    def _zeros(self) -> Float[Tensor, "metrics 2"]:
        return torch.zeros(len(self.names), 2, dtype=sum_dtype(self.device), device=self.device)
