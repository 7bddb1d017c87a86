"""What a trainer is made of, checked before anything is sampled: data, policy, rewards, layout."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from transformers import TrainerCallback, set_seed

from neat_align.config import NEATConfig
from neat_align.config.sharding import Sharding, asked_sharding
from neat_align.errors import ConfigError, DataError
from neat_align.modeling.head_inputs import head_of, linear_head
from neat_align.modeling.layout import choose_layout
from neat_align.modeling.load_options import held_like, read_load_options
from neat_align.modeling.loading import load_policy, load_tokenizer
from neat_align.modeling.outputs import adds_auxiliary_loss
from neat_align.modeling.packing import Layout
from neat_align.modeling.reference import Reference, start_policy
from neat_align.modeling.requirements import (
    check_context,
    check_policy,
    check_reference,
    check_trainable_weights,
    context_of,
    disable_dropout,
    settle_generation_config,
)
from neat_align.modeling.self_check import (
    check_autocast,
    check_training_forward,
    showing_adapter,
)
from neat_align.prompts.instructed_limit import InstructedLimit, InstructedLimits, instructed_limit
from neat_align.prompts.instruction_banks import (
    CONTRASTED,
    Contrasted,
    InstructionBank,
    load_bank,
)
from neat_align.prompts.row_checks import (
    UsablePrompts,
    apart,
    as_rows,
    check_group_size,
    check_prompts,
    warn_of_unused_template,
)
from neat_align.prompts.row_prompts import row_prompt_ids
from neat_align.prompts.rows import (
    PromptRow,
    TemplateInputs,
    is_conversational,
)
from neat_align.prompts.skipped_rows import SkippedRows
from neat_align.prompts.template_check import check_rendering, check_template
from neat_align.prompts.template_inputs import read_kwargs, with_template_kwargs
from neat_align.runs.events import shows_groups
from neat_align.runs.run_key import fingerprint
from neat_align.trainer.first_process import start_fingerprint
from neat_align.trainer.startup_checks import check_evaluates, check_output_dir
from neat_align.trainer.trackers import shows_tables

logger = logging.getLogger(__name__)
# From the one that works with every model to the fastest.
LAYOUTS_BY_CARE: tuple[Layout, ...] = ("unpadded", "padded", "packed")


@dataclass(frozen=True)
class TrainingData:
    """Rows to learn from, and held-out rows.

    `conversational`: prompts are messages, not text. `skipped`: rows that were left out.
    `notices` are for a reader of the result. `prompt_lengths`: tokens of each row's prompt, once
    they were checked. `shortened`: rows that `drop_old_turns` shortened.
    """

    rows: list[PromptRow]
    eval_rows: list[PromptRow]
    conversational: bool
    skipped: SkippedRows = field(default_factory=SkippedRows)
    notices: list[str] = field(default_factory=list)
    prompt_lengths: Sequence[int] = ()
    shortened: int = 0

    @functools.cached_property
    def fingerprints(self) -> tuple[str, str]:
        """Of the rows to learn from, and of the held-out rows; taken once."""
        return fingerprint(self.rows), fingerprint(self.eval_rows)


@dataclass(frozen=True)
class PolicySetup:
    """The model that learns, its tokenizer, the instruction bank, and the policy it starts from.

    `reference_given`: the start policy is a model that the user passed, not the model's own start.
    `start_fingerprint` tells a model with other weights from this one. `instructed` says how long
    prompts may be under instructions.
    """

    model: torch.nn.Module
    tokenizer: Any
    bank: InstructionBank
    reference: Reference
    reference_given: bool
    start_fingerprint: str
    instructed: InstructedLimits


def _check_settings(
    args: NEATConfig, callbacks: Sequence[TrainerCallback | type], data: TrainingData
) -> None:
    """Refuse what nothing would show or measure, and a folder that cannot be made."""
    check_output_dir(args)
    check_evaluates(args, bool(data.eval_rows), callbacks)
    shown = shows_tables(args) or any(shows_groups(c) for c in callbacks)
    if args.log_completions and not shown:
        raise ConfigError(
            "log_completions is true, no callback prints groups and no tracker shows them: pass "
            "callbacks=neat_align.terminal_callbacks(args), or one of your own, or set report_to"
        )


def read_data(
    args: NEATConfig,
    train_dataset: Any,
    eval_dataset: Any,
    callbacks: Sequence[TrainerCallback | type],
) -> TrainingData:
    """The rows of both data sets; options and callbacks that need others are refused.

    Raises DataError and ConfigError.
    """
    if train_dataset is None:
        raise ConfigError("NEATTrainer needs a train_dataset with prompts")
    skipped = SkippedRows()
    rows = read_rows(args, train_dataset, "train_dataset", skipped)
    given = eval_dataset is not None
    held_out = read_rows(args, eval_dataset, "eval_dataset", skipped) if given else []
    data = TrainingData(rows, held_out, is_conversational(rows), skipped)
    _check_settings(args, callbacks, data)
    return data


def read_rows(args: NEATConfig, dataset: Any, name: str, skipped: SkippedRows) -> list[PromptRow]:
    """The rows of a data set, with the option's variables for the chat template in them."""
    rows = as_rows(dataset, name, args.on_bad_row, skipped)
    return with_template_kwargs(rows, template_kwargs(args))


