"""NEATTrainer: a `transformers.Trainer` in which one epoch is one NEAT round.

`on_epoch_begin` samples, scores and ranks this round's groups with the current policy and swaps them into the training
data; the epoch's iterator is made after that, so no batch is older than its round. The stages themselves live in
`expand`, `objective` and `evaluation` and know nothing of the trainer.

Where this departs from a textbook Trainer: the loss of a micro-batch is divided by counts over the *whole* optimizer
step (all micro-batches, all processes), so accumulation and uneven groups do not change the gradient; evaluation
samples from the policy instead of computing a loss; a checkpoint counts only when its `COMPLETE.json` is written.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback, set_seed

from neat_align.browse import render_group
from neat_align.checkpoints import newest_complete
from neat_align.config import NEATConfig
from neat_align.data import PromptRow, is_conversational, rows_from_dataset
from neat_align.drift import drift_ratios, limit_passed, measure_drift
from neat_align.errors import CollapseError, ConfigError
from neat_align.evaluation import EvalTools, Evaluation, evaluate_policy
from neat_align.expand import ExpandParams, ExpandTools, Round, expand, read_round
from neat_align.groups import CompletionGroup, Polarity, Prompt, RankBy, best_index, extremes, kept_completions, rank_keys
from neat_align.logprobs import choose_layout, completion_logprobs, score_completions
from neat_align.objective import total_loss
from neat_align.packing import GroupBatch, Layout, collate_groups, fill_budget, padding_fraction, tokens_in
from neat_align.policy import check_policy, disable_dropout, load_policy, load_tokenizer, start_policy
from neat_align.precision import autocast, check_trainable_weights, half_precision_copy
from neat_align.preflight import check_group_size, check_prompts
from neat_align.progress import RoundProgressCallback, stage_bars
from neat_align.prompts import check_template, draw_pair, eos_token_ids, instructed, load_bank, prompt_ids
from neat_align.rewards import ContrastReward, NamedReward, RewardSpec, check_tokens, resolve_rewards
from neat_align.round_callback import RoundCallback, RoundDataset
from neat_align.run_record import write_run_record
from neat_align.sampling import Sample, SampleRequest, SamplingParams, TransformersSampler
from neat_align.shared_prefix import sharing_prefixes
from neat_align.step_loss import LossCounts, counts_of, loss_terms, objective_params, ranking_facts
from neat_align.storage import read_json, write_json

logger = logging.getLogger(__name__)

# Groups that `log_completions` prints every round.
SHOWN_GROUPS = 2


class NEATTrainer(Trainer):
    """Train a causal language model with NEAT.

    Args:
        model: a `PreTrainedModel`, a PEFT model, or a name or path (loaded in fp32).
        reward_funcs: one or several of: the name of a shipped reward ("vader", "minilm_tone"), a server's URL, "contrast" (the policy's own
            log-probability under the positive against the negative instruction), "package.module:function", the name of a
            sequence-classification model, such a model, or `f(prompts, completions, completion_ids, **columns)`.
            May be None with `rank_by: origin`.
        args: a `NEATConfig`.
        train_dataset: a `datasets.Dataset` (or any iterable of rows) with `prompt`, or `prompt`/`chosen`/`rejected`.
        eval_dataset: held-out rows of the same form; `evaluate()` samples on their plain prompts.
        processing_class: the tokenizer; None loads the model's own.
        reward_processing_classes: a tokenizer per reward function, for reward models given as objects.
        callbacks, optimizers: as in `Trainer`.
        peft_config: a PEFT configuration; the adapter switched off is then the start policy.
        ref_model: the start policy for KL, dpo and npo; None is the adapter switched off, else a frozen copy of `model`.
        judge_funcs: rewards that evaluation reports and training never sees.
    """

    args: NEATConfig
    # The loss is divided by counts over the whole optimizer step, so Trainer must not divide it by the accumulation steps.
    loss_is_scaled_for_ga = True

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
        self.rows = _as_rows(train_dataset, "train_dataset")
        self.eval_rows = _as_rows(eval_dataset, "eval_dataset") if eval_dataset is not None else []
        if args.num_eval_prompts is not None:
            self.eval_rows = self.eval_rows[: args.num_eval_prompts]
        policy = load_policy(model) if isinstance(model, str) else model
        tokenizer = load_tokenizer(policy, processing_class)
        self.bank = load_bank(args.instruction_bank)
        self.conversational = is_conversational(self.rows)
        if args.num_positive or args.num_negative:
            check_template(tokenizer, self.bank, args.instruction_placement, conversational=self.conversational)
        check_policy(policy, tokenizer, args.max_prompt_length, args.max_completion_length)
        check_group_size(self.rows, args)
        check_prompts((*self.rows, *self.eval_rows), tokenizer, args.max_prompt_length, conversational=self.conversational)
        self.given_reference = ref_model is not None and ref_model is not policy
        set_seed(args.seed)  # a new adapter is drawn at random
        self.reference, policy = start_policy(policy, peft_config, ref_model)
        if args.disable_dropout:
            disable_dropout(policy)
        check_trainable_weights(policy)
        self.rewards = self._resolve(reward_funcs, args.reward_weights, reward_processing_classes, args.reward_timeout)
        self.judges = self._resolve(judge_funcs, None, None, args.reward_timeout)
        check_tokens([r.function for r in (*self.rewards, *self.judges)])
        if args.rank_by != "origin" and not self.rewards:
            raise ConfigError(f"rank_by is {args.rank_by} but reward_funcs is empty: give a reward function, or set rank_by: origin")
        self.objective_params = objective_params(args)
        self.rounds = RoundDataset(min(args.prompts_per_round, len(self.rows)))
        self.last_evaluation: Evaluation | None = None
        self.stopped_because: str | None = None
        self._sums: dict[str, list[float]] = {}
        self.logged_step = 0
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
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RoundProgressCallback())

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _choose_layout(self) -> Layout:
        if self.args.prefix_sharing == "off":
            return "padded"
        if self._is_sharded or self.args.n_gpu > 1 or self.args.ddp_static_graph:
            logger.warning(
                "prompts are not shared between completions under FSDP, DeepSpeed, DataParallel and ddp_static_graph: padded rows are "
                "used, and under the first two max_tokens_per_micro_batch does not cut"
            )
            return "padded"
        prompts = [prompt_ids(self._tokenizer, row.prompt) for row in self.rows[:2]]
        longest = self.args.max_prompt_length + self.args.max_completion_length
        layout = choose_layout(self.policy, prompts, pad_token_id=self._tokenizer.pad_token_id, longest=longest)
        if layout == "packed" and self.given_reference:  # it is scored in the same layout
            with self.reference() as start:
                layout = choose_layout(start, prompts, pad_token_id=self._tokenizer.pad_token_id, longest=longest)
        return layout

    # ---- what the stages are given ----

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type that forward passes compute in; None is the weights' own."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    @property
    def sampling_params(self) -> SamplingParams:
        """How completions are drawn."""
        return SamplingParams(self.args.max_completion_length, self.args.temperature, self.args.top_p, self.args.top_k)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the tokenizer's eos, the template's end of a turn, and the model's own list."""
        return eos_token_ids(self._tokenizer, self.policy, conversational=self.conversational)

    @property
    def _tokenizer(self) -> Any:
        return self.processing_class

    @property
    def policy(self) -> torch.nn.Module:
        """The model that learns, without any wrapper of accelerate."""
        return cast("torch.nn.Module", self.model)

    def _resolve(self, funcs: Any, weights: Sequence[float] | None, processing_classes: Any, timeout: float | None) -> Any:
        if funcs is None:
            return ()
        given = list(funcs) if isinstance(funcs, list | tuple) else [funcs]
        contrast = ContrastReward(score=self._sum_logprobs, render=self._render)
        specs = [contrast if f == "contrast" else f for f in given]
        return resolve_rewards(specs, weights, processing_classes, timeout=timeout)

    def _sum_logprobs(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        return [sum(row) for row in self._policy_logprobs(prompts, completions)]

    def _with_fixed_contrast(self, reward: NamedReward) -> NamedReward:
        """In an evaluation the start policy judges: a judge that moves with the policy would compare two different scores."""
        if not isinstance(reward.function, ContrastReward):
            return reward

        def score(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
            return [sum(row) for row in self._ref_logprobs(prompts, completions)]

        return replace(reward, function=replace(reward.function, score=score))

    def _render(self, prompt: Prompt, polarity: Polarity) -> list[int]:
        pair = draw_pair(self.bank, run_seed=self.args.seed, round_index=0, prompt_id=str(prompt))
        instruction = pair.positive if polarity == "positive" else pair.negative
        return prompt_ids(self._tokenizer, *instructed(prompt, instruction, self.args.instruction_placement))

    def _score_with(self, model: torch.nn.Module, prompts: Any, completions: Any) -> list[tuple[float, ...]]:
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
        if dtype is not None and (copied == "always" or (copied == "auto" and self.args.device.type == "cpu")):
            model, dtype = half_precision_copy(model, dtype), None
        return TransformersSampler(model, self.eos_token_ids, self._tokenizer.pad_token_id, self.args.generation_batch_size, dtype)

    def expand_params(self) -> ExpandParams:
        """What a round is made of, from the configuration."""
        a = self.args
        return ExpandParams(
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
    def output_dir(self) -> Path:
        """The run directory."""
        return Path(str(self.args.output_dir))

    def round_folder(self, index: int) -> Path:
        """Where a round lives."""
        return self.output_dir / "rounds" / f"{index:05d}"

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps in a round."""
        groups_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return -(-len(self.rounds) // int(groups_per_step))

    def make_round(self, index: int) -> Round:
        """Sample, score and rank a round with the current policy, or read it when it is finished on disk."""
        position = 0
        if index > 0:
            previous = read_round(self.round_folder(index - 1))
            if previous is None:
                raise ConfigError(f"round {index - 1} is missing under {self.output_dir / 'rounds'}: it says which prompts come next")
            position = previous.next_position
        # Before the first step both policies are one: the same function, so that it runs once.
        first = self.state.global_step == 0
        ref = self._ref_logprobs if first or self.args.needs_reference else None
        policy = ref if first and not self.given_reference else self._policy_logprobs
        folder = self.round_folder(index)
        if self.accelerator.is_main_process:
            with stage_bars(f"round {index + 1}", bool(self.args.disable_tqdm)) as progress:
                sampler = self._sampler(self.policy)
                tools = ExpandTools(
                    tokenizer=self._tokenizer,
                    bank=self.bank,
                    rewards=self.rewards,
                    sampler=sampler,
                    negative_sampler=sampler if self.args.negative_policy == "current" else _StartSampler(self),
                    policy_logprobs=policy,
                    ref_logprobs=ref,
                )
                expand(
                    self.rows,
                    num_groups=len(self.rounds),
                    position=position,
                    round_index=index,
                    params=self.expand_params(),
                    tools=tools,
                    folder=folder,
                    progress=progress,
                )
        self.accelerator.wait_for_everyone()
        made = read_round(folder)
        assert made is not None
        return made

    def begin_training(self) -> None:
        """Measure the start before the first step; a resumed run has it on disk."""
        self.logged_step = self.state.global_step
        if self.state.global_step == 0:
            self.end_round()

    def begin_round(self) -> None:
        """Make this round's groups and swap them into the training data."""
        index = self.state.global_step // self.steps_per_round
        made = self.make_round(index)
        if len(made.groups) < len(self.rounds):
            logger.warning(
                "round %d has %d groups with a pair for %d places: it is gone through again from its start",
                index + 1,
                len(made.groups),
                len(self.rounds),
            )
        self.rounds.groups = made.groups
        if self.state.global_step % self.steps_per_round == 0:
            self.log({"round": float(index), **made.metrics})
            if self.args.log_completions and self.accelerator.is_main_process:
                for number, group in enumerate(made.groups[:SHOWN_GROUPS], start=1):
                    Console().print(render_group(group, number, len(made.groups)))

    def end_round(self) -> bool:
        """Measure drift on plain samples; True when a limit was passed and training should stop."""
        if not self.args.drift_prompts:
            return False
        tools = replace(self.eval_tools(with_reference=True), rewards=(), judges=())
        facts = measure_drift(self.rows, tools, seed=self.args.seed, prompts=self.args.drift_prompts)
        start_file = self.output_dir / "drift-start.json"
        if not start_file.is_file():  # the baseline is measured before the first step and kept for resumed runs
            if self.accelerator.is_main_process:
                write_json(start_file, facts)
            self.log({f"drift/{k}": v for k, v in facts.items()})
            return False
        facts |= drift_ratios(facts, read_json(start_file))
        self.log({f"drift/{k}": v for k, v in facts.items()})
        self.stopped_because = limit_passed(facts, max_kl=self.args.max_kl, min_distinct2_ratio=self.args.min_distinct2_ratio)
        if self.stopped_because is not None:
            logger.warning("stopping after this round: %s", self.stopped_because)
        return self.stopped_because is not None

    # ---- loss ----

    def _collate(self, groups: list[CompletionGroup]) -> dict[str, list[GroupBatch]]:
        """Groups as micro-batches under the token budget."""
        groups = [self.trained_part(g) for g in groups]
        sizes = [tokens_in(len(g.prompt_ids), [len(c.token_ids) for c in g.completions], self.layout) for g in groups]
        # Sharded models step in lockstep: one forward pass on every rank.
        budget = sum(sizes) if self._is_sharded else self.args.max_tokens_per_micro_batch
        bins = fill_budget(sizes, budget)
        return {"groups": [self._batch([groups[i] for i in members]) for members in bins]}

    def trained_part(self, group: CompletionGroup) -> CompletionGroup:
        """The group without completions that no term of the loss reads."""
        a = self.args
        only_lm = a.ranking_loss == "none" and a.negative_penalty == "none" and a.kl_weight == 0
        if a.pair_selection == "all" and not only_lm:
            return group
        keys = rank_keys(group, cast("RankBy", a.rank_by))
        best = best_index(group, keys, allow_bad_origins=a.lm_on_bad_origins, allow_cut=a.lm_on_cut_completions) if a.lm_weight else None
        pair = extremes(keys, a.reward_margin) if a.pair_selection == "best_worst" else None
        return kept_completions(group, (best, *(pair or ())))

    def _batch(self, groups: Sequence[CompletionGroup]) -> GroupBatch:
        return collate_groups(
            groups,
            pad_token_id=self._tokenizer.pad_token_id,
            rank_by=cast("RankBy", self.args.rank_by),
            lm_on_bad_origins=self.args.lm_on_bad_origins,
            lm_on_cut=self.args.lm_on_cut_completions,
            layout=self.layout,
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The step's batches, and what its loss terms are divided by (in the place of Trainer's token count)."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, self.count([batch for s in samples for batch in s["groups"]])

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over the micro-batches of one accumulation step, one after the other."""
        batches: list[GroupBatch] = inputs["groups"]
        losses = []
        for batch in batches:
            with contextlib.ExitStack() as opened:
                if batch is not batches[-1]:
                    opened.enter_context(self.accelerator.no_sync(model))
                if self.layout == "packed":
                    # Over the backward pass too: gradient checkpointing runs the attention again there.
                    opened.enter_context(sharing_prefixes(model))
                losses.append(super().training_step(model, {"groups": batch}, num_items_in_batch))
        return torch.stack(losses).sum()

    def count(self, batches: Sequence[GroupBatch]) -> LossCounts:
        """Counts over these micro-batches and over all processes."""
        counts = counts_of(batches, self.objective_params)
        if self.args.world_size > 1:
            counts = cast("Tensor", self.accelerator.reduce(counts.to(self.args.device), reduction="sum"))
        return LossCounts(*counts.clamp(min=1).tolist())

    def compute_loss(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one micro-batch, already scaled to its share of the whole step."""
        if return_outputs:
            raise ValueError("NEATTrainer has no model outputs to return: use completion_logprobs")
        b: GroupBatch = inputs["groups"]
        counts = num_items_in_batch if isinstance(num_items_in_batch, LossCounts) else self.count([b])
        # Accelerate puts autocast around the model; packed rows run the head outside of it.
        with autocast(self.args.device.type, self.autocast_dtype):
            logps = completion_logprobs(model, b.rows)
        p = self.objective_params
        terms = loss_terms(b, logps, counts, p)
        loss = total_loss(terms, lm_weight=p.lm_weight, negative_weight=p.negative_weight, kl_weight=p.kl_weight)
        if not bool(torch.isfinite(loss)):
            raise CollapseError(
                f"the loss is {float(loss.detach())} at step {self.state.global_step + 1}, before the optimizer step; the last "
                "checkpoint is untouched. Look at the learning rate and at the rewards of this round"
            )
        for name in ("ranking", "lm", "negative", "kl"):
            # Micro-batches carry shares of one step's loss: they add up, and are divided by the steps when logged.
            self._add(f"loss/{name}", float(getattr(terms, name).detach()), 0.0)
        for fact in ranking_facts(b, logps, p):
            self._add(*fact)
        self._add("packing/padding_fraction", padding_fraction(b.rows))
        self._add("packing/tokens_per_micro_batch", float(b.rows.input_ids.numel()))
        # Processes average their gradients; the counts are global, so the shares have to be summed.
        return loss * self.args.world_size

    def check_gradients(self) -> None:
        """Raise CollapseError when a gradient is not finite, before the optimizer step."""
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            return  # fp16's loss scaling expects overflows and skips such steps itself
        for name, p in self.policy.named_parameters():
            if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                raise CollapseError(
                    f"the gradient of {name} is not finite at step {self.state.global_step + 1}; no weight was changed by it"
                )

    # ---- metrics ----

    def _add(self, name: str, value: float, weight: float = 1.0) -> None:
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += value
        entry[1] += weight

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the training metrics gathered since the last training log added to it."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - self.logged_step)
            for name, (value, weight) in self._sums.items():
                if weight == 0 and name.startswith("loss/"):
                    logs[name] = value / steps
                elif weight > 0:
                    logs[name] = value / weight
            self._sums, self.logged_step = {}, self.state.global_step
        super().log(logs, start_time)

    # ---- Trainer's entry points ----

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Sample and judge the current policy on held-out rows (plain prompt); `last_evaluation` keeps the whole of it."""
        if ignore_keys is not None:
            raise ConfigError("ignore_keys has no meaning in NEATTrainer.evaluate: it samples instead of collecting outputs")
        rows = _as_rows(eval_dataset, "eval_dataset") if eval_dataset is not None else self.eval_rows
        if not rows:
            raise ConfigError("there is nothing to evaluate on: pass an eval_dataset with held-out prompts")
        with stage_bars("evaluate", bool(self.args.disable_tqdm)) as progress:
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
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> Any:
        """Train for `num_train_epochs` rounds. `resume_from_checkpoint=True` goes on from the newest complete checkpoint,
        or from a finished first round when there is no checkpoint yet."""
        started = (self.output_dir / "rounds").exists()
        if not resume_from_checkpoint and started:
            raise ConfigError(
                f"{self.output_dir} already holds a run: pass resume_from_checkpoint=True to go on with it, or another output_dir"
            )
        if resume_from_checkpoint is True:
            found = any(self.output_dir.glob("checkpoint-*"))
            if not found and not started:
                raise ConfigError(f"{self.output_dir} holds no run to resume: leave resume_from_checkpoint out to start one")
            resume_from_checkpoint = str(newest_complete(self.output_dir)) if found else None
        if self.accelerator.is_main_process and not started:
            write_run_record(self.output_dir, self.args, self.rows, [r.name for r in self.rewards])
        return super().train(resume_from_checkpoint=resume_from_checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)


@dataclass(frozen=True)
class _StartSampler:
    """Draws from the start policy, which is opened only while it draws: an adapter must be on for everything else."""

    trainer: NEATTrainer

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, progress: Callable[[int], None] | None = None
    ) -> list[Sample]:
        """One `Sample` a request, in order."""
        with self.trainer.reference() as model:
            return self.trainer._sampler(model).sample(requests, params, progress=progress)


# ---- building blocks -------------------------------------------------------------------------------------------------


def _as_rows(dataset: Any, name: str) -> list[PromptRow]:
    if isinstance(dataset, list) and dataset and isinstance(dataset[0], PromptRow):
        return cast("list[PromptRow]", dataset)
    return rows_from_dataset(dataset, name=name)
