"""Every setting of a NEAT run, as one `TrainingArguments`.

The import costs what `transformers.TrainingArguments` costs (seconds: it brings torch), so the
command line imports it only when a command needs it. Field help texts are what `neat-align train
--help` prints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from neat_align.errors import ConfigError
from neat_align.files.secrets import scrubbed

RANKING_LOSSES = ("hinge", "logistic", "listwise", "dpo", "none")
NEGATIVE_PENALTIES = ("none", "unlikelihood", "npo")
PLACEMENTS = ("system", "user_suffix", "affix")
# A field's type as it is written here (text) and as transformers has it (an object), and what reads
# it from text.
_NUMBERS = {"int": int, "int | None": int, "float": float, "float | None": float}


@dataclass
class NEATConfig(TrainingArguments):
    """`TrainingArguments` plus NEAT's own fields. One epoch is one round; one training row is one
    group.

    `per_device_train_batch_size` counts groups, not completions. `num_train_epochs` is the number
    of rounds.
    """

    # ---- what other defaults TrainingArguments has, and why NEAT's differ ----
    learning_rate: float = field(
        default=1e-5,
        metadata={
            "help": "Peak learning rate of AdamW. Full fine-tuning wants about 1e-5, LoRA about "
            "1e-4."
        },
    )
    bf16: bool = field(
        default=True,
        metadata={
            "help": "Compute in bf16 autocast. Trainable weights stay fp32 (bf16 weights do not "
            "move at small learning rates)."
        },
    )
    use_cpu: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Train on the CPU; unset: where there is no accelerator. False: an error "
            "where there is none."
        },
    )
    logging_steps: float = field(
        default=1, metadata={"help": "Log every this many optimizer steps."}
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to checkpoint: `epoch` is after every round."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: reward functions get every column."}
    )
    per_device_train_batch_size: int = field(
        default=4,
        metadata={"help": "Groups (prompts with all their completions) per forward pass."},
    )
    max_tokens_per_micro_batch: int = field(
        default=4096,
        metadata={
            "help": "The groups of a forward pass are cut into micro-batches of at most this many "
            "tokens, which bounds memory; the "
            "gradient is the same. A group that alone is larger goes alone."
        },
    )
    prefix_sharing: str = field(
        default="auto",
        metadata={
            "help": "`auto`: a group's completions share one copy of their prompt, after a check "
            "at the start that the model gives "
            "the same numbers so (else padded rows, with a warning); `off`: padded rows."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Set every dropout probability to zero, so that the policy that samples is "
            "the one that learns."
        },
    )

    # ---- rounds and sampling ----
    prompts_per_round: int = field(
        default=64,
        metadata={
            "help": "Groups per round. One batch is fully on-policy; the whole data set is the "
            "paper's two-stage form."
        },
    )
    num_positive: int = field(
        default=1, metadata={"help": "Completions per prompt under the positive instruction."}
    )
    num_negative: int = field(
        default=1, metadata={"help": "Completions per prompt under the negative instruction."}
    )
    num_plain: int = field(
        default=2, metadata={"help": "Completions per prompt without an instruction."}
    )
    use_human_completions: bool = field(
        default=True,
        metadata={
            "help": "Add the data's own `chosen` and `rejected` answers to each group where there "
            "are any."
        },
    )
    negative_source: str = field(
        default="instruction",
        metadata={
            "help": "Where negatives come from: `instruction`, the model's own answers under the "
            "negative instruction, or `other_prompts`, "
            "its good answers to other prompts (an ablation; needs rank_by origin or "
            "origin_then_reward)."
        },
    )
    negative_policy: str = field(
        default="current",
        metadata={
            "help": "Who writes the negatives: `current`, or `initial` (the start policy), for "
            "when the current one no longer obeys."
        },
    )
    instruction_bank: str = field(
        default="harmlessness",
        metadata={
            "help": "Name of a shipped bank (harmlessness, helpfulness, honesty, politeness) or "
            "path of a YAML file with pairs."
        },
    )
    instruction_placement: str = field(
        default="user_suffix",
        metadata={
            "help": "Where the instruction goes: `system` turn, `user_suffix` of the last user "
            "turn, or `affix` to the assistant turn."
        },
    )
    max_prompt_length: int = field(
        default=512,
        metadata={
            "help": "Longest plain prompt, in tokens. A longer one is an error that names its "
            "row; nothing is cut."
        },
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Longest completion, in tokens, end-of-turn included."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; above 0."})
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Nucleus sampling: keep the smallest set of tokens with this probability; 1 "
            "keeps all."
        },
    )
    top_k: int = field(
        default=0, metadata={"help": "Keep only this many likeliest tokens; 0 keeps all."}
    )
    generation_batch_size: int = field(
        default=64,
        metadata={
            "help": "Completions sampled at once. Changes speed and memory, never which seeds are "
            "drawn."
        },
    )
    generation_copy: str = field(
        default="auto",
        metadata={
            "help": "Sample from a bf16 copy with adapters merged: `always`, `never`, or `auto` "
            "(on CPUs, where it is faster)."
        },
    )

    # ---- rewards and ranking ----
    reward_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "One weight per reward function; None is 1 for each. The reward is the "
            "weighted sum."
        },
    )
    rank_by: str = field(
        default="reward",
        metadata={
            "help": "`reward`; `origin` (positive and chosen above plain above negative and "
            "rejected) for runs without a reward; or "
            "`origin_then_reward` (negative and rejected below all others whatever their reward, "
            "else by reward)."
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that a call of a reward function may take (a batch of about 64 "
            "rows), or one request to a reward server. "
            "None: no limit, and 60 for a server. A function that is late stops the run; its "
            "thread cannot be ended and is left alone."
        },
    )
    allow_http_hosts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Private hosts, for example inside a cluster, whose reward server may be asked "
            "over plain http: names, addresses, or patterns such as `*.svc` and `10.0.0.*`. What "
            "is sent there, a token too, can be read on the way. None: https only, except on this "
            "machine."
        },
    )
    reward_margin: float = field(
        default=0.0,
        metadata={
            "help": "Completion i ranks above j when its reward is higher by more than this, in "
            "reward units."
        },
    )

    # ---- objective ----
    ranking_loss: str = field(
        default="logistic",
        metadata={
            "help": "hinge (RRHF, SLiC), logistic (SimPO's form), listwise (PRO), dpo, or none "
            "(the LM loss alone: RAFT)."
        },
    )
    pair_selection: str = field(
        default="all",
        metadata={
            "help": "Which pairs of a group are ranked: `all`, or `best_worst`, the best against "
            "the worst (DPO's)."
        },
    )
    hinge_margin: float | None = field(
        default=None,
        metadata={
            "help": "Margin m of the hinge, in nats per token (nats when length_power is 0). Only "
            "with hinge; 0 when unset."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Scale of log-probability differences in logistic, listwise, dpo. Unset: 2, "
            "1, and 2 (0.1 if length_power is 0)."
        },
    )
    gamma: float | None = field(
        default=None,
        metadata={
            "help": "Target margin inside the sigmoid of the logistic loss (SimPO's gamma). Only "
            "with logistic; 0 when unset."
        },
    )
    length_power: float = field(
        default=1.0,
        metadata={
            "help": "Scores divide the summed log-probability by length to this power: 1 is the "
            "mean, 0 the sum."
        },
    )
    pair_reduction: str = field(
        default="mean", metadata={"help": "`mean` over a group's pairs, or `sum` (RRHF's form)."}
    )
    lm_weight: float = field(
        default=0.05,
        metadata={"help": "Weight of the language-modelling loss on the best completion."},
    )
    lm_on_bad_origins: bool = field(
        default=False,
        metadata={
            "help": "Let a negative or rejected completion be the language-modelling target when "
            "it is the best."
        },
    )
    lm_on_cut_completions: bool = field(
        default=False,
        metadata={
            "help": "Let a completion that was cut at max_completion_length be the "
            "language-modelling target, without an end of turn. "
            "Otherwise the target must have ended by itself, which favours short answers where "
            "most are cut."
        },
    )
    negative_penalty: str = field(
        default="none",
        metadata={
            "help": "Bounded penalty on negatives rewarded below the group's median: none, "
            "unlikelihood, or npo."
        },
    )
    negative_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the negative penalty; above 0 exactly when there is one."},
    )
    npo_beta: float | None = field(
        default=None,
        metadata={
            "help": "Inverse temperature of the npo penalty (2404.05868). Only with npo. Unset: "
            "0.1 on sums, 1 on means."
        },
    )
    kl_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the KL term: k3 estimate to the start policy on the group's own "
            "tokens, nats per token."
        },
    )

    # ---- limits: success can be collapse ----
    drift_prompts: int = field(
        default=16,
        metadata={
            "help": "Plain prompts sampled before every round to measure KL to the start, "
            "distinct-2 and length; 0 turns it off."
        },
    )
    max_kl: float | None = field(
        default=None,
        metadata={
            "help": "Stop when the exact KL to the start policy on plain samples passes this, in "
            "nats per token."
        },
    )
    min_distinct2_ratio: float = field(
        default=0.5,
        metadata={
            "help": "Stop when distinct-2 of plain samples falls below this share of its value at "
            "the start; 0 turns it off."
        },
    )
    min_pair_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Stop when fewer than this share of a round's prompts give a pair to rank."
        },
    )

    alarm_logp_drop: float = field(
        default=0.5,
        metadata={
            "help": "Warn when the mean log-probability of the best answers falls this far below "
            "the run's first step, in nats per token; "
            "0 turns it off."
        },
    )
    alarm_ratio: float = field(
        default=2.0,
        metadata={
            "help": "Warn when the mean length or the entropy of plain answers is more than this "
            "many times its value at the start, or "
            "less than that part of it; 0 turns it off, else above 1."
        },
    )

    # ---- evaluation and output ----
    num_eval_generations: int = field(
        default=1, metadata={"help": "Plain samples per held-out prompt."}
    )
    num_eval_prompts: int | None = field(
        default=None,
        metadata={"help": "Evaluate on the first this many held-out prompts; None is all."},
    )
    evaluate_contrast: bool = field(
        default=True,
        metadata={
            "help": "Evaluation also samples under the positive and the negative instruction."
        },
    )
    allow_changes: bool = field(
        default=False,
        metadata={
            "help": "Resume although options, data, model or number of processes changed; "
            "run.json records what did."
        },
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print a few groups of every round to the terminal."}
    )

    def __post_init__(self) -> None:
        _read_numbers(self)
        _choose_device(self)
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except (ValueError, ImportError, RuntimeError) as error:
            raise ConfigError(f"{error}: correct the value") from error
        _check_choice("ranking_loss", self.ranking_loss, RANKING_LOSSES)
        _check_choice("negative_penalty", self.negative_penalty, NEGATIVE_PENALTIES)
        _check_choice("instruction_placement", self.instruction_placement, PLACEMENTS)
        _check_choice("rank_by", self.rank_by, ("reward", "origin", "origin_then_reward"))
        _check_choice("pair_selection", self.pair_selection, ("all", "best_worst"))
        _check_choice("negative_source", self.negative_source, ("instruction", "other_prompts"))
        _check_choice("negative_policy", self.negative_policy, ("current", "initial"))
        _check_choice("generation_copy", self.generation_copy, ("auto", "always", "never"))
        _check_choice("pair_reduction", self.pair_reduction, ("mean", "sum"))
        _check_choice("prefix_sharing", self.prefix_sharing, ("auto", "off"))
        _check_numbers(self)
        _check_ignored(self)

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments into every checkpoint (training_args.bin): a secret must not
        # go with them.
        return {k: scrubbed(v) if isinstance(v, str) else v for k, v in self.__dict__.items()} | {
            "hub_token": None
        }

    @property
    def num_generations(self) -> int:
        """Completions sampled per prompt; the data's own answers come on top."""
        return self.num_positive + self.num_negative + self.num_plain

    @property
    def needs_reference(self) -> bool:
        """Whether the objective needs the start policy's log-probabilities (the logged KL needs
        them too).
        """
        return self.ranking_loss == "dpo" or self.negative_penalty == "npo" or self.kl_weight > 0

    @property
    def resolved_beta(self) -> float:
        """`beta`, or the default of the chosen ranking loss."""
        # dpo's own 0.1 is for summed log-probabilities; on means it would hardly ever saturate.
        defaults = {
            "logistic": 2.0,
            "listwise": 1.0,
            "dpo": 0.1 if self.length_power == 0 else 2.0,
            "hinge": 1.0,
            "none": 1.0,
        }
        return defaults[self.ranking_loss] if self.beta is None else self.beta

    @property
    def resolved_npo_beta(self) -> float:
        """`npo_beta`, or 0.1 (the paper's) on summed log-probabilities and 1 on means."""
        if self.npo_beta is not None:
            return self.npo_beta
        return 0.1 if self.length_power == 0 else 1.0


