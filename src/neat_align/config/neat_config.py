"""Every setting of a NEAT run, as one `TrainingArguments`.

The import costs what `transformers.TrainingArguments` costs (seconds: it brings torch), so the
command line imports it only when a command needs it. Field help texts are what `neat-align train
--help` prints. What a field may be stands beside it (`constraints.option`), combinations of fields
in `combinations`, the options of the loss in `objective_options`, of who samples in
`sampler_options`, what other
defaults `TrainingArguments` has in `trainer_defaults`, and what is refused of its options in
`unsupported`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from neat_align.config import combinations
from neat_align.config.constraints import (
    check_kinds,
    check_options,
    option,
    read_numbers,
    read_object,
)
from neat_align.config.objective_options import ObjectiveOptions
from neat_align.config.sampler_options import SamplerOptions
from neat_align.config.sharding import check_sharding, load_whole
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
PLACEMENTS = ("system", "user_suffix", "affix")


@dataclass
class NEATConfig(SamplerOptions, ObjectiveOptions):
    """`TrainingArguments` plus NEAT's own fields.

    One epoch is one round; one training row is one group. `per_device_train_batch_size` counts
    groups, not completions. `num_train_epochs` is the number of rounds.
    """

    # ---- the model ----
    model_init_kwargs: dict[str, Any] | str | None = option(
        None,
        "How a script's NEATTrainer loads a model that it is given by name: dtype, "
        "attn_implementation, load_in_4bit, revision, trust_remote_code. Commands have options of "
        "these names.",
    )

    # ---- rounds and sampling ----
    prompts_per_round: int = option(
        64,
        "Groups per round. One batch is fully on-policy; the whole data set is the paper's "
        "two-stage form.",
        ge=1,
    )
    data_passes: float | None = option(
        None,
        "Passes over the training data, in place of num_train_epochs: as many rounds as take every "
        "prompt this often (1: each once; 0.5: half of them). The last round may go on into the "
        "next pass.",
        gt=0,
        needed="it is a number of passes over the data above 0, such as 1, or left out",
        only_with=combinations.DATA_PASSES,
    )
    num_positive: int = option(1, "Completions per prompt under the positive instruction.", ge=0)
    num_negative: int = option(1, "Completions per prompt under the negative instruction.", ge=0)
    num_plain: int = option(2, "Completions per prompt without an instruction.", ge=0)
    use_human_completions: bool = option(
        True,
        "Add the data's own `chosen` and `rejected` answers to each group where there are any.",
    )
    negative_source: str = option(
        "instruction",
        "Where negatives come from: `instruction`, the model's own answers under the negative "
        "instruction, or `other_prompts`, its good answers to other prompts (an ablation; needs "
        "rank_by origin or origin_then_reward).",
        choices=("instruction", "other_prompts"),
        only_with=combinations.OTHER_PROMPTS,
    )
    negative_policy: str = option(
        "current",
        "Who writes the negatives: `current`, or `initial` (the start policy), for when the "
        "current one no longer obeys.",
        choices=("current", "initial"),
        only_with=combinations.INITIAL_POLICY,
    )
    contrast_from: str = option(
        "prompt",
        "Where positive and negative answers begin: `prompt`, at their first token, or `branch`: a "
        "plain answer is kept up to the token that the two instructions differ most about, and "
        "continued under each (needs num_plain).",
        choices=("prompt", "branch"),
        only_with=combinations.CONTRAST_FROM,
    )
    instruction_bank: str = option(
        "harmlessness",
        "Name of a shipped bank (harmlessness, helpfulness, honesty, politeness) or path of a YAML "
        "file with pairs.",
    )
    instruction_placement: str = option(
        "user_suffix",
        "Where the instruction goes: `system` turn, `user_suffix` of the last user turn, or "
        "`affix` to the assistant turn.",
        choices=PLACEMENTS,
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None,
        "Variables for the chat template, as JSON (a mapping in recipes), such as "
        '{"enable_thinking": false}; those of a row\'s chat_template_kwargs column win.',
    )
    max_prompt_length: int = option(
        512,
        "Longest plain prompt, in tokens. A longer one is a bad row (`on_bad_row`); nothing is "
        "cut.",
        ge=1,
    )
    on_bad_row: str = option(
        "error",
        "What a row that cannot be used does (not readable, a prompt over max_prompt_length, …): "
        "`error` names it and stops, `skip` leaves it out and lists it in skipped-rows.jsonl.",
        choices=("error", "skip"),
    )
    max_completion_length: int = option(
        256, "Longest completion, in tokens, end-of-turn included.", ge=1
    )
    temperature: float = option(
        1.0,
        "Sampling temperature; above 0.",
        gt=0,
        needed="it must be above 0 (at 0 every completion of a prompt would be the same, and there "
        "would be nothing to rank)",
    )
    top_p: float = option(
        1.0,
        "Nucleus sampling: keep the smallest set of tokens with this probability; 1 keeps all.",
        gt=0,
        le=1,
    )
    top_k: int = option(0, "Keep only this many likeliest tokens; 0 keeps all.", ge=0)
    generation_batch_size: int = option(
        64,
        "Completions sampled at once, and then stored. Changes speed and memory, never which seeds "
        "are drawn.",
        ge=1,
    )
    generation_copy: str = option(
        "auto",
        "Sample from a bf16 copy with adapters merged: `always`, `never`, or `auto` (on CPUs, "
        "where it is faster).",
        choices=("auto", "always", "never"),
        only_with=combinations.GENERATION_COPY,
    )

    # ---- rewards and ranking ----
    reward_weights: list[float] | None = option(
        None, "One weight per reward function; None is 1 for each. The reward is the weighted sum."
    )
    rank_by: str = option(
        "reward",
        "`reward`; `origin` (positive and chosen above plain above negative and rejected) for runs "
        "without a reward; or `origin_then_reward` (negative and rejected below all others "
        "whatever their reward, else by reward).",
        choices=("reward", "origin", "origin_then_reward"),
    )
    reward_timeout: float | None = option(
        None,
        "Seconds that a call of a reward function may take (a batch of about 64 rows), or one "
        "request to a reward server. None: no limit, and 60 for a server. A function that is late "
        "stops the run; its thread cannot be ended and is left alone.",
        gt=0,
        needed="it must be a positive number of seconds, or left out",
    )
    allow_http_hosts: list[str] | None = option(
        None,
        "Private hosts whose reward server or vLLM server may be asked over plain http: names, "
        "addresses, or patterns such as `*.svc`. What is sent there, a token too, can be read on "
        "the way. None: https only, except on this machine.",
    )
    reward_margin: float = option(
        0.0,
        "Completion i ranks above j when its reward is higher by more than this, in reward units.",
        ge=0,
    )

    # ---- limits: success can be collapse ----
    drift_prompts: int = option(
        16,
        "Plain prompts sampled before every round to measure KL to the start, distinct-2 and "
        "length; 0 turns it off.",
        ge=0,
    )
    max_kl: float | None = option(
        None,
        "Stop when the exact KL to the start policy on plain samples passes this, in nats per "
        "token.",
        gt=0,
        needed="it must be above 0, or unset",
        only_with=combinations.MAX_KL,
    )
    min_distinct2_ratio: float = option(
        0.5,
        "Stop when distinct-2 of plain samples falls below this share of its value at the start; 0 "
        "turns it off.",
        ge=0,
    )
    min_pair_fraction: float = option(
        0.1,
        "Stop when fewer than this share of a round's prompts give a pair to rank.",
        ge=0,
    )
    alarm_logp_drop: float = option(
        0.5,
        "Warn when the mean log-probability of the best answers falls this far below the run's "
        "first step, in nats per token; 0 turns it off.",
        ge=0,
    )
    alarm_ratio: float = option(
        2.0,
        "Warn when the mean length or the entropy of plain answers is more than this many times "
        "its value at the start, or less than that part of it; 0 turns it off, else above 1.",
        gt=1,
        also=(0,),
        needed="it must be above 1, or 0 to turn the alarm off",
    )

    # ---- evaluation and output ----
    num_eval_generations: int = option(1, "Plain samples per held-out prompt.", ge=1)
    num_eval_prompts: int | None = option(
        None, "Evaluate on the first this many held-out prompts; None is all.", ge=0
    )
    evaluate_contrast: bool = option(
        True, "Evaluation also samples under the positive and the negative instruction."
    )
    allow_changes: bool = option(
        False,
        "Resume although options, data, model or number of processes changed; run.json records "
        "what did.",
    )
    log_completions: bool = option(False, "Print a few groups of every round to the terminal.")

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
