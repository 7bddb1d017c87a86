"""Options of rewards beside their names, weights and limits: how several become one, and how reward
models are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from neat_align.config import combinations
from neat_align.config.constraints import option


@dataclass
class RewardOptions:
    """How rewards are put together, and how models that give them are held."""

    multi_objective_aggregation: str = option(
        "sum",
        "How several rewards become one: `sum`, their weighted sum, or `normalize_then_sum` (TRL, "
        "GDPO): each is first centred and scaled to deviation 1 among a prompt's completions, so "
        "that none outweighs the others by its scale; reward_margin is then in deviations, and "
        "evaluations report the plain sum. TRL's `sum_then_normalize` ranks as `sum` does.",
        choices=("sum", "normalize_then_sum"),
        only_with=combinations.AGGREGATION,
    )
    reward_load_in_8bit: bool = option(
        False,
        "Hold reward models that are given by name in 8 bits (LLM.int8; needs bitsandbytes and "
        "CUDA).",
        only_with=combinations.REWARD_BITS,
    )
    reward_load_in_4bit: bool = option(
        False,
        "Hold reward models that are given by name in 4 bits (NF4; needs bitsandbytes and CUDA).",
    )
