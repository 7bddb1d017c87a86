"""The round maker: rounds of groups from the current policy.

Rank 0 leads, every rank does its share of the sampling and scoring, and all read the result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from transformers import TrainerCallback

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError
from neat_align.prompts.instruction_banks import InstructionBank
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.skipped_rows import check_on_bad_row
from neat_align.rewards.aggregation import Aggregation
from neat_align.rewards.protocol import NamedReward
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.make_round import make_round
from neat_align.rounds.params import ContrastFrom, RoundParams, RoundTools
from neat_align.rounds.prompt_order import prompt_at
from neat_align.rounds.ranking import RankBy
from neat_align.rounds.rollout_store import RolloutStore
from neat_align.rounds.round_files import (
    FinishedRound,
    finished_round,
    next_position,
    read_or_set_aside,
    read_round,
)
from neat_align.rounds.sampling_stage import sample_groups
from neat_align.runs.events import stage_reporter, tell_tokens
from neat_align.runs.ranks import Ranks
from neat_align.runs.run_directory import RunDirectory
from neat_align.sampling.policies import Policies
from neat_align.sampling.protocol import Sampler, SamplingParams
from neat_align.trainer.shared_tools import lead_round


def sampling_params(args: NEATConfig) -> SamplingParams:
    """How completions are drawn, from the configuration."""
    return SamplingParams(args.max_completion_length, args.temperature, args.top_p, args.top_k)


def aggregation(args: NEATConfig) -> Aggregation:
    """How the rewards of a completion become one, from the configuration."""
    return cast("Aggregation", args.multi_objective_aggregation)


def round_params(args: NEATConfig) -> RoundParams:
    """What a round is made of, from the configuration."""
    return RoundParams(
        seed=args.seed,
        num_positive=args.num_positive,
        num_negative=args.num_negative,
        num_plain=args.num_plain,
        use_human_completions=args.use_human_completions,
        placement=args.instruction_placement,
        sampling=sampling_params(args),
        rank_by=cast("RankBy", args.rank_by),
        negative_source=cast("Literal['instruction', 'other_prompts']", args.negative_source),
        contrast_from=cast("ContrastFrom", args.contrast_from),
        reward_margin=args.reward_margin,
        max_prompt_length=args.max_prompt_length,
        min_pair_fraction=args.min_pair_fraction,
        contrast_pairs=args.contrast_pairs,
        weighing_pairs=args.weighing_pairs,
        needs_pairs=args.needs_pairs,
        aggregation=aggregation(args),
    )


def _shortened(params: RoundParams, at_most: int) -> RoundParams:
    """One completion of each origin that there is, of so many tokens at most."""
    sampling = params.sampling
    return replace(
        params,
        num_positive=min(1, params.num_positive),
        num_negative=min(1, params.num_negative),
        num_plain=min(1, params.num_plain),
        sampling=replace(sampling, max_new_tokens=min(at_most, sampling.max_new_tokens)),
    )


class RoundMaker:
    """Makes the rounds of a run.

    Args:
        args: the configuration.
        rows: the training data's rows.
        num_groups: groups of a round.
        policies: who samples and who gives log-probabilities.
        tokenizer: the policy's.
        bank: the instructions.
        rewards: what scores completions.
        directory: where rounds are kept.
        ranks: the run's processes.
    """

    def __init__(
        self,
        args: NEATConfig,
        rows: Sequence[PromptRow],
        num_groups: int,
        *,
        policies: Policies,
        tokenizer: Any,
        bank: InstructionBank,
        rewards: tuple[NamedReward, ...],
        directory: RunDirectory,
        ranks: Ranks,
    ) -> None:
        self.args = args
        self.rows = rows
        self.num_groups = num_groups
        self.policies = policies
        self.tokenizer = tokenizer
        self.bank = bank
        self.rewards = rewards
        self.directory = directory
        self.ranks = ranks
        # Whether the first round keeps the start policy's log-probabilities although the objective
        # does not need them: another method of a comparison goes on from it.
        self.first_round_is_shared = False
        self._intact: tuple[int, FinishedRound | None] | None = None

    @property
    def first_round_has_reference(self) -> bool:
        """Whether the first round has the start policy's log-probabilities of all completions."""
        return self.args.needs_reference or self.first_round_is_shared

    def set_aside_if_damaged(self, index: int) -> None:
        """Set a round aside when its groups are not what was written.

        Only for a round that begins now: the policy has to be the one that sampled it.
        """
        folder = self.directory.round_folder(index)
        where = f"before round {index + 1}"

        def work() -> None:
            self._intact = index, read_or_set_aside(folder)

        self.ranks.run_on_rank_zero(work, where)

    def make(
        self,
        index: int,
        *,
        is_start: bool,
        start_is_current: bool,
        callbacks: Sequence[TrainerCallback] = (),
        rows: Sequence[PromptRow] | None = None,
    ) -> FinishedRound:
        """Sample, score and rank a round, or read it when it is finished on the disk.

        With `rows`, it is a round of all of these in the place of the next training prompts.
        `is_start`: no optimizer step has been made. `start_is_current`: the start policy is the
        model's own start, so before the first step both policies are one. Raises ConfigError when
        the round before it is missing, and what `make_round` raises.
        """
        goes_on = index > 0 and rows is None
        position = next_position(self.directory.round_folder(index - 1)) if goes_on else 0
        if position is None:
            raise ConfigError(
                f"round {index - 1} is missing under {self.directory.path / 'rounds'}: it says "
                "which prompts come next"
            )
        folder = self.directory.round_folder(index)
        where = f"in round {index + 1}; its finished answers and scores are kept"
        made = self._take_intact(index)

        def find() -> None:
            nonlocal made
            made = finished_round(folder) if made is None else made

        self.ranks.run_on_rank_zero(find, where)
        if self.ranks.from_rank_zero(made is None):

            def work(tools: RoundTools) -> None:
                nonlocal made
                made = self._make(index, position, tools, callbacks, rows)

            def tools() -> RoundTools:
                return self._tools(where, is_start=is_start, start_is_current=start_is_current)

            lead_round(self.ranks, tools, work, where, self.policies.in_step)
        # Rank 0 has made it, or read and checked it; each of the others does that for itself.
        made = read_round(folder) if made is None else made
        assert made is not None
        return made

    def _make(
        self,
        index: int,
        position: int,
        tools: RoundTools,
        callbacks: Sequence[TrainerCallback],
        rows: Sequence[PromptRow] | None,
    ) -> FinishedRound:
        params = round_params(self.args)
        if rows is not None:  # whether there are pairs enough is for whoever knows all rounds
            params = replace(params, min_pair_fraction=0.0, may_be_empty=True)
        with stage_reporter(callbacks, f"round {index + 1}") as progress:
            return make_round(
                self.rows if rows is None else rows,
                num_groups=self.num_groups if rows is None else len(rows),
                position=position,
                round_index=index,
                params=params,
                tools=replace(tools, count_tokens=partial(tell_tokens, callbacks)),
                folder=self.directory.round_folder(index),
                progress=progress,
            )

    def _take_intact(self, index: int) -> FinishedRound | None:
        """The round that was just checked, which need not be checked again; on rank 0 only."""
        checked, self._intact = self._intact, None
        return checked[1] if checked is not None and checked[0] == index else None

    def trial(
        self, prompts: int, sampler: Sampler, *, at_most: int | None = None
    ) -> list[CompletionGroup]:
        """The first round's first prompts, answered and not scored; nothing of it is kept.

        `sampler` draws from the current policy, which is still the start policy. With `at_most`
        there is one answer of each origin, of no more than so many tokens: the beginning of the
        round's first one. Answers that branch need whole plain ones: not for them.
        """
        order = range(min(prompts, len(self.rows)))
        rows = [self.rows[prompt_at(len(self.rows), self.args.seed, i)] for i in order]
        with tempfile.TemporaryDirectory() as folder:
            store = RolloutStore(Path(folder))
            params = round_params(self.args)
            params = params if at_most is None else _shortened(params, at_most)
            tools = self.start_tools(sampler)
            return sample_groups(rows, 0, params, tools, store, lambda completions: None)

    def start_tools(self, sampler: Sampler | None = None) -> RoundTools:
        """Who makes the first round: for workers that make parts of it elsewhere.

        `sampler` draws from the current policy; None makes one.
        """
        where = "in a part of the round; its finished answers and scores are kept"
        return self._tools(where, is_start=True, start_is_current=True, sampler=sampler)

    def _tools(
        self,
        where: str,
        *,
        is_start: bool,
        start_is_current: bool,
        sampler: Sampler | None = None,
    ) -> RoundTools:
        policies, keep_reference = self.policies, is_start or self.args.needs_reference
        # Before the first step the model itself is the start policy, and may be the only one.
        start = policies.start_logprobs if policies.keeps_start else policies.logprobs
        start_logprobs = start if keep_reference else None
        # The same function twice: it runs once.
        both_are_one = is_start and start_is_current
        sampler = sampler or policies.sampler()
        is_current = self.args.negative_policy == "current"
        return RoundTools(
            tokenizer=self.tokenizer,
            bank=self.bank,
            rewards=self.rewards,
            sampler=sampler,
            negative_sampler=sampler if is_current else policies.start_sampler(),
            policy_logprobs=start_logprobs if both_are_one else policies.logprobs,
            ref_logprobs=start_logprobs,
            ref_for_all=self.first_round_has_reference,
            start_logprobs=policies.start_logprobs,
            batch_size=self.args.generation_batch_size,
            between_batches=lambda: self.ranks.raise_if_this_rank_must_stop(where),
            on_bad_row=check_on_bad_row(self.args.on_bad_row),
            aggregation=aggregation(self.args),
        )
