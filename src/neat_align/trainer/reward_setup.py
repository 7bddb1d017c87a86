"""The rewards and judges of a run, checked before anything is sampled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError
from neat_align.modeling.packing import TokenIds
from neat_align.network.server_url import parse_url
from neat_align.prompts.instruction_banks import Contrasted
from neat_align.prompts.row_prompts import instructed_prompt_ids
from neat_align.prompts.rows import (
    NO_INPUTS,
    Prompt,
    PromptRow,
    TemplateInputs,
)
from neat_align.prompts.seeds import draw_pair
from neat_align.prompts.skipped_rows import BadRows
from neat_align.prompts.template_inputs import joined_inputs
from neat_align.rewards.contrast import ContrastReward
from neat_align.rewards.hf import ModelReward
from neat_align.rewards.http import check_http_hosts, check_tokens
from neat_align.rewards.judge import compares_group
from neat_align.rewards.protocol import NamedReward, RewardFunction, RewardSpec, RewardSum
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rewards.scoring import unscorable_rows
from neat_align.rounds.ranking import ORIGIN_STEP
from neat_align.sampling.vllm_client import VLLM_SERVER
from neat_align.trainer.setup import PolicySetup, TrainingData, template_kwargs

logger = logging.getLogger(__name__)
# (prompt ids, completion ids) → summed log-probabilities in nats, in order.
SumLogprobs = Callable[[Sequence[TokenIds], Sequence[TokenIds]], list[float]]
GivenRewards = RewardSpec | Sequence[RewardSpec] | None


@dataclass(frozen=True)
class Rewards:
    """What is trained on (`rewards`), and what only evaluation sees.

    An evaluation calls `in_place` the reward, where it is there, instead of what is trained on.
    """

    rewards: tuple[NamedReward, ...]
    judges: tuple[NamedReward, ...]
    in_place: tuple[NamedReward, ...] | None = None

    @property
    def evaluated(self) -> tuple[NamedReward, ...]:
        """What an evaluation calls the reward.

        A judge that holds a prompt's answers against each other has no part in it.
        """
        given = self.rewards if self.in_place is None else self.in_place
        return tuple(reward for reward in given if not compares_group(reward))

    @property
    def in_evaluations(self) -> tuple[NamedReward, ...]:
        """All that score an evaluation's answers."""
        return (*self.evaluated, *self.judges)


def set_up_rewards(
    args: NEATConfig,
    contrast: ContrastReward,
    reward_funcs: GivenRewards,
    judge_funcs: GivenRewards,
    processing_classes: Any,
    trainer_state: Callable[[], Any] | None = None,
    evaluated: RewardSum | None = None,
) -> Rewards:
    """Rewards and judges as the user gave them, as functions with names and weights.

    `trainer_state` gives the trainer's state to functions that ask for it. `evaluated` is what an
    evaluation calls the reward; None: what is trained on.

    Raises ConfigError and RewardError for what is no reward, does not fit the way of ranking, or
    lacks its server's token.
    """
    rewards = named_rewards(reward_funcs, args, contrast, args.reward_weights, processing_classes)
    judges = named_rewards(judge_funcs, args, contrast)
    told = None
    if evaluated is not None:
        funcs = _loaded_once(evaluated.funcs, reward_funcs, rewards)
        told = named_rewards(funcs, args, contrast, evaluated.weights)
    _check_judges(rewards, judges, told)
    functions = [r.function for r in (*rewards, *judges, *(told or ()))]
    check_tokens(functions)
    _check_bits(args, [*_listed(reward_funcs), *_listed(judge_funcs)], [*rewards, *judges])
    _check_http_hosts(args, functions)
    if args.distil_answers == "lower_half" and not rewards:
        raise ConfigError(
            "distil_answers is lower_half but reward_funcs is empty: nothing says which half is "
            "the lower one; give a reward function, or set distil_answers: all"
        )
    if args.needs_pairs and args.rank_by != "origin" and not rewards:
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

    def with_state(given: Sequence[NamedReward]) -> tuple[NamedReward, ...]:
        return tuple(replace(reward, trainer_state=trainer_state) for reward in given)

    in_place = None if told is None else with_state(told)
    return Rewards(with_state(rewards), with_state(judges), in_place)


def _check_judges(
    rewards: Sequence[NamedReward],
    judges: Sequence[NamedReward],
    told: Sequence[NamedReward] | None,
) -> None:
    """Refuse judges that compare a group's answers where two policies are to be compared."""
    why = "holds a prompt's answers against each other, so that its mean is ½ for every policy"
    for option, given in (("judge_funcs", judges), ("a comparison's reward_funcs", told or ())):
        for reward in filter(compares_group, given):
            raise ConfigError(
                f"{option} has the judge {reward.name!r}, which {why}: use form: pointwise, or "
                "form: pairwise with against: chosen"
            )
    for reward in filter(compares_group, rewards if told is None else ()):
        logger.warning(
            "the judge %r %s: rounds are ranked by it, and evaluations go without it; add another "
            "one to judge_funcs to see what training does",
            reward.name,
            why,
        )


