"""The configuration: every training option with its help, its range and its conditions.

    neat_config.py       NEATConfig, a `TrainingArguments` with NEAT's own fields
    round_options.py     the options of a round: sampling, instructions, rewards, limits
    objective_options.py the options of the loss
    reward_options.py    the options of how rewards are put together and their models held
    sampler_options.py   the options of who samples
    trainer_defaults.py  what other defaults and limits `TrainingArguments` has here
    load_values.py       number types and attentions that a model may be loaded with
    trainer_values.py    what transformers' own options may be set to, and which packages they need
    constraints.py       `option(default, help, ge=…, choices=…, only_with=…)`, and what checks it
    combinations.py      which option is read only with which, and rules on several options
    sharding.py          weights divided between processes: what is let through and what not
    unsupported.py       what TrainingArguments offers and NEAT refuses; what a device cannot do

NEATConfig costs what `transformers.TrainingArguments` costs to import (seconds: it brings torch);
the options alone cost nothing, which the command line's help and completion rest on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neat_align.config.round_options import PLACEMENTS

if TYPE_CHECKING:
    from neat_align.config.neat_config import NEATConfig

__all__ = ["PLACEMENTS", "NEATConfig"]


def __getattr__(name: str) -> Any:
    if name == "NEATConfig":
        from neat_align.config.neat_config import NEATConfig

        return NEATConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