def usable_rows(
    args: NEATConfig,
    data: TrainingData,
    rows: Sequence[PromptRow],
    tokenizer: Any,
    name: str,
    *,
    skipped: SkippedRows,
    most: int | None = None,
    instructed: InstructedLimit | None = None,
) -> UsablePrompts:
    """The rows that tokenizer, template and limits allow; see `check_prompts`."""
    return check_prompts(
        rows,
        tokenizer,
        args.max_prompt_length,
        conversational=data.conversational,
        name=name,
        on_bad_row=args.on_bad_row,
        skipped=skipped,
        most=most,
        instructed=instructed,
        drop_old_turns=args.drop_old_turns,
    )


def _usable_data(
    args: NEATConfig, data: TrainingData, tokenizer: Any, instructed: InstructedLimits
) -> TrainingData:
    train = usable_rows(
        args,
        data,
        data.rows,
        tokenizer,
        "training prompts",
        skipped=data.skipped,
        instructed=instructed.training,
    )
    held_out = usable_rows(
        args,
        data,
        data.eval_rows,
        tokenizer,
        "held-out prompts",
        skipped=data.skipped,
        most=args.num_eval_prompts,
        instructed=instructed.held_out,
    )
    warn_of_unused_template(tokenizer, conversational=data.conversational)
    train = apart(train, held_out)
    check_group_size(train.rows, args)
    return replace(
        data,
        rows=train.rows,
        eval_rows=held_out.rows,
        prompt_lengths=train.lengths,
        shortened=len(train.shortened),
    )


def instructed_limits(
    args: NEATConfig,
    tokenizer: Any,
    bank: InstructionBank,
    models: Sequence[torch.nn.Module],
    *,
    conversational: bool,
) -> InstructedLimits:
    """The limits of prompts that these models read."""
    contexts = [context for context in map(context_of, models) if context is not None]

    def limit(polarities: Collection[Contrasted]) -> InstructedLimit | None:
        return instructed_limit(
            tokenizer,
            [pair.of(polarity) for polarity in sorted(polarities) for pair in bank.pairs],
            args.instruction_placement,
            context=min(contexts, default=None),
            max_completion_length=args.max_completion_length,
            conversational=conversational,
            inputs=TemplateInputs(kwargs=template_kwargs(args)),
        )

    read = _instructed_polarities(args)
    return InstructedLimits(limit(read), limit(CONTRASTED if args.evaluate_contrast else ()))


def _instructed_polarities(args: NEATConfig) -> set[Contrasted]:
    """Under which instructions rounds put prompts: to sample from, to branch, or to contrast."""
    if args.contrast_pairs or args.contrast_from == "branch":
        return set(CONTRASTED)
    read: set[Contrasted] = set()
    if args.num_positive or (args.num_negative and args.negative_source == "other_prompts"):
        read.add("positive")
    if args.num_negative and args.negative_source == "instruction":
        read.add("negative")
    return read


def template_kwargs(args: NEATConfig) -> dict[str, Any]:
    """The option's variables for the chat template. Raises ConfigError."""
    try:
        return read_kwargs(args.chat_template_kwargs, "chat_template_kwargs")
    except DataError as error:
        raise ConfigError(str(error)) from error


def set_up_policy(
    args: NEATConfig,
    model: Any,
    data: TrainingData,
    tokenizer: Any,
    peft_config: Any,
    ref_model: str | torch.nn.Module | None,
) -> tuple[PolicySetup, TrainingData]:
    """Load what is named, and check that policy, tokenizer, template, bank and data fit together.

    Gives the data without the rows that `on_bad_row` leaves out.

    Raises ConfigError, DataError and PromptError, each with what to change.
    """
    policy, tokenizer = _loaded(args, model, tokenizer, peft_config)
    bank = load_bank(args.instruction_bank)
    _check_pairs(args, bank)
    conversational = data.conversational
    inputs = TemplateInputs(kwargs=template_kwargs(args))
    check_rendering(tokenizer, conversational=conversational, inputs=inputs)
    if _instructed_polarities(args) or (args.evaluate_contrast and data.eval_rows):
        placement = args.instruction_placement
        check_template(tokenizer, bank, placement, conversational=conversational, inputs=inputs)
    check_policy(policy, tokenizer, args.max_prompt_length, args.max_completion_length)
    settle_generation_config(policy)
    if isinstance(ref_model, str):
        ref_model = load_policy(ref_model, held_like(policy), once=args.loads_once)
    reference_given = ref_model is not None and ref_model is not policy
    if reference_given:
        check_reference(ref_model, policy)
    set_seed(args.seed)  # a new adapter is drawn at random
    evaluates = bool(data.eval_rows) and args.num_eval_prompts != 0
    reference, policy = start_policy(
        policy,
        peft_config,
        ref_model,
        keep=args.needs_start_policy(evaluates=evaluates),
        # Weights that are divided have to be of one type.
        autocast_dtype=None if asked_sharding(args) in ("fsdp2", "zero3") else autocast_dtype(args),
    )
    check_context(policy, args.max_prompt_length, args.max_completion_length)
    models = [policy, ref_model] if isinstance(ref_model, torch.nn.Module) else [policy]
    limits = instructed_limits(args, tokenizer, bank, models, conversational=conversational)
    data = _usable_data(args, data, tokenizer, limits)
    if args.disable_dropout:
        disable_dropout(policy)
    check_trainable_weights(policy)
    start = start_fingerprint(args, policy)
    setup = PolicySetup(policy, tokenizer, bank, reference, reference_given, start, limits)
    return setup, data