def _check_http_hosts(args: NEATConfig, functions: Sequence[RewardFunction]) -> None:
    """Refuse an `allow_http_hosts` that neither a reward nor the vLLM server needs."""
    hosts, urls = args.allow_http_hosts, [args.vllm_server] if args.vllm_server else []
    others = [parse_url(url, VLLM_SERVER, hosts or ()) for url in urls]
    check_http_hosts(hosts, functions, others)


def scorable_data(data: TrainingData, scored_by: Rewards, on_bad_row: str) -> TrainingData:
    """The data without the prompts that are too long for a reward model already.

    Raises DataError where there are such prompts and `on_bad_row` is "error".
    """
    # Runs that are evaluated by one reward learn from the same prompts, whatever they train on.
    both = (*scored_by.rewards, *(scored_by.in_place or ()))
    trained = tuple({id(r.function): r for r in both}.values())
    bad = BadRows("training prompts", on_bad_row, data.skipped)
    kept = scorable_places(data.rows, trained, bad)
    bad = BadRows("held-out prompts", on_bad_row, data.skipped)
    held_out = scorable_places(data.eval_rows, scored_by.in_evaluations, bad)
    if len(kept) == len(data.rows) and len(held_out) == len(data.eval_rows):
        return data
    return replace(
        data,
        rows=[data.rows[i] for i in kept],
        prompt_lengths=[data.prompt_lengths[i] for i in kept] if data.prompt_lengths else (),
        eval_rows=[data.eval_rows[i] for i in held_out],
    )


def scorable_places(
    rows: Sequence[PromptRow], rewards: Sequence[NamedReward], bad: BadRows
) -> list[int]:
    """The places of the rows to which an answer can be scored; `bad` is told of the others."""
    found = unscorable_rows(rewards, rows)
    reasons = {left.row: left.reason for left in found}
    for i, reason in reasons.items():
        bad.add(rows[i].where, rows[i].id, f"no answer can be scored, since it {reason}")
    bad.settle(len(rows) - len(reasons))
    return [i for i in range(len(rows)) if i not in reasons]


def _loaded_once(
    funcs: GivenRewards, others: GivenRewards, loaded: Sequence[NamedReward]
) -> list[Any]:
    """These rewards, with the functions of the others that are named alike: a reward model may be
    large. `loaded` are the others as functions.
    """
    given = zip(_listed(others), loaded, strict=True)
    known = {name: reward.function for name, reward in given if isinstance(name, str)}
    return [known.get(f, f) if isinstance(f, str) else f for f in _listed(funcs)]


def _listed(funcs: GivenRewards) -> list[Any]:
    if funcs is None:
        return []
    return list(funcs) if isinstance(funcs, list | tuple) else [funcs]


def named_rewards(
    funcs: GivenRewards,
    args: NEATConfig,
    contrast: ContrastReward,
    weights: Sequence[float] | None = None,
    processing_classes: Any = None,
) -> tuple[NamedReward, ...]:
    """Rewards as a user gives them, as functions with names and weights; none for None."""
    if funcs is None:
        return ()
    specs = [contrast if f == "contrast" else f for f in _listed(funcs)]
    return resolve_rewards(
        specs,
        weights,
        processing_classes,
        timeout=args.reward_timeout,
        allow_http_hosts=args.allow_http_hosts,
        bits=_bits(args),
    )


def _bits(args: NEATConfig) -> Literal[4, 8] | None:
    """In how many bits reward models that are given by name hold their weights."""
    return 4 if args.reward_load_in_4bit else 8 if args.reward_load_in_8bit else None


def _check_bits(args: NEATConfig, given: Sequence[Any], rewards: Sequence[NamedReward]) -> None:
    """Refuse bits that nobody reads: only a model that is given by name is loaded here."""
    bits = _bits(args)
    pairs = zip(given, rewards, strict=True)
    if bits is None or any(
        isinstance(g, str) and isinstance(r.function, ModelReward) for g, r in pairs
    ):
        return
    raise ConfigError(
        f"reward_load_in_{bits}bit is true, but no reward or judge is a sequence-classification "
        "model that is given by its name: leave it out, or give the name in place of the model"
    )


def contrast_reward(args: NEATConfig, setup: PolicySetup, score: SumLogprobs) -> ContrastReward:
    """The policy's own log-probability under the positive against the negative instruction."""

    option = template_kwargs(args)

    def render(
        prompt: Prompt, polarity: Contrasted, inputs: TemplateInputs = NO_INPUTS
    ) -> list[int]:
        pair = draw_pair(setup.bank, run_seed=args.seed, round_index=0, prompt_id=str(prompt))
        instruction = pair.of(polarity)
        inputs = joined_inputs(option, inputs)
        placement = args.instruction_placement
        return instructed_prompt_ids(setup.tokenizer, prompt, instruction, placement, inputs)

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
