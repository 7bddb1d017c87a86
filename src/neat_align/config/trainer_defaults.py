"""Other defaults and limits than those of `TrainingArguments`, which a NEAT run needs.

What stands here are options of transformers' Trainer whose default or range differs, and those that
say how a batch of groups goes through the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from neat_align.config.constraints import option

_SEED = f"it must be a whole number from 0 to {2**32 - 1}"


@dataclass
class TrainerDefaults:
    """`TrainingArguments` where one epoch is one round and one row is one group."""

    num_train_epochs: float = option(
        3.0,
        "Number of rounds; each samples, ranks and learns from `prompts_per_round` groups.",
        ge=1,
        whole=True,
        needed="it is the number of rounds, a whole number of 1 or more",
    )
    learning_rate: float = option(
        1e-5,
        "Peak learning rate of AdamW. Full fine-tuning wants about 1e-5, LoRA about 1e-4.",
        ge=0,
    )
    seed: int = option(
        42,
        "Seed of everything that is random: completions, instructions, a new adapter, the order "
        "of groups.",
        ge=0,
        lt=2**32,
        needed=_SEED,
    )
    data_seed: int | None = option(
        None, "Seed of the order of a round's groups; unset: `seed`.", ge=0, lt=2**32, needed=_SEED
    )
    bf16: bool = option(
        True,
        "Compute in bf16 autocast. Trainable weights stay fp32 (bf16 weights do not move at small "
        "learning rates).",
    )
    use_cpu: bool | None = option(
        None,
        "Train on the CPU; unset: where there is no accelerator. False: an error where there is "
        "none.",
    )
    logging_steps: float = option(1, "Log every this many optimizer steps.")
    logging_nan_inf_filter: bool = option(
        False,
        "Leave losses that are not finite out of the logged mean. There are none: they stop a run "
        "before the step. True only makes the CPU wait for a GPU in every accumulation step.",
    )
    save_strategy: str = option("epoch", "When to checkpoint: `epoch` is after every round.")
    save_total_limit: int | None = option(
        3,
        "Checkpoints that are kept: the newest ones (never fewer than two), and the best one where "
        "a metric is followed. 0 keeps all.",
    )
    push_to_hub: bool = option(
        False,
        "Push the finished model (model/, with its card) to the hub, as hub_model_id; the "
        "repository is made before anything is paid for (hub_private_repo: true for a private "
        "one). Nothing else of the run ever goes: no rounds, no report, no checkpoint.",
    )
    hub_strategy: str = option(
        "end", "Must stay end: the finished model is pushed, and no checkpoint."
    )
    remove_unused_columns: bool = option(
        False, "Must stay False: reward functions get every column."
    )
    train_sampling_strategy: str = option(
        "random",
        "Order in which a round's groups are learned from: `random`, or `sequential`, as they "
        "were sampled.",
        choices=("random", "sequential"),
    )
    per_device_train_batch_size: int = option(
        4, "Groups (prompts with all their completions) per forward pass.", ge=1
    )
    max_tokens_per_micro_batch: int = option(
        4096,
        "The groups of a forward pass are cut into micro-batches of at most this many tokens, "
        "which bounds memory; the gradient is the same. A group that alone is larger goes alone.",
        ge=1,
    )
    prefix_sharing: str = option(
        "auto",
        "`auto`: a group's completions share one copy of their prompt, after a check at the start "
        "that the model gives the same numbers so (else padded rows, with a warning); `off`: "
        "padded rows.",
        choices=("auto", "off"),
    )
    disable_dropout: bool = option(
        True,
        "Set every dropout probability and a router's jitter to zero, so that the policy that "
        "samples is the one that learns.",
    )
    activation_checkpointing: bool | None = option(
        None,
        "Compute activations again in the backward pass, for less memory and about a third more "
        "time; unset: where the run would not fit otherwise, by an estimate (--dry-run shows it).",
    )