def _loaded(
    args: NEATConfig, model: Any, tokenizer: Any, peft_config: Any
) -> tuple[torch.nn.Module, Any]:
    """The model and its tokenizer, loaded where a name was given. Raises ConfigError."""
    given = cast("Mapping[str, Any] | None", args.model_init_kwargs)
    if not isinstance(model, str):
        if given:
            raise ConfigError(
                f"model_init_kwargs is {dict(given)} and the model was passed as an object, which "
                "is loaded already: pass its name, or leave model_init_kwargs out"
            )
        return model, load_tokenizer(model, tokenizer)
    named = read_load_options(given)
    options = named.options if peft_config else named.options.where_all_weights_learn()
    revision, trusted = named.revision, named.trust_remote_code
    told: dict[str, Any] = {"revision": revision, "trust_remote_code": trusted}
    policy = load_policy(model, options, once=args.loads_once, **told)
    return policy, load_tokenizer(policy, tokenizer, **told)


def _check_pairs(args: NEATConfig, bank: InstructionBank) -> None:
    """Refuse a contrast of more instruction pairs than the bank has."""
    if args.contrast_pairs > len(bank.pairs):
        raise ConfigError(
            f"distil_pairs is {args.taught_pairs} and token_weight_pairs is {args.weighing_pairs}, "
            f"and the bank {bank.name} has {len(bank.pairs)}: set them to {len(bank.pairs)} or "
            "less, or add pairs to the bank"
        )


def layout_for(
    args: NEATConfig, setup: PolicySetup, data: TrainingData, sharding: Sharding
) -> Layout:
    """Packed rows where the model, and a start policy that was given, get the same numbers so.

    The model is compared with itself here, and in training mode, whatever the layout. Raises
    ConfigError for a model that says something else of a row in training, or each time.
    """
    may_pack = args.prefix_sharing != "off"
    if may_pack and (sharding.startswith("zero") or args.n_gpu > 1 or args.ddp_static_graph):
        logger.warning(
            "prompts are not shared between completions under DeepSpeed, DataParallel and "
            "ddp_static_graph: padded rows are used"
        )
        may_pack = False
    if may_pack and sharding == "fsdp2" and linear_head(head_of(setup.model)) is None:
        logger.warning(
            "prompts are not shared between completions under FSDP where the model's head is no "
            "plain linear layer (an adapter on it, a quantised one): padded rows are used"
        )
        may_pack = False
    if adds_auxiliary_loss(setup.model):
        logger.warning(
            "output_router_logits is true in the model's configuration, which asks for a load "
            "balancing loss: NEAT adds none, and the router's logits are not computed"
        )
    prompts = first_prompts(setup, data)
    longest = args.max_prompt_length + args.max_completion_length
    pad = setup.tokenizer.pad_token_id
    layout = choose_layout(
        setup.model, prompts, pad_token_id=pad, longest=longest, may_pack=may_pack
    )
    alone = layout == "unpadded"
    if args.disable_dropout:
        with showing_adapter(setup.model):
            check_training_forward(setup.model, prompts, one_at_a_time=alone)
    check_autocast(setup.model, prompts, autocast_dtype(args), one_at_a_time=alone)
    if setup.reference_given:  # it is scored in the same layout
        with setup.reference() as start:
            its_own = choose_layout(
                start,
                prompts,
                pad_token_id=pad,
                longest=longest,
                may_pack=layout == "packed",
            )
        layout = min(layout, its_own, key=LAYOUTS_BY_CARE.index)
    return layout


def autocast_dtype(args: NEATConfig) -> torch.dtype | None:
    """What the model computes in; None: in its weights' own type."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def first_prompts(setup: PolicySetup, data: TrainingData) -> list[list[int]]:
    """Token ids that the model is compared with itself on."""
    return [row_prompt_ids(setup.tokenizer, row) for row in data.rows[:2]]
