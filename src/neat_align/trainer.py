"""NEATTrainer: a `transformers.Trainer` in which one epoch is one NEAT round.

`on_epoch_begin` samples, scores and ranks this round's groups with the current policy and swaps
them into the training data; the epoch's iterator is made after that, so no batch is older than its
round. The stages themselves live in `expand`, `objective` and `evaluation` and know nothing of the
trainer.

Where this departs from a textbook Trainer: the loss of a micro-batch is divided by counts over the
whole optimizer step (`group_trainer`); a checkpoint counts only when its `COMPLETE.json` is
written, and a run goes on exactly (`durable_trainer`); evaluation samples from the policy instead
of computing a loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback, set_seed

from neat_align.config import NEATConfig
from neat_align.durable_trainer import LeaveCallback
from neat_align.errors import ConfigError, RunInterrupted
from neat_align.evaluation.drift_limits import drift_ratios, limit_passed, measure_drift
from neat_align.evaluation.held_out import EvalTools, Evaluation, evaluate_policy
from neat_align.files.atomic import read_json, write_json
from neat_align.group_trainer import GroupTrainer
from neat_align.modeling.layout import choose_layout
from neat_align.modeling.loading import load_policy, load_tokenizer
from neat_align.modeling.logprobs import score_completions
from neat_align.modeling.packing import Layout
from neat_align.modeling.precision import half_precision_copy
from neat_align.modeling.reference import start_policy
from neat_align.modeling.requirements import check_policy, check_trainable_weights, disable_dropout
from neat_align.prompts.instruction_banks import Polarity, load_bank
from neat_align.prompts.placement import instructed
from neat_align.prompts.rendering import eos_token_ids, prompt_ids
from neat_align.prompts.row_checks import as_rows, check_group_size, check_prompts
from neat_align.prompts.rows import Prompt, is_conversational
from neat_align.prompts.seeds import draw_pair
from neat_align.prompts.template_check import check_template
from neat_align.rewards.contrast import ContrastReward
from neat_align.rewards.http import check_http_hosts, check_tokens
from neat_align.rewards.protocol import NamedReward, RewardSpec
from neat_align.rewards.resolve import resolve_rewards
from neat_align.round_callback import RoundCallback, RoundDataset
from neat_align.rounds.make_round import make_round
from neat_align.rounds.params import RoundParams, RoundTools
from neat_align.rounds.ranking import ORIGIN_STEP, RankBy
from neat_align.rounds.round_files import (
    FinishedRound,
    next_position,
    read_round,
    set_aside_if_damaged,
)
from neat_align.runs.checkpoints import is_complete
from neat_align.runs.events import RunCallback, stage_reporter
from neat_align.runs.run_key import fingerprint, run_key, text_fingerprint, weights_fingerprint
from neat_align.runs.signals import interrupted
from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import BatchLimit, TransformersSampler

logger = logging.getLogger(__name__)


class NEATTrainer(GroupTrainer):
    """Train a causal language model with NEAT.

    Args:
        model: a `PreTrainedModel`, a PEFT model, or a name or path (loaded in fp32).
        reward_funcs: one or several of: the name of a shipped reward ("vader", "minilm_tone"), a
            server's URL, "contrast" (the policy's own log-probability under the positive against
            the negative instruction), "package.module:function", the name of a
            sequence-classification model, such a model, or `f(prompts, completions, completion_ids,
            **columns)`. May be None with `rank_by: origin`.
        args: a `NEATConfig`.
        train_dataset: a `datasets.Dataset` (or any iterable of rows) with `prompt`, or
            `prompt`/`chosen`/`rejected`. eval_dataset: held-out rows of the same form; `evaluate()`
            samples on their plain prompts. processing_class: the tokenizer; None loads the model's
            own. reward_processing_classes: a tokenizer per reward function, for reward models given
            as objects. callbacks, optimizers: as in `Trainer`. peft_config: a PEFT configuration;
            the adapter switched off is then the start policy. ref_model: the start policy for KL,
            dpo and npo; None is the adapter switched off, else a frozen copy of `model`.
            judge_funcs: rewards that evaluation reports and training never sees.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | torch.nn.Module,
        reward_funcs: RewardSpec | Sequence[RewardSpec] | None = None,
        args: NEATConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        ref_model: PreTrainedModel | torch.nn.Module | None = None,
        judge_funcs: RewardSpec | Sequence[RewardSpec] | None = None,
    ) -> None:
        args = NEATConfig(output_dir="neat-run") if args is None else args
        if train_dataset is None:
            raise ConfigError("NEATTrainer needs a train_dataset with prompts")
        self.rows = as_rows(train_dataset, "train_dataset")
        self.eval_rows = as_rows(eval_dataset, "eval_dataset") if eval_dataset is not None else []
        if args.num_eval_prompts is not None:
            self.eval_rows = self.eval_rows[: args.num_eval_prompts]
        policy = load_policy(model) if isinstance(model, str) else model
        tokenizer = load_tokenizer(policy, processing_class)
        self.bank = load_bank(args.instruction_bank)
        self.conversational = is_conversational(self.rows)
        if args.num_positive or args.num_negative:
            check_template(
                tokenizer, self.bank, args.instruction_placement, conversational=self.conversational
            )
        check_policy(policy, tokenizer, args.max_prompt_length, args.max_completion_length)
        check_group_size(self.rows, args)
        check_prompts(
            (*self.rows, *self.eval_rows),
            tokenizer,
            args.max_prompt_length,
            conversational=self.conversational,
        )
        self.given_reference = ref_model is not None and ref_model is not policy
        set_seed(args.seed)  # a new adapter is drawn at random
        self.reference, policy = start_policy(policy, peft_config, ref_model)
        if args.disable_dropout:
            disable_dropout(policy)
        check_trainable_weights(policy)
        self.rewards = self._resolve(
            reward_funcs, args.reward_weights, reward_processing_classes, args
        )
        self.judges = self._resolve(judge_funcs, None, None, args)
        functions = [r.function for r in (*self.rewards, *self.judges)]
        check_tokens(functions)
        check_http_hosts(args.allow_http_hosts, functions)
        if args.rank_by != "origin" and not self.rewards:
            raise ConfigError(
                f"rank_by is {args.rank_by} but reward_funcs is empty: give a reward function, or "
                "set rank_by: origin"
            )
        if args.rank_by == "origin_then_reward" and args.reward_margin >= ORIGIN_STEP:
            raise ConfigError(
                f"reward_margin is {args.reward_margin} and rank_by is origin_then_reward, which "
                "puts the best bad completion "
                f"{ORIGIN_STEP:g} below the worst good one: that would be no pair; set "
                f"reward_margin below {ORIGIN_STEP:g}"
            )
        self.start_run_state(args)
        self._start_fingerprint = weights_fingerprint(policy)
        self._room = BatchLimit()
        self.rounds = RoundDataset(min(args.prompts_per_round, len(self.rows)))
        self.last_evaluation: Evaluation | None = None
        super().__init__(
            model=policy,
            args=args,
            data_collator=self._collate,
            train_dataset=self.rounds,
            eval_dataset=cast("Any", self.eval_rows or None),
            processing_class=tokenizer,
            callbacks=[RoundCallback(self), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.layout = self._choose_layout()
        bars = [c for c in self.callback_handler.callbacks if isinstance(c, ProgressCallback)]
        if len(bars) > 1:  # a bar that was given stands in the place of Trainer's own
            self.remove_callback(next(c for c in bars if type(c) is ProgressCallback))
        self.add_callback(LeaveCallback(self))

    def _choose_layout(self) -> Layout:
        if self.args.prefix_sharing == "off":
            return "padded"
        if self.is_sharded or self.args.n_gpu > 1 or self.args.ddp_static_graph:
            logger.warning(
                "prompts are not shared between completions under FSDP, DeepSpeed, DataParallel "
                "and ddp_static_graph: padded rows are "
                "used, and under the first two max_tokens_per_micro_batch does not cut"
            )
            return "padded"
        prompts = [prompt_ids(self._tokenizer, row.prompt) for row in self.rows[:2]]
        longest = self.args.max_prompt_length + self.args.max_completion_length
        layout = choose_layout(
            self.policy, prompts, pad_token_id=self._tokenizer.pad_token_id, longest=longest
        )
        if layout == "packed" and self.given_reference:  # it is scored in the same layout
            with self.reference() as start:
                layout = choose_layout(
                    start, prompts, pad_token_id=self._tokenizer.pad_token_id, longest=longest
                )
        return layout

    # ---- what the stages are given ----

    @property
    def sampling_params(self) -> SamplingParams:
        """How completions are drawn."""
        return SamplingParams(
            self.args.max_completion_length, self.args.temperature, self.args.top_p, self.args.top_k
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the tokenizer's eos, the template's end of a turn, and the
        model's own list.
        """
        return eos_token_ids(self._tokenizer, self.policy, conversational=self.conversational)

    def _resolve(
        self,
        funcs: Any,
        weights: Sequence[float] | None,
        processing_classes: Any,
        args: NEATConfig,
    ) -> Any:
        if funcs is None:
            return ()
        given = list(funcs) if isinstance(funcs, list | tuple) else [funcs]
        contrast = ContrastReward(score=self._sum_logprobs, render=self._render)
        specs = [contrast if f == "contrast" else f for f in given]
        return resolve_rewards(
            specs,
            weights,
            processing_classes,
            timeout=args.reward_timeout,
            allow_http_hosts=args.allow_http_hosts,
        )

    def _sum_logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[float]:
        return [sum(row) for row in self._policy_logprobs(prompts, completions)]

    def _with_fixed_contrast(self, reward: NamedReward) -> NamedReward:
        """In an evaluation the start policy judges: a judge that moves with the policy would
        compare two different scores.
        """
        if not isinstance(reward.function, ContrastReward):
            return reward

        def score(
            prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
        ) -> list[float]:
            return [sum(row) for row in self._ref_logprobs(prompts, completions)]

        return replace(reward, function=replace(reward.function, score=score))

    def _render(self, prompt: Prompt, polarity: Polarity) -> list[int]:
        pair = draw_pair(self.bank, run_seed=self.args.seed, round_index=0, prompt_id=str(prompt))
        instruction = pair.positive if polarity == "positive" else pair.negative
        return prompt_ids(
            self._tokenizer, *instructed(prompt, instruction, self.args.instruction_placement)
        )

    def _score_with(
        self, model: torch.nn.Module, prompts: Any, completions: Any
    ) -> list[tuple[float, ...]]:
        return score_completions(
            model,
            prompts,
            completions,
            layout=self.layout,
            pad_token_id=self._tokenizer.pad_token_id,
            autocast_dtype=self.autocast_dtype,
        )

    def _policy_logprobs(self, prompts: Any, completions: Any) -> list[tuple[float, ...]]:
        return self._score_with(self.policy, prompts, completions)

    def _ref_logprobs(self, prompts: Any, completions: Any) -> list[tuple[float, ...]]:
        with self.reference() as model:
            return self._score_with(model, prompts, completions)

    def _sampler(self, model: torch.nn.Module) -> TransformersSampler:
        dtype, copied = self.autocast_dtype, self.args.generation_copy
        if dtype is not None and (
            copied == "always" or (copied == "auto" and self.args.device.type == "cpu")
        ):
            model, dtype = half_precision_copy(model, dtype), None
        return TransformersSampler(
            model,
            self.eos_token_ids,
            self._tokenizer.pad_token_id,
            self.args.generation_batch_size,
            dtype,
            self._room,
        )

    def _start_sampler(self) -> Sampler:
        """Draws from the start policy. A half-precision copy of it is made once a round, not once a
        shard.
        """
        with self.reference() as model:
            sampler = self._sampler(model)
            return _StartSampler(self) if sampler.model is model else sampler

    def round_params(self) -> RoundParams:
        """What a round is made of, from the configuration."""
        a = self.args
        return RoundParams(
            seed=a.seed,
            num_positive=a.num_positive,
            num_negative=a.num_negative,
            num_plain=a.num_plain,
            use_human_completions=a.use_human_completions,
            placement=a.instruction_placement,
            sampling=self.sampling_params,
            rank_by=cast("RankBy", a.rank_by),
            negative_source=cast("Literal['instruction', 'other_prompts']", a.negative_source),
            reward_margin=a.reward_margin,
            max_prompt_length=a.max_prompt_length,
            min_pair_fraction=a.min_pair_fraction,
        )

    def eval_tools(self, *, with_reference: bool) -> EvalTools:
        """Who samples and judges in an evaluation of the current policy."""
        return EvalTools(
            model=self.policy,
            tokenizer=self._tokenizer,
            sampler=self._sampler(self.policy),
            rewards=tuple(map(self._with_fixed_contrast, self.rewards)),
            judges=tuple(map(self._with_fixed_contrast, self.judges)),
            bank=self.bank,
            placement=self.args.instruction_placement,
            sampling=self.sampling_params,
            layout=self.layout,
            pad_token_id=self._tokenizer.pad_token_id,
            autocast_dtype=self.autocast_dtype,
            reference=self.reference if with_reference else None,
        )

    # ---- rounds ----

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps in a round."""
        groups_per_step = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        return -(-len(self.rounds) // int(groups_per_step))

    def at_round_end(self) -> bool:
        """Whether the last step was a round's last."""
        return int(self.state.global_step) % self.steps_per_round == 0

    def make_round(self, index: int) -> FinishedRound:
        """Sample, score and rank a round with the current policy, or read it when it is finished on
        disk.
        """
        position = next_position(self.round_folder(index - 1)) if index > 0 else 0
        if position is None:
            raise ConfigError(
                f"round {index - 1} is missing under {self.output_dir / 'rounds'}: it says which "
                "prompts come next"
            )
        # Before the first step both policies are one: the same function, so that it runs once.
        first = self.state.global_step == 0
        ref = self._ref_logprobs if first or self.args.needs_reference else None
        policy = ref if first and not self.given_reference else self._policy_logprobs
        folder = self.round_folder(index)

        def work() -> None:
            with stage_reporter(self.callback_handler.callbacks, f"round {index + 1}") as progress:
                sampler = self._sampler(self.policy)
                tools = RoundTools(
                    tokenizer=self._tokenizer,
                    bank=self.bank,
                    rewards=self.rewards,
                    sampler=sampler,
                    negative_sampler=sampler
                    if self.args.negative_policy == "current"
                    else self._start_sampler(),
                    policy_logprobs=policy,
                    ref_logprobs=ref,
                    shard_size=self.args.generation_batch_size,
                    between_shards=lambda: self._leave_alone(
                        f"in round {index + 1}; its finished answers and scores are kept"
                    ),
                )
                make_round(
                    self.rows,
                    num_groups=len(self.rounds),
                    position=position,
                    round_index=index,
                    params=self.round_params(),
                    tools=tools,
                    folder=folder,
                    progress=progress,
                )

        self.on_main(work, f"in round {index + 1}; its finished answers and scores are kept")
        made = read_round(folder)
        assert made is not None
        return made

    def _leave_alone(self, where: str) -> None:
        """Raise RunInterrupted when this process was asked to stop, whatever the others do."""
        if self.stop.signal_number:
            raise interrupted(
                self.stop.signal_number, where, show=bool(self.accelerator.is_main_process)
            )

    def begin_training(self) -> None:
        """Measure the start before the first step; a resumed run has it on disk."""
        self.restore_bookmark()
        step = self.state.global_step
        if step == 0:
            self.measure_start()
        elif (
            step % self.steps_per_round == 0
            and self.rounds_ended < step // self.steps_per_round
            and self._bookmark is not None
        ):
            self.end_round()  # a callback asked for this checkpoint before the round's end

    def begin_round(self) -> None:
        """Make this round's groups and swap them into the training data."""
        step = self.state.global_step
        index = step // self.steps_per_round
        if step % self.steps_per_round == 0:
            # Only now is the policy the one that a damaged round would be made again with.
            self.on_main(
                lambda: set_aside_if_damaged(self.round_folder(index)), f"before round {index + 1}"
            )
        try:
            self.leave_if_asked(f"before round {index + 1}")
            made = self.make_round(index)
            self.leave_if_asked(f"after round {index + 1} was made")
        except RunInterrupted:
            # The policy that samples, unless it is the start policy, or saved.
            if step and not is_complete(self.output_dir / f"checkpoint-{step}"):
                self._save_checkpoint(self.model, None)
            raise
        if len(made.groups) < len(self.rounds):
            logger.warning(
                "round %d has %d groups with a pair for %d places: it is gone through again from "
                "its start",
                index + 1,
                len(made.groups),
                len(self.rounds),
            )
        self.rounds.groups = made.groups
        if self.state.global_step % self.steps_per_round == 0:
            self.log({"round": float(index), **made.metrics})
            if self.accelerator.is_main_process:
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, RunCallback):
                        callback.on_round_made(index, made.groups)

    def _drift(self) -> dict[str, float]:
        tools = replace(self.eval_tools(with_reference=True), rewards=(), judges=())
        return measure_drift(self.rows, tools, seed=self.args.seed, prompts=self.args.drift_prompts)

    def measure_start(self) -> None:
        """The start's entropy, variety and length, which rounds are compared with; read where it
        was measured before.
        """
        if not self.args.drift_prompts:
            return
        start_file = self.output_dir / "drift-start.json"
        facts = read_json(start_file) if start_file.is_file() else self._drift()
        if self.accelerator.is_main_process and not start_file.is_file():
            write_json(start_file, facts)
        self.log({f"drift/{k}": v for k, v in facts.items()})

    def end_round(self) -> bool:
        """Measure drift on plain samples; True when a limit was passed and training should stop."""
        self.rounds_ended = self.state.global_step // self.steps_per_round
        if not self.args.drift_prompts:
            return False
        facts, start = self._drift(), read_json(self.output_dir / "drift-start.json")
        facts |= drift_ratios(facts, start)
        self.log({f"drift/{k}": v for k, v in facts.items()})
        if self.accelerator.is_main_process:
            self.alarms.drift(facts, start, max(0, self.rounds_ended - 1))
        self.stopped_because = limit_passed(
            facts, max_kl=self.args.max_kl, min_distinct2_ratio=self.args.min_distinct2_ratio
        )
        if self.stopped_because is not None:
            logger.warning("stopping after this round: %s", self.stopped_because)
        return self.stopped_because is not None

    def run_key(self) -> dict[str, Any]:
        """What this run may not change when it goes on: options that decide results, data, model,
        rewards, processes.
        """
        return run_key(
            self.args,
            {
                "model": type(self.policy).__name__,
                "start weights": self._start_fingerprint,
                "tokenizer": text_fingerprint(
                    [len(self._tokenizer), self._tokenizer.chat_template]
                ),
                "instructions": text_fingerprint(
                    [[pair.positive, pair.negative] for pair in self.bank.pairs]
                ),
                "training data": fingerprint(self.rows),
                "held-out data": fingerprint(self.eval_rows),
                "rewards": [[r.name, r.weight] for r in self.rewards],
                "judges": [j.name for j in self.judges],
                "processes": self.args.world_size,
            },
        )

    # ---- Trainer's entry points ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Sample and judge the current policy on held-out rows (plain prompt); `last_evaluation`
        keeps the whole of it.
        """
        if ignore_keys is not None:
            raise ConfigError(
                "ignore_keys has no meaning in NEATTrainer.evaluate: it samples instead of "
                "collecting outputs"
            )
        rows = as_rows(eval_dataset, "eval_dataset") if eval_dataset is not None else self.eval_rows
        if not rows:
            raise ConfigError(
                "there is nothing to evaluate on: pass an eval_dataset with held-out prompts"
            )
        with stage_reporter(self.callback_handler.callbacks, "evaluate") as report:

            def progress(stage: str, finished: int, total: int) -> None:
                report(stage, finished, total)
                if not self.is_in_train:  # there, it is finished first: a checkpoint comes next
                    self._leave_alone("in an evaluation, which is made again")

            self.last_evaluation = evaluate_policy(
                rows,
                self.eval_tools(with_reference=self.state.global_step > 0),
                seed=self.args.seed,
                samples_per_prompt=self.args.num_eval_generations,
                contrast=self.args.evaluate_contrast,
                progress=progress,
            )
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.last_evaluation.summary().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


@dataclass(frozen=True)
class _StartSampler:
    """Draws from the start policy, which is opened only while it draws: an adapter must be on for
    everything else.
    """

    trainer: NEATTrainer

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """One `Sample` a request, in order."""
        with self.trainer.reference() as model:
            return self.trainer._sampler(model).sample(requests, params, progress=progress)
