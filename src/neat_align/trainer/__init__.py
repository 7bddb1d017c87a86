"""The trainer: the one place that knows all stages, composed of the rooms below it.

neat_trainer.py    NEATTrainer, a subclass of `transformers.Trainer` alone
given.py           what a script gives the trainer, or asks of it, and what cannot work
startup_checks.py  what Trainer would find out only after the first round
setup.py           data, policy and layout, checked before anything is sampled
trackers.py        tables of groups and the report for trackers (report_to)
hub.py             a model with its card, and on the hub where that was asked for
first_process.py   weights that the first process alone has loaded
memory_plan.py     what a run will take of the memory; decides about checkpointing
outlook.py         what it will take of memory and time, from a few timed passes
reward_setup.py    rewards and judges, checked before anything is sampled
policies_setup.py  the policies, once it is measured how they are called
sampler_setup.py   who samples, where it is another engine
parts.py           what the trainer is composed of, and what the parts do together
round_maker.py     a round from the current policy
shared_tools.py    its costly calls, and an evaluation's, shared by all ranks
shared_reference.py  weights that processes divide where Trainer divides none
round_callback.py  rounds among Trainer's events
"""

from __future__ import annotations

from neat_align.trainer.neat_trainer import NEATTrainer

__all__ = ["NEATTrainer"]
