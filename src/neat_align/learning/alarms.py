"""Warnings that a run is collapsing while its loss improves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


@dataclass
class Alarms:
    """Warnings that a run is collapsing, each kind said once a round.

    `logp_drop` is in nats per token under the first step of the run; `ratio` is how many times
    over, or under, the start a length or entropy may go. 0 turns either off. `baselines` are the
    numbers of the start and belong into a checkpoint.
    """

    logp_drop: float
    ratio: float
    baselines: dict[str, float] = field(default_factory=dict)
    said: set[tuple[str, int]] = field(default_factory=set)

    def training(self, logs: Mapping[str, float], round_index: int) -> None:
        """Look at a training log line: have the best answers become less likely? (likelihood
        displacement)
        """
        if "logps/best" not in logs or not self.logp_drop:
            return
        start, now = self.baselines.setdefault("logps/best", logs["logps/best"]), logs["logps/best"]
        if start - now > self.logp_drop:
            self._say(
                "best answers",
                round_index,
                f"the log-probability of the best answers fell from {start:.2f} to {now:.2f} nats "
                f"per token, by more than alarm_logp_drop={self.logp_drop}: the ranking loss is "
                "making good answers unlikely, too. A larger lm_weight or kl_weight, or a smaller "
                "learning rate, holds them",
            )

    def drift(
        self, facts: Mapping[str, float], start: Mapping[str, float], round_index: int
    ) -> None:
        """Look at a drift measurement: has the length or the entropy of plain answers run away?"""
        for name, unit, meaning in (
            ("mean_length", "tokens", "the reward may be paid for length"),
            ("entropy", "nats per token", "answers become one, or noise"),
        ):
            if not self.ratio or not facts.get(name) or not start.get(name):
                continue
            times = facts[name] / start[name]
            if times > self.ratio or times < 1 / self.ratio:
                self._say(
                    name,
                    round_index,
                    f"the {name.replace('_', ' ')} of plain answers went from {start[name]:.3g} to "
                    f"{facts[name]:.3g} {unit}, {times:.2g} times the start "
                    f"(alarm_ratio={self.ratio}): {meaning}. Look at the answers (neat-align "
                    "inspect)",
                )

    def _say(self, kind: str, round_index: int, message: str) -> None:
        if (kind, round_index) not in self.said:
            self.said.add((kind, round_index))
            logger.warning("round %d: %s", round_index + 1, message)
