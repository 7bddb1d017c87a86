"""The configuration: every training option with its help, its range and its conditions.

    neat_config.py       NEATConfig, a `TrainingArguments` with NEAT's own fields
    objective_options.py the options of the loss
    reward_options.py    the options of how rewards are put together and their models held
    sampler_options.py   the options of who samples
    trainer_defaults.py  what other defaults and limits `TrainingArguments` has here
    trainer_values.py    what transformers' own options may be set to, and which packages they need
    constraints.py       `option(default, help, ge=…, choices=…, only_with=…)`, and what checks it
    combinations.py      which option is read only with which, and rules on several options
    sharding.py          weights divided between processes: what is let through and what not
    unsupported.py       what TrainingArguments offers and NEAT refuses; what a device cannot do

Importing it costs what `transformers.TrainingArguments` costs (seconds: it brings torch).
"""

from __future__ import annotations

from neat_align.config.neat_config import PLACEMENTS, NEATConfig

__all__ = ["PLACEMENTS", "NEATConfig"]
