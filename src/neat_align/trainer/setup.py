"""What a trainer is made of, checked before anything is sampled: data, policy, rewards, layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback, set_seed

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError
from neat_align.modeling.layout import choose_layout
from neat_align.modeling.loading import load_policy, load_tokenizer
from neat_align.modeling.outputs import adds_auxiliary_loss
from neat_align.modeling.packing import Layout, TokenIds
from neat_align.modeling.reference import Reference, start_policy
from neat_align.modeling.requirements import (
    check_policy,
    check_trainable_weights,
    disable_dropout,
)
from neat_align.modeling.self_check import (
    check_autocast,
    check_training_forward,
    showing_adapter,
)
from neat_align.prompts.instruction_banks import InstructionBank, Polarity, load_bank
from neat_align.prompts.placement import instructed
from neat_align.prompts.rendering import prompt_ids
from neat_align.prompts.row_checks import as_rows, check_group_size, check_prompts
from neat_align.prompts.rows import Prompt, PromptRow, is_conversational
from neat_align.prompts.seeds import draw_pair
from neat_align.prompts.template_check import check_template
from neat_align.rewards.contrast import ContrastReward
from neat_align.rewards.http import check_http_hosts, check_tokens
from neat_align.rewards.protocol import NamedReward, RewardSpec
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rounds.ranking import ORIGIN_STEP
from neat_align.runs.events import shows_groups
from neat_align.runs.run_key import weights_fingerprint

logger = logging.getLogger(__name__)

# From the one that works with every model to the fastest.
LAYOUTS_BY_CARE: tuple[Layout, ...] = ("unpadded", "padded", "packed")
# (prompt ids, completion ids) → summed log-probabilities in nats, in order.
SumLogprobs = Callable[[Sequence[TokenIds], Sequence[TokenIds]], list[float]]
GivenRewards = RewardSpec | Sequence[RewardSpec] | None


@dataclass(frozen=True)
class TrainingData:
    """Rows to learn from, and held-out rows. `conversational`: prompts are messages, not text."""

    rows: list[PromptRow]
    eval_rows: list[PromptRow]
    conversational: bool


@dataclass(frozen=True)
class PolicySetup:
    """The model that learns, its tokenizer, the instruction bank, and the policy it starts from.

    `reference_given`: the start policy is a model that the user passed, not the model's own start.
    `start_fingerprint` tells a model with other weights from this one.
    """

    model: torch.nn.Module
    tokenizer: Any
    bank: InstructionBank
    reference: Reference
    reference_given: bool
    start_fingerprint: str


@dataclass(frozen=True)
class Rewards:
    """What is trained on, and what only evaluation sees."""

    rewards: tuple[NamedReward, ...]
    judges: tuple[NamedReward, ...]


def check_callbacks(args: NEATConfig, callbacks: Sequence[TrainerCallback | type]) -> None:
    """Refuse `log_completions` when nothing would print them."""
    if args.log_completions and not any(shows_groups(c) for c in callbacks):
        raise ConfigError(
            "log_completions is true and no callback prints groups: pass "
            "callbacks=neat_align.terminal_callbacks(args), as the command line does, or one with "
            "on_round_made of your own"
        )


def keep_one_progress_bar(trainer: Trainer) -> None:
    """A progress bar that was given stands in the place of Trainer's own."""
    bars = [c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)]
    own = [c for c in bars if type(c) is ProgressCallback]
    if own and len(bars) > len(own):
        trainer.remove_callback(own[0])


def read_data(args: NEATConfig, train_dataset: Any, eval_dataset: Any) -> TrainingData:
    """The rows of both data sets. Raises DataError and ConfigError."""
    if train_dataset is None:
        raise ConfigError("NEATTrainer needs a train_dataset with prompts")
    rows = as_rows(train_dataset, "train_dataset")
    eval_rows = [] if eval_dataset is None else as_rows(eval_dataset, "eval_dataset")
    return TrainingData(rows, eval_rows[: args.num_eval_prompts], is_conversational(rows))


def set_up_policy(
    args: NEATConfig,
    model: Any,
    data: TrainingData,
    tokenizer: Any,
    peft_config: Any,
    ref_model: torch.nn.Module | None,
) -> PolicySetup:
    """Load what is named, and check that policy, tokenizer, template, bank and data fit together.

    Raises ConfigError, DataError and PromptError, each with what to change.
    """
    policy = load_policy(model) if isinstance(model, str) else model
    tokenizer = load_tokenizer(policy, tokenizer)
    bank = load_bank(args.instruction_bank)
    conversational = data.conversational
    if args.num_positive or args.num_negative:
        placement = args.instruction_placement
        check_template(tokenizer, bank, placement, conversational=conversational)
    check_policy(policy, tokenizer, args.max_prompt_length, args.max_completion_length)
    check_group_size(data.rows, args)
    everything = (*data.rows, *data.eval_rows)
    check_prompts(everything, tokenizer, args.max_prompt_length, conversational=conversational)
    reference_given = ref_model is not None and ref_model is not policy
    set_seed(args.seed)  # a new adapter is drawn at random
    reference, policy = start_policy(policy, peft_config, ref_model)
    if args.disable_dropout:
        disable_dropout(policy)
    check_trainable_weights(policy)
    start = weights_fingerprint(policy)
    return PolicySetup(policy, tokenizer, bank, reference, reference_given, start)


