"""What a trainer is composed of. Each part stands in its own room and can be used alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator
from transformers import TrainerCallback

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError
from neat_align.evaluation.drift_monitor import DriftMonitor
from neat_align.evaluation.held_out import EvalTools, Evaluation, evaluate_policy
from neat_align.learning.alarms import Alarms
from neat_align.learning.step_engine import ForwardBackward, StepEngine
from neat_align.modeling.packing import Layout
from neat_align.prompts.rendering import eos_token_ids
from neat_align.prompts.rows import PromptRow
from neat_align.runs.events import stage_reporter
from neat_align.runs.ranks import Ranks
from neat_align.runs.run_directory import RunDirectory
from neat_align.runs.run_key import fingerprint, run_key, text_fingerprint
from neat_align.runs.signals import StopRequest
from neat_align.sampling.policies import Policies
from neat_align.trainer.round_maker import RoundMaker, sampling_params
from neat_align.trainer.setup import (
    PolicySetup,
    Rewards,
    TrainingData,
    autocast_dtype,
    first_prompts,
    judged_by_start,
    layout_for,
)


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
    def drift(self) -> DriftMonitor:
        """Measures drift of the current policy on the training data's prompts."""
        start_file = self.directory.path / "drift-start.json"
        return DriftMonitor(self.args, self.data.rows, self._drift_tools, start_file)

    def _drift_tools(self) -> EvalTools:
        return replace(self.eval_tools(with_reference=True), rewards=(), judges=())

    def eval_tools(self, *, with_reference: bool) -> EvalTools:
        """Who samples and judges in an evaluation of the current policy."""
        policies = self.policies
        return EvalTools(
            model=policies.model,
            tokenizer=self.setup.tokenizer,
            sampler=policies.sampler(),
            rewards=judged_by_start(self.scored_by.rewards, policies.start_sum_logprobs),
            judges=judged_by_start(self.scored_by.judges, policies.start_sum_logprobs),
            bank=self.setup.bank,
            placement=self.args.instruction_placement,
            sampling=sampling_params(self.args),
            layout=policies.layout,
            pad_token_id=policies.pad_token_id,
            autocast_dtype=policies.autocast_dtype,
            reference=policies.reference if with_reference else None,
        )

    def evaluate(
        self,
        rows: Sequence[PromptRow],
        callbacks: Sequence[TrainerCallback],
        *,
        is_start: bool,
        may_stop: bool,
    ) -> Evaluation:
        """Sample and judge the current policy on held-out rows (plain prompt).

        `is_start`: no optimizer step has been made, so there is no KL to measure. `may_stop`: a
        signal ends it at once; within training it is finished first, since a checkpoint comes next.
        """
        if not rows:
            raise ConfigError(
                "there is nothing to evaluate on: pass an eval_dataset with held-out prompts"
            )
        with stage_reporter(callbacks, "evaluate") as report:

            def progress(stage: str, finished: int, total: int) -> None:
                report(stage, finished, total)
                if may_stop:
                    where = "in an evaluation, which is made again"
                    self.ranks.raise_if_this_rank_must_stop(where)

            return evaluate_policy(
                rows,
                self.eval_tools(with_reference=not is_start),
                seed=self.args.seed,
                samples_per_prompt=self.args.num_eval_generations,
                contrast=self.args.evaluate_contrast,
                progress=progress,
            )

    def complete_training_log(self, logs: dict[str, float], step: int) -> None:
        """Add the training metrics since the last log line, and look at them for alarms."""
        logs |= self.engine.metrics.take()
        if self.ranks.is_rank_zero:
            self.alarms.training(logs, (step - 1) // self.directory.steps_per_round())

    def record_start(self) -> None:
        """Write run.json, unless an earlier start of the run has."""
        names = [reward.name for reward in self.scored_by.rewards]
        self.directory.record_start(self.data.rows, names)

    def run_key(self) -> dict[str, object]:
        """What this run may not change when it goes on: options that decide results, data, model,
        rewards, processes.
        """
        setup = self.setup
        pairs = [[pair.positive, pair.negative] for pair in setup.bank.pairs]
        template = [len(setup.tokenizer), setup.tokenizer.chat_template]
        return run_key(
            self.args,
            {
                "model": type(setup.model).__name__,
                "start weights": setup.start_fingerprint,
                "tokenizer": text_fingerprint(template),
                "instructions": text_fingerprint(pairs),
                "training data": fingerprint(self.data.rows),
                "held-out data": fingerprint(self.data.eval_rows),
                "rewards": [[r.name, r.weight] for r in self.scored_by.rewards],
                "judges": [j.name for j in self.scored_by.judges],
                "processes": self.args.world_size,
            },
        )


def compose(
    args: NEATConfig,
    data: TrainingData,
    setup: PolicySetup,
    scored_by: Rewards,
    *,
    accelerator: Accelerator,
    forward_backward: ForwardBackward,
    sharded: bool,
    num_groups: int,
    steps_per_round: Callable[[], int],
) -> TrainerParts:
    """The parts, once Trainer's constructor has made the accelerator.

    `num_groups` is groups per round, `sharded` whether ranks hold parts of the weights.
    """
    ranks = Ranks(accelerator, StopRequest())
    directory = RunDirectory(args, ranks, steps_per_round=steps_per_round)
    layout = layout_for(args, setup, data, sharded=sharded)
    policies = _policies(args, setup, layout, conversational=data.conversational)
    policies.settle_sampling(first_prompts(setup, data))
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
            layout=layout,
            pad_token_id=policies.pad_token_id,
            sharded=sharded,
        ),
        round_maker=RoundMaker(
            args,
            data.rows,
            num_groups,
            policies=policies,
            tokenizer=setup.tokenizer,
            bank=setup.bank,
            rewards=scored_by.rewards,
            directory=directory,
            ranks=ranks,
        ),
        alarms=Alarms(args.alarm_logp_drop, args.alarm_ratio),
    )


def _policies(
    args: NEATConfig, setup: PolicySetup, layout: Layout, *, conversational: bool
) -> Policies:
    dtype = autocast_dtype(args)
    on_cpu = args.device.type == "cpu"
    copies = args.generation_copy == "always" or (args.generation_copy == "auto" and on_cpu)
    return Policies(
        model=setup.model,
        reference=setup.reference,
        layout=layout,
        eos_token_ids=eos_token_ids(setup.tokenizer, setup.model, conversational=conversational),
        pad_token_id=setup.tokenizer.pad_token_id,
        batch_size=args.generation_batch_size,
        autocast_dtype=dtype,
        copy_dtype=dtype if copies else None,
    )