def _read_numbers(c: NEATConfig) -> None:
    """Numbers that came as text become numbers (YAML reads 1e-5, without a dot, as text); one that
    is not finite is refused.
    """
    for f in fields(c):
        value = getattr(c, f.name)
        type_name = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
        kind = _NUMBERS.get(type_name) or _NUMBERS.get(str(f.type))
        if isinstance(value, str) and kind is not None:
            try:
                value = kind(value)
            except ValueError:
                what = "whole number" if kind is int else "number"
                raise ConfigError(
                    f"{f.name} is {value!r}; it must be a {what}, such as {kind(1)}: correct it"
                ) from None
            setattr(c, f.name, value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(
                f"{f.name} is {value}; it must be a finite number: correct it, or leave it out"
            )


def _choose_device(c: NEATConfig) -> None:
    """Settle `use_cpu`, and refuse what the device cannot do. (TrainingArguments refuses bf16 on a
    machine without an accelerator unless it is told that the CPU is meant.)
    """
    found = torch.accelerator.is_available()
    if c.use_cpu is False and not found:
        raise ConfigError(
            f"use_cpu is false, which asks for an accelerator, and torch {torch.__version__} sees "
            "none on this machine: leave use_cpu "
            "out to train on the CPU, or install the torch build for your hardware"
        )
    c.use_cpu = c.use_cpu or not found
    if c.fp16 and c.bf16:
        raise ConfigError(
            "fp16 and bf16 are both true, and bf16 is by default: set bf16 to false too, or "
            "remove fp16"
        )
    if c.fp16 and c.use_cpu:
        raise ConfigError(
            "fp16 is true and the run is on the CPU, where its loss scaling does not work: remove "
            "fp16 (bf16 works there)"
        )
    if (
        c.bf16
        and torch.cuda.is_available()
        and not c.use_cpu
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ConfigError(
            f"bf16 is true (it is by default), and {torch.cuda.get_device_name()} cannot compute "
            "in it: set bf16 to false, and fp16 to "
            "true if memory is short"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _check_numbers(c: NEATConfig) -> None:
    at_least_one = (
        *(
            "prompts_per_round",
            "max_prompt_length",
            "max_completion_length",
            "generation_batch_size",
            "num_eval_generations",
        ),
        "max_tokens_per_micro_batch",
    )
    for name in at_least_one:
        if getattr(c, name) < 1:
            raise ConfigError(f"{name} is {getattr(c, name)}; it must be 1 or more")
    not_negative = (
        *(
            "num_positive",
            "num_negative",
            "num_plain",
            "top_k",
            "reward_margin",
            "lm_weight",
            "negative_weight",
            "kl_weight",
        ),
        *(
            "length_power",
            "drift_prompts",
            "min_distinct2_ratio",
            "min_pair_fraction",
            "alarm_logp_drop",
            "alarm_ratio",
        ),
    )
    for name in not_negative:
        if getattr(c, name) < 0:
            raise ConfigError(f"{name} is {getattr(c, name)}; it must not be negative")
    for name in ("seed", "data_seed"):
        value = getattr(c, name)
        if value is not None and not 0 <= value < 2**32:
            raise ConfigError(f"{name} is {value}; it must be a whole number from 0 to {2**32 - 1}")
    if "\0" in str(c.output_dir):
        raise ConfigError(
            f"output_dir is {c.output_dir!r}, which holds a NUL character, and no path can: "
            "remove it"
        )
    if c.learning_rate < 0:
        raise ConfigError(f"learning_rate is {c.learning_rate}; it must not be negative")
    if c.reward_timeout is not None and not 0 < c.reward_timeout < math.inf:
        raise ConfigError(
            f"reward_timeout is {c.reward_timeout}; it must be a positive number of seconds, or "
            "left out"
        )
    if c.temperature <= 0:
        raise ConfigError(
            f"temperature is {c.temperature}; it must be above 0 (at 0 every completion of a "
            "prompt would be the same, and "
            "there would be nothing to rank)"
        )
    if not 0 < c.top_p <= 1:
        raise ConfigError(f"top_p is {c.top_p}; it must be above 0 and at most 1")
    if c.beta is not None and c.beta <= 0:
        raise ConfigError(f"beta is {c.beta}; it must be above 0")
    if c.npo_beta is not None and c.npo_beta <= 0:
        raise ConfigError(f"npo_beta is {c.npo_beta}; it must be above 0")
    if c.max_kl is not None and c.max_kl <= 0:
        raise ConfigError(f"max_kl is {c.max_kl}; it must be above 0, or unset")
    if 0 < c.alarm_ratio <= 1:
        raise ConfigError(
            f"alarm_ratio is {c.alarm_ratio}; it must be above 1, or 0 to turn the alarm off"
        )
    if c.num_train_epochs < 1 or c.num_train_epochs != int(c.num_train_epochs):
        raise ConfigError(
            f"num_train_epochs is {c.num_train_epochs}; it is the number of rounds, a whole "
            "number of 1 or more"
        )
    if c.num_generations < 1:
        raise ConfigError(
            "num_positive, num_negative and num_plain are all 0: nothing would be sampled; set at "
            "least one"
        )
    if c.num_generations == 1 and not c.use_human_completions:
        raise ConfigError(
            "num_positive, num_negative and num_plain add up to 1 and use_human_completions is "
            "false: one completion a prompt leaves "
            "nothing to rank; ask for two or more"
        )


def _check_ignored(c: NEATConfig) -> None:
    """Refuse options that the chosen mode would silently ignore."""
    if c.hinge_margin is not None and c.ranking_loss != "hinge":
        raise ConfigError(
            f"hinge_margin is set but ranking_loss is {c.ranking_loss}: remove it, or use "
            "ranking_loss: hinge"
        )
    if c.beta is not None and c.ranking_loss in ("hinge", "none"):
        raise ConfigError(
            f"beta is set but ranking_loss {c.ranking_loss} has none: remove it (the hinge's "
            "scale is hinge_margin)"
        )
    if c.ranking_loss == "none" and c.lm_weight == 0:
        raise ConfigError(
            "ranking_loss is none and lm_weight is 0: nothing would be learned; set one of them"
        )
    if c.ranking_loss == "none" and c.pair_selection != "all":
        raise ConfigError(
            "pair_selection is set but ranking_loss is none: no pair is ranked; remove it"
        )
    if c.lm_weight == 0 and (c.lm_on_bad_origins or c.lm_on_cut_completions):
        raise ConfigError(
            "lm_on_bad_origins or lm_on_cut_completions is set but lm_weight is 0: there is no "
            "language-modelling target"
        )
    if c.gamma is not None and c.ranking_loss != "logistic":
        raise ConfigError(
            f"gamma is set but ranking_loss is {c.ranking_loss}: only logistic has a target margin"
        )
    if (c.negative_penalty == "none") != (c.negative_weight == 0):
        raise ConfigError(
            f"negative_penalty is {c.negative_penalty} and negative_weight is "
            f"{c.negative_weight}: set both, or neither"
        )
    if c.negative_penalty != "none" and c.num_negative == 0:
        raise ConfigError(
            "negative_penalty is set but num_negative is 0: there would be nothing to penalise"
        )
    if c.npo_beta is not None and c.negative_penalty != "npo":
        raise ConfigError(
            f"npo_beta is set but negative_penalty is {c.negative_penalty}: remove it, or use "
            "negative_penalty: npo"
        )
    if c.negative_penalty != "none" and c.pair_selection != "all":
        raise ConfigError(
            "negative_penalty looks at whole groups and pair_selection: best_worst trains on two "
            "of each: use one of the two"
        )
    if c.negative_source == "other_prompts":
        _check_other_prompts(c)
    if c.negative_policy == "initial" and c.num_negative == 0:
        raise ConfigError(
            "negative_policy is initial but num_negative is 0: remove it, or sample negatives"
        )
    if c.max_kl is not None and c.drift_prompts == 0:
        raise ConfigError(
            "max_kl is set but drift_prompts is 0: nothing would measure the KL; set "
            "drift_prompts to 8 or more"
        )
    if c.remove_unused_columns:
        raise ConfigError(
            "remove_unused_columns must stay false: reward functions are given every column of "
            "the data"
        )
    if c.push_to_hub:
        raise ConfigError(
            "push_to_hub would upload the whole run directory, and rounds/ holds text that was "
            "written to be harmful: set it to "
            "false and push the model folder yourself when the run is done"
        )
    if c.dataloader_persistent_workers:
        raise ConfigError(
            "dataloader_persistent_workers would keep serving the first round's groups: set it to "
            "false"
        )
    if c.dataloader_drop_last:
        raise ConfigError("dataloader_drop_last would throw sampled groups away: set it to false")
    if c.label_smoothing_factor:
        raise ConfigError("label_smoothing_factor has no meaning in NEAT's losses: set it to 0")


def _check_other_prompts(c: NEATConfig) -> None:
    if c.num_negative == 0:
        raise ConfigError(
            "negative_source is other_prompts but num_negative is 0: remove it, or ask for "
            "negatives"
        )
    if c.rank_by == "reward":
        raise ConfigError(
            "negative_source is other_prompts and rank_by is reward: a good answer to another "
            "prompt may well have a high reward, so it "
            "would be no negative; set rank_by: origin_then_reward (or origin)"
        )
    if c.negative_policy == "initial":
        raise ConfigError(
            "negative_policy is initial but negative_source is other_prompts: the current policy "
            "writes those; remove one"
        )