def set_up_rewards(
    args: NEATConfig,
    contrast: ContrastReward,
    reward_funcs: GivenRewards,
    judge_funcs: GivenRewards,
    processing_classes: Any,
) -> Rewards:
    """Rewards and judges as the user gave them, as functions with names and weights.

    Raises ConfigError and RewardError for what is no reward, does not fit the way of ranking, or
    lacks its server's token.
    """
    rewards = _resolved(reward_funcs, args, contrast, args.reward_weights, processing_classes)
    judges = _resolved(judge_funcs, args, contrast)
    functions = [r.function for r in (*rewards, *judges)]
    check_tokens(functions)
    check_http_hosts(args.allow_http_hosts, functions)
    if args.rank_by != "origin" and not rewards:
        raise ConfigError(
            f"rank_by is {args.rank_by} but reward_funcs is empty: give a reward function, or set "
            "rank_by: origin"
        )
    if args.rank_by == "origin_then_reward" and args.reward_margin >= ORIGIN_STEP:
        raise ConfigError(
            f"reward_margin is {args.reward_margin} and rank_by is origin_then_reward, which puts "
            f"the best bad completion {ORIGIN_STEP:g} below the worst good one: that would be no "
            f"pair; set reward_margin below {ORIGIN_STEP:g}"
        )
    return Rewards(rewards, judges)


def _resolved(
    funcs: GivenRewards,
    args: NEATConfig,
    contrast: ContrastReward,
    weights: Sequence[float] | None = None,
    processing_classes: Any = None,
) -> tuple[NamedReward, ...]:
    if funcs is None:
        return ()
    given: list[Any] = list(funcs) if isinstance(funcs, list | tuple) else [funcs]
    specs = [contrast if f == "contrast" else f for f in given]
    return resolve_rewards(
        specs,
        weights,
        processing_classes,
        timeout=args.reward_timeout,
        allow_http_hosts=args.allow_http_hosts,
    )


def contrast_reward(args: NEATConfig, setup: PolicySetup, score: SumLogprobs) -> ContrastReward:
    """The policy's own log-probability under the positive against the negative instruction."""

    def render(prompt: Prompt, polarity: Polarity) -> list[int]:
        pair = draw_pair(setup.bank, run_seed=args.seed, round_index=0, prompt_id=str(prompt))
        instruction = pair.positive if polarity == "positive" else pair.negative
        placed = instructed(prompt, instruction, args.instruction_placement)
        return prompt_ids(setup.tokenizer, *placed)

    return ContrastReward(score=score, render=render)


def judged_by_start(
    rewards: Sequence[NamedReward], start_score: SumLogprobs
) -> tuple[NamedReward, ...]:
    """The rewards with the start policy as the judge of `contrast`.

    For evaluations: a judge that moves with the policy would compare two different scores.
    """
    return tuple(
        replace(r, function=replace(r.function, score=start_score))
        if isinstance(r.function, ContrastReward)
        else r
        for r in rewards
    )


def layout_for(
    args: NEATConfig, setup: PolicySetup, data: TrainingData, *, sharded: bool
) -> Layout:
    """Packed rows where the model, and a start policy that was given, get the same numbers so.

    The model is compared with itself here, and in training mode, whatever the layout. Raises
    ConfigError for a model that says something else of a row in training, or each time.
    """
    may_pack = args.prefix_sharing != "off"
    if may_pack and (sharded or args.n_gpu > 1 or args.ddp_static_graph):
        logger.warning(
            "prompts are not shared between completions under DeepSpeed, DataParallel and "
            "ddp_static_graph: padded rows are used, and under the first "
            "max_tokens_per_micro_batch does not cut"
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
    if args.disable_dropout:
        with showing_adapter(setup.model):
            check_training_forward(setup.model, prompts, one_at_a_time=layout == "unpadded")
    dtype = autocast_dtype(args)
    if dtype is not None:
        check_autocast(setup.model, prompts, dtype)
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
    return [prompt_ids(setup.tokenizer, row.prompt) for row in data.rows[:2]]
