"""What a trainer is composed of. Each part stands in its own room and can be used alone."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerState

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError
from neat_align.evaluation.drift_monitor import DriftMonitor, Facts
from neat_align.evaluation.held_out import EvalTools, Evaluation, evaluate_policy, metric_names
from neat_align.learning.alarms import Alarms
from neat_align.learning.step_engine import ForwardBackward, StepEngine
from neat_align.learning.step_metrics import sum_dtype
from neat_align.modeling.load_options import held_as, named_as
from neat_align.modeling.lockstep import class_of, wait_at_most
from neat_align.modeling.requirements import check_learns, context_of
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.skipped_rows import SKIPPED_FILE, BadRows, SkippedRows, check_on_bad_row
from neat_align.rewards.contrast import ContrastReward
from neat_align.rewards.judge import judge_facts
from neat_align.rewards.protocol import NamedReward
from neat_align.runs.events import stage_reporter, tell_outlook, tell_plan
from neat_align.runs.plan import RunPlan, plan_run
from neat_align.runs.ranks import Ranks
from neat_align.runs.run_directory import RunDirectory
from neat_align.runs.run_key import run_key, text_fingerprint
from neat_align.runs.signals import StopRequest
from neat_align.sampling.policies import Policies
from neat_align.sampling.protocol import Sampler
from neat_align.trainer.outlook import outlook
from neat_align.trainer.policies_setup import set_up_policies
from neat_align.trainer.reward_setup import Rewards, judged_by_start, scorable_places
from neat_align.trainer.round_maker import RoundMaker, sampling_params
from neat_align.trainer.sampler_setup import GivenSampler
from neat_align.trainer.setup import (
    PolicySetup,
    TrainingData,
    read_rows,
    usable_rows,
)
from neat_align.trainer.shared_reference import (
    DIVIDES_WEIGHTS,
    sharding_of,
    share_untrained,
)
from neat_align.trainer.shared_tools import lead_evaluation
from neat_align.trainer.startup_checks import check_followed_metric

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerParts:
    """The parts of one trainer, and what they do together."""

    args: NEATConfig
    data: TrainingData
    setup: PolicySetup
    scored_by: Rewards
    ranks: Ranks
    directory: RunDirectory
    policies: Policies
    engine: StepEngine
    round_maker: RoundMaker
    alarms: Alarms

    @property
    def divides_weights(self) -> bool:
        """Whether each process will hold a part of every weight, once training has begun."""
        return sharding_of(self.ranks.accelerator) in DIVIDES_WEIGHTS

    def place_policy(self) -> None:
        """Before the policy is called outside of training: see `share_untrained`."""
        setup, accelerator = self.setup, self.ranks.accelerator
        share_untrained(accelerator, sharding_of(accelerator), setup.model, setup.reference)

    @property
    def drift(self) -> DriftMonitor:
        """Measures drift of the current policy on the training data's prompts."""
        start_file = self.directory.path / "drift-start.json"
        return DriftMonitor(self.args, self.data.rows, self._measured, start_file)

    def _measured(self, measure: Callable[[EvalTools], Facts]) -> Facts:
        def tools() -> EvalTools:
            return replace(self.eval_tools(with_reference=True), rewards=(), judges=())

        where, in_step = "while drift was measured", self.policies.in_step
        return lead_evaluation(self.ranks, tools, measure, where, in_step)

    def eval_tools(self, *, with_reference: bool) -> EvalTools:
        """Who samples and judges in an evaluation of the current policy."""
        policies = self.policies
        # Only an eval_dataset that the trainer was not made with finds no start policy.
        kept = policies.keeps_start
        judge = policies.start_sum_logprobs if kept else policies.sum_logprobs
        return EvalTools(
            tokenizer=self.setup.tokenizer,
            sampler=policies.sampler(),
            rewards=judged_by_start(self.scored_by.evaluated, judge),
            judges=judged_by_start(self.scored_by.judges, judge),
            bank=self.setup.bank,
            placement=self.args.instruction_placement,
            sampling=sampling_params(self.args),
            logprobs=policies.logprobs,
            context=context_of(policies.model),
            divergence=policies.divergence if with_reference and kept else None,
            on_bad_row=check_on_bad_row(self.args.on_bad_row),
        )

    def evaluate(
        self,
        eval_dataset: Any,
        callbacks: Sequence[TrainerCallback],
        *,
        is_start: bool,
        may_stop: bool,
    ) -> Evaluation:
        """Sample and judge the current policy on held-out rows (plain prompt); None: the run's own.

        `is_start`: no optimizer step has been made, so there is no KL to measure. `may_stop`: a
        signal ends it at once; within training it is finished first, since a checkpoint comes next.
        """
        rows = self.data.eval_rows if eval_dataset is None else self._held_out(eval_dataset)
        if not is_start and not self.policies.keeps_start:
            self._check_without_start()
        if not rows:
            raise ConfigError(
                "there is nothing to evaluate on: pass an eval_dataset with held-out prompts"
            )
        self.place_policy()
        self.record_skipped()
        with stage_reporter(callbacks, "evaluate") as report:

            def progress(stage: str, finished: int, total: int) -> None:
                report(stage, finished, total)
                if may_stop:
                    where = "in an evaluation, which is made again"
                    self.ranks.raise_if_this_rank_must_stop(where)

            def evaluate(tools: EvalTools) -> Evaluation:
                return evaluate_policy(
                    rows,
                    tools,
                    seed=self.args.seed,
                    samples_per_prompt=self.args.num_eval_generations,
                    contrast=self.args.evaluate_contrast,
                    progress=progress,
                )

            return lead_evaluation(
                self.ranks,
                lambda: self.eval_tools(with_reference=not is_start),
                evaluate,
                "in an evaluation",
                self.policies.in_step,
            )

    def _check_without_start(self) -> None:
        """An evaluation after the first step of a run that kept no start policy."""
        advice = "pass eval_dataset to NEATTrainer, too, and it is kept"
        if any(isinstance(r.function, ContrastReward) for r in self.scored_by.in_evaluations):
            raise ConfigError(
                "the start policy judges by contrast in evaluations, and it was not kept since no "
                f"option reads it and the trainer was made without held-out prompts: {advice}"
            )
        logger.warning("this evaluation has no KL: the start policy was not kept; %s", advice)

    def unmeasured(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """NaN for the metric that decides which model is best, where this evaluation has none.

        A reward that abstained everywhere, answers of one word each: no better than any other.
        """
        name = self.args.metric_for_best_model
        key = f"eval_{(name or '').removeprefix('eval_')}"
        if name is None or key in metrics or not any(k.startswith("eval_") for k in metrics):
            return {}
        logger.warning("this evaluation has no %s: it counts as no improvement", key)
        return {key: math.nan}

    def _held_out(self, eval_dataset: Any) -> list[PromptRow]:
        """The rows of a data set that can be evaluated on."""
        skipped = SkippedRows()
        rows = read_rows(self.args, eval_dataset, "eval_dataset", skipped)
        tokenizer, name = self.setup.tokenizer, "eval_dataset"
        usable = usable_rows(
            self.args,
            self.data,
            rows,
            tokenizer,
            name,
            skipped=skipped,
            instructed=self.setup.instructed.held_out,
        )
        bad = BadRows(name, self.args.on_bad_row, skipped)
        kept = scorable_places(usable.rows, self.scored_by.in_evaluations, bad)
        self.data.skipped.take(skipped)
        return [usable.rows[i] for i in kept]

    def complete_training_log(self, logs: dict[str, float], step: int) -> None:
        """Add all ranks' training metrics since the last log line, and look at them for alarms.

        Every rank has to call this.
        """
        logs |= self.engine.metrics.take(self.engine.sum_over_ranks)
        if self.ranks.is_rank_zero:
            self.alarms.training(logs, (step - 1) // self.directory.steps_per_round())

    @functools.cached_property
    def plan(self) -> RunPlan:
        """How much the run will do, and with what share of the data."""
        return plan_run(
            self.args,
            self.data.prompt_lengths,
            prompts_per_round=self.round_maker.num_groups,
            steps_per_round=self.directory.steps_per_round(),
        )

    def announce(self, callbacks: Sequence[TrainerCallback], done_steps: int) -> None:
        """Say what the run will do and which rows were left out, before anything is paid for."""
        if self.ranks.is_rank_zero:
            self.record_skipped()
            tell_plan(callbacks, self.plan, done_steps)
            tell_outlook(callbacks, self.outlook)

    def outlook(self, sampler: Sampler | None = None) -> list[str]:
        """What the run takes of memory and time, in lines; some seconds are measured.

        `sampler` draws from the current policy, for whoever has one; None makes one.
        """
        parts = (self.args, self.setup, self.data, self.policies, self.plan)
        return outlook(*parts, sharded=self.engine.sharded, sampler=sampler)

    def record_skipped(self) -> None:
        """List the rows that were left out in the run directory, and say how many there are."""
        if self.ranks.is_rank_zero:
            self.data.skipped.write(self.directory.path)

    def mean_loss(self, total: float, state: TrainerState) -> float:
        """The mean loss of a step since the run began, from this rank's sum. Every rank calls it.

        Trainer divides by the steps since the run was taken up last, where the sum goes back to the
        first; and what came after the last log line is this rank's alone.
        """
        here = torch.tensor(total, dtype=sum_dtype(self.engine.device), device=self.engine.device)
        mean = float(self.engine.sum_over_ranks(here)) / int(self.args.world_size)
        return mean / max(1, state.global_step)

    def record_start(self) -> None:
        """Write run.json, unless an earlier start of the run has."""
        names = [reward.name for reward in self.scored_by.rewards]
        data: dict[str, Any] = {"rows": len(self.data.rows), "sha256": self.data.fingerprints[0]}
        if self.data.skipped.count:
            data |= {"skipped_rows": self.data.skipped.count, "skipped_file": SKIPPED_FILE}
        if self.data.notices:
            data["notices"] = list(self.data.notices)
        if self.data.shortened:
            data["shortened_rows"] = self.data.shortened
        facts: dict[str, Any] = {"data": data, "plan": self.plan.to_json()}
        if self.scored_by.in_place is not None:
            facts["evaluated_by"] = [reward.name for reward in self.scored_by.in_place]
        facts |= judge_facts(self._everybody())
        facts["model"] = {**held_as(self.setup.model), **named_as(self.setup.model)}
        self.directory.record_start(names, facts)

    def run_key(self) -> dict[str, object]:
        """What this run may not change when it goes on. Raises ConfigError where nothing learns."""
        check_learns(self.setup.model)
        return self.made_from()

    def made_from(self) -> dict[str, object]:
        """Options that decide results, data, model, rewards, processes."""
        setup = self.setup
        pairs = [[pair.positive, pair.negative] for pair in setup.bank.pairs]
        template = [len(setup.tokenizer), setup.tokenizer.chat_template]
        return run_key(
            self.args,
            {
                "model": class_of(setup.model).__name__,
                "start weights": setup.start_fingerprint,
                **held_as(setup.model),
                "tokenizer": text_fingerprint(template),
                "instructions": text_fingerprint(pairs),
                "training data": self.data.fingerprints[0],
                "held-out data": self.data.fingerprints[1],
                "rewards": [[r.name, r.weight] for r in self.scored_by.rewards],
                "judges": [j.name for j in self.scored_by.judges],
                **self._evaluated_by(),
                **judge_facts(self._everybody()),
                "processes": self.args.world_size,
            },
        )

    def _everybody(self) -> tuple[NamedReward, ...]:
        scored_by = self.scored_by
        return (*scored_by.rewards, *scored_by.judges, *(scored_by.in_place or ()))

    def _evaluated_by(self) -> dict[str, object]:
        """What an evaluation calls the reward, where it is not what is trained on."""
        told = self.scored_by.in_place
        return {} if told is None else {"evaluated rewards": [[r.name, r.weight] for r in told]}


def compose(
    args: NEATConfig,
    data: TrainingData,
    setup: PolicySetup,
    scored_by: Rewards,
    *,
    accelerator: Accelerator,
    forward_backward: ForwardBackward,
    steps_per_round: Callable[[], int],
    on_open: Callable[[int], None],
    sampler: GivenSampler = None,
) -> TrainerParts:
    """The parts, once Trainer has made the accelerator."""
    _check_followed(args, data, scored_by)
    ranks = _ranks(args, accelerator)
    directory = RunDirectory(args, ranks, steps_per_round=steps_per_round, on_open=on_open)
    sharding = sharding_of(accelerator)
    policies = set_up_policies(args, setup, data, accelerator, sampler, ranks)
    return TrainerParts(
        args=args,
        data=data,
        setup=setup,
        scored_by=scored_by,
        ranks=ranks,
        directory=directory,
        policies=policies,
        engine=StepEngine(
            args,
            accelerator,
            forward_backward,
            layout=policies.layout,
            pad_token_id=policies.pad_token_id,
            reference=setup.reference,
            sharded=sharding != "none",
        ),
        round_maker=RoundMaker(
            args,
            data.rows,
            args.groups_per_round(len(data.rows)),
            policies=policies,
            tokenizer=setup.tokenizer,
            bank=setup.bank,
            rewards=scored_by.rewards,
            directory=directory,
            ranks=ranks,
        ),
        alarms=Alarms(args.alarm_logp_drop, args.alarm_ratio),
    )


def _ranks(args: NEATConfig, accelerator: Accelerator) -> Ranks:
    folder = Path(str(args.output_dir))
    wait_at_most(args.ddp_timeout)
    return Ranks(accelerator, StopRequest(), timeout=args.ddp_timeout, folder=folder)


def _check_followed(args: NEATConfig, data: TrainingData, scored_by: Rewards) -> None:
    judges = [judge.name for judge in scored_by.judges]
    names = metric_names(
        data.eval_rows,
        judges,
        rewards=[reward.name for reward in scored_by.evaluated],
        contrast=args.evaluate_contrast,
    )
    check_followed_metric(args, names)
