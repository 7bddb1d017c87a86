"""Every setting of a NEAT run, as one `TrainingArguments`.

The import costs what `transformers.TrainingArguments` costs (seconds: it brings torch), so the
command line imports it only when a command needs it. Field help texts are what `neat-align train
--help` prints. What a field may be stands beside it (`constraints.option`), combinations of fields
in `combinations`, the options of a round in `round_options`, of the loss in `objective_options`, of
who samples in `sampler_options`, of how rewards are put together in `reward_options`, what other
defaults `TrainingArguments` has in `trainer_defaults`, and what is refused of its options in
`unsupported`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import TrainingArguments

from neat_align.config import combinations
from neat_align.config.constraints import (
    check_kinds,
    check_options,
    read_numbers,
    read_object,
)
from neat_align.config.objective_options import ObjectiveOptions
from neat_align.config.reward_options import RewardOptions
from neat_align.config.round_options import RoundOptions
from neat_align.config.sampler_options import SamplerOptions
from neat_align.config.sharding import check_sharding, load_whole
from neat_align.config.trainer_defaults import TrainerDefaults
from neat_align.config.trainer_values import RULES as VALUE_RULES
from neat_align.config.trainer_values import check_values, follow_the_metric
from neat_align.config.unsupported import (
    TRAINER_RULES,
    check_unsupported,
    choose_device,
)
from neat_align.errors import ConfigError
from neat_align.files.secrets import scrubbed

# What transformers' own checks have been seen to raise.
_TRAINING_ARGUMENTS_RAISE = (
    ValueError,
    ImportError,
    RuntimeError,
    TypeError,
    AttributeError,
    KeyError,
    AssertionError,
    OSError,
)


@dataclass
class NEATConfig(  # type: ignore[misc]  # TrainerDefaults has other defaults on purpose
    RoundOptions,
    SamplerOptions,
    RewardOptions,
    ObjectiveOptions,
    TrainerDefaults,
    TrainingArguments,
):
    """`TrainingArguments` plus NEAT's own fields.

    One epoch is one round; one training row is one group. `per_device_train_batch_size` counts
    groups, not completions. `num_train_epochs` is the number of rounds.
    """

    # Whether the first process alone loads the policy's weights; `load_whole` says so.
    loads_once: ClassVar[bool] = False

    def __post_init__(self) -> None:
        read_numbers(self)
        read_object(self, "chat_template_kwargs")
        read_object(self, "model_init_kwargs")
        check_kinds(self)
        check_values(self)
        choose_device(self)
        check_sharding(self)
        undecided = self.activation_checkpointing is None and self.gradient_checkpointing is None
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except _TRAINING_ARGUMENTS_RAISE as error:
            raise ConfigError(f"{error}: correct the value") from error
        load_whole(self)
        if undecided:  # transformers makes it false; the trainer decides by memory
            self.activation_checkpointing = self.gradient_checkpointing = None
        follow_the_metric(self)
        check_options(self, (*combinations.RULES, *TRAINER_RULES, *VALUE_RULES))
        check_unsupported(self)

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments into every checkpoint: a secret must not go with them.
        state = {k: scrubbed(v) if isinstance(v, str) else v for k, v in self.__dict__.items()}
        return state | {"hub_token": None}

    @property
    def num_generations(self) -> int:
        """Completions sampled per prompt; the data's own answers come on top."""
        return self.num_positive + self.num_negative + self.num_plain

    def groups_per_round(self, rows: int) -> int:
        """Groups of a round over data of so many rows: each prompt is in it once at most."""
        return min(self.prompts_per_round, rows)

    def steps_over(self, groups: int) -> int:
        """Optimizer steps that learn from so many groups once; the last may have fewer of them."""
        step = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
        return -(-groups // int(step))

    @property
    def samples_from_copy(self) -> bool:
        """Whether completions are sampled from a copy in autocast's type, where there is one."""
        on_cpu = bool(self.device.type == "cpu")
        copies = self.generation_copy == "always" or (self.generation_copy == "auto" and on_cpu)
        return copies and self.sampler == "transformers"

    def needs_start_policy(self, *, evaluates: bool) -> bool:
        """Whether anything in a run reads the start policy after the first step.

        The objective, token weights and contrast distillation do, drift, negatives that it writes,
        and an evaluation, which measures KL to it.
        """
        return (
            self.needs_reference
            or (self.distil_weight > 0 and self.distil_teacher == "start")
            or self.weighing_pairs > 0
            or self.drift_prompts > 0
            or (self.negative_policy == "initial" and self.num_negative > 0)
            or evaluates
        )
