"""NEATTrainer: a `transformers.Trainer` in which one epoch is one NEAT round.

`on_epoch_begin` samples, scores and ranks this round's groups with the current policy and swaps
them into the training data; the epoch's iterator is made after that, so no batch is older than its
round (`round_callback`). What the trainer adds to Trainer is composed (`parts`): policies,
round maker, step engine, drift monitor, run directory and ranks can each be used alone.

Where this departs from a textbook Trainer: the loss of a micro-batch is divided by counts over the
whole optimizer step (`learning.step_engine`); a checkpoint counts only when its `COMPLETE.json` is
written, and a run goes on exactly (`runs.run_directory`); evaluation samples from the policy
instead of computing a loss.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from neat_align.config import NEATConfig
from neat_align.errors import RunInterrupted
from neat_align.evaluation.held_out import Evaluation
from neat_align.learning.current_round import CurrentRoundDataset
from neat_align.learning.objective import LossCounts, MicroBatch
from neat_align.rewards.protocol import RewardSpec, RewardSum
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.round_files import FinishedRound
from neat_align.runs.run_directory import required_files
from neat_align.runs.signals import listening
from neat_align.runs.trainer_internals import logged_step, running_loss
from neat_align.trainer import given, hub
from neat_align.trainer.first_process import give_room
from neat_align.trainer.memory_plan import settle_memory
from neat_align.trainer.parts import TrainerParts, compose
from neat_align.trainer.reward_setup import contrast_reward, scorable_data, set_up_rewards
from neat_align.trainer.round_callback import RoundCallback, StopAfterSaveCallback
from neat_align.trainer.sampler_setup import GivenSampler
from neat_align.trainer.setup import read_data, set_up_policy
from neat_align.trainer.shared_reference import sharding_of
from neat_align.trainer.startup_checks import refused, rehearse


class NEATTrainer(Trainer):
    """Train a causal language model with NEAT.

    Args:
        model: a `PreTrainedModel`, a PEFT model, or a name or path (loaded in fp32).
        reward_funcs: one or several of: a shipped reward ("vader", …), a URL, "judge:FILE.yaml",
            "contrast", "package.module:function", a sequence-classification model or its name,
            `f(prompts, completions, completion_ids, **columns)`. None with `rank_by: origin`.
        args: a `NEATConfig`.
        train_dataset: a `datasets.Dataset` or any rows with `prompt`, `chosen` and `rejected`.
        eval_dataset: held-out rows of the same form; `evaluate()` samples on their plain prompts.
        processing_class: the tokenizer; None loads the model's own.
        reward_processing_classes: a tokenizer per reward function, for models given as objects.
        callbacks: as in `Trainer`; `terminal_callbacks(args)` gives the command line's.
        optimizers: as in `Trainer`.
        peft_config: a PEFT configuration; the adapter switched off is then the start policy.
        ref_model: the start policy, or its name; None: the adapter switched off, or a frozen copy.
        judge_funcs: rewards that evaluation reports and training never sees.
        eval_rewards: what evaluation reports as the reward; None: what is trained on.
        sampler: another engine: a `Sampler`, or a function of a `PolicyNow` that gives one.
    """

    # The loss is divided by counts over the whole optimizer step: not by Trainer, too.
    loss_is_scaled_for_ga = True
    args: NEATConfig
    predict = given.refused_predict
    init_hf_repo = hub.init_hf_repo
    create_model_card = hub.create_model_card  # type: ignore[assignment]
    push_to_hub = hub.push_to_hub  # type: ignore[assignment]
    last_evaluation: Evaluation | None = None

    def __init__(
        self,
        model: str | PreTrainedModel | torch.nn.Module,
        reward_funcs: RewardSpec | Sequence[RewardSpec] | None = None,
        args: NEATConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        ref_model: str | PreTrainedModel | torch.nn.Module | None = None,
        judge_funcs: RewardSpec | Sequence[RewardSpec] | None = None,
        eval_rewards: RewardSum | None = None,
        sampler: GivenSampler = None,
    ) -> None:
        args = given.as_config(args)
        data = read_data(args, train_dataset, eval_dataset, callbacks or ())
        setup, data = set_up_policy(args, model, data, processing_class, peft_config, ref_model)
        contrast = contrast_reward(args, setup, self._sum_logprobs)
        told = (reward_funcs, judge_funcs, reward_processing_classes)
        scored_by = set_up_rewards(args, contrast, *told, lambda: self.state, eval_rewards)
        data = settle_memory(args, setup, scorable_data(data, scored_by, args.on_bad_row))
        self.rounds = CurrentRoundDataset(args.groups_per_round(len(data.rows)))
        self.round_callback = RoundCallback(self, self.rounds)
        with refused("Trainer refuses these settings", "Correct them"):
            super().__init__(
                model=cast("Any", setup.model),
                args=args,
                data_collator=self._collate,
                train_dataset=self.rounds,
                eval_dataset=cast("Any", data.eval_rows or None),
                processing_class=setup.tokenizer,
                callbacks=cast("Any", [self.round_callback, *(callbacks or [])]),
                optimizers=given.checked_optimizers(optimizers, setup.model),
            )
        composed = functools.partial(compose, args, data, setup, scored_by, sampler=sampler)
        self.parts: TrainerParts = composed(
            accelerator=self.accelerator,
            forward_backward=self._forward_backward,
            steps_per_round=lambda: self.steps_per_round,
            on_open=lambda done: self.parts.announce(self.callback_handler.callbacks, done),
        )
        rehearse(self, self.parts.plan.optimizer_steps)
        given.settle_callbacks(self)
        self.add_callback(StopAfterSaveCallback(self.parts.ranks))  # all others have seen the save

    def _sum_logprobs(self, *rows: Any) -> list[float]:
        return self.parts.policies.sum_logprobs(*rows)

    def _collate(self, groups: list[CompletionGroup]) -> dict[str, Any]:
        return self.parts.engine.collate(groups)

    @property
    def policy(self) -> torch.nn.Module:
        """The model that learns, without any wrapper of accelerate."""
        return cast("torch.nn.Module", self.model)

    @property
    def output_dir(self) -> Path:
        """The run directory."""
        return self.parts.directory.path

    @property
    def stopped_because(self) -> str | None:
        """Why training stopped by itself before its last round, if it did."""
        return self.round_callback.stopped_because

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps in a round."""
        return self.args.steps_over(len(self.rounds))

    def make_round(self, index: int) -> FinishedRound:
        """Sample, score and rank a round, or read it when it is finished on the disk."""
        self.parts.place_policy()
        self.parts.record_skipped()
        return self.parts.round_maker.make(
            index,
            is_start=self.state.global_step == 0,
            start_is_current=not self.parts.setup.reference_given,
            callbacks=self.callback_handler.callbacks,
        )

    # ---- Trainer's steps ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The step's batches, and what its loss terms are divided by, for Trainer's token count."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.parts.engine.begin(batches)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward over the micro-batches of one accumulation step."""
        return self.parts.engine.accumulate(model, inputs, num_items_in_batch)

    def _forward_backward(
        self, model: torch.nn.Module, micro_batch: MicroBatch | None, counts: LossCounts
    ) -> Tensor:
        return super().training_step(model, {"micro_batch": micro_batch}, cast("Any", counts))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of one micro-batch, already scaled to its share of the whole step."""
        if return_outputs:
            raise ValueError("NEATTrainer has no model outputs to return: use completion_logprobs")
        return self.parts.engine.loss(
            model,
            inputs["micro_batch"],
            num_items_in_batch,
            autocast_dtype=self.parts.policies.autocast_dtype,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the training metrics gathered since the last training log added to it."""
        # Trainer's own lines, which every rank logs; a callback's may be one rank's alone.
        if logs.keys() >= {"loss", "learning_rate"} and logged_step(self) == self.state.global_step:
            self.parts.complete_training_log(logs, self.state.global_step)
        if logs.keys() >= {"train_loss", "train_runtime"}:
            logs["train_loss"] = self.parts.mean_loss(running_loss(self).total, self.state)
        super().log(logs, start_time)

    # ---- a run that survives ----

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Be the only run that writes into the run directory."""
        return self.parts.directory.writing()

    def open_run(self, resume: str | bool | None) -> None:
        """Begin the run in the output directory or take it up (see `RunDirectory.open`).

        `train` does this itself; called first, inside of `writing`, it comes before what costs.
        """
        self.parts.directory.open(resume, self.parts.run_key)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train for `num_train_epochs` rounds, or as many as `data_passes` takes.

        `resume_from_checkpoint=True` goes on from the newest complete checkpoint, or from the first
        round's finished work when there is none yet: same weights, rounds and metrics as without
        the break. On SIGINT or SIGTERM what is being done is finished, a complete checkpoint is
        written, and RunInterrupted, a SystemExit with code 128 + signal, is raised; a second signal
        ends the process at once.
        """
        directory = self.parts.directory
        with listening(self.parts.ranks.stop), self.writing():
            start = directory.take_start(resume_from_checkpoint, self.parts.run_key)
            self.round_callback.start_from(start)
            give_room(self.policy)
            rounds, has_stopped = self.parts.plan.rounds, self.stopped_because is not None
            with directory.own_limits(start, has_stopped=has_stopped, rounds=rounds):
                try:
                    checkpoint = None if start.checkpoint is None else str(start.checkpoint)
                    output = super().train(checkpoint, trial, ignore_keys_for_eval)
                except RunInterrupted:
                    # Loggers and bars are closed as at any other end.
                    self.callback_handler.on_train_end(self.args, self.state, self.control)
                    self.is_in_train = False
                    raise
            self.round_callback.load_best()
            self.parts.ranks.raise_if_stop_requested("after training had finished")
            return output._replace(training_loss=output.metrics["train_loss"])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's checkpoint, marked once it is complete. Raises SaveError."""
        self.parts.directory.save_checkpoint(
            self.state.global_step,
            lambda: super(NEATTrainer, self)._save_checkpoint(model, trial),
            self.round_callback.resume_state,
            required=required_files(self.args, sharding_of(self.accelerator)),
            best=self.state.best_model_checkpoint,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizer and model card; pushed where `push_to_hub` (see `push_to_hub`)."""
        super().save_model(output_dir, _internal_call=True)
        hub.after_save(self, output_dir, pushes=self.args.push_to_hub and not _internal_call)

    def save_checkpoint_now(self) -> None:
        """A complete checkpoint of the last step, outside of Trainer's order."""
        self._save_checkpoint(self.model, None)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Sample and judge the current policy on held-out rows (plain prompt).

        `last_evaluation` keeps the whole of it. Raises ConfigError when there are no rows.
        """
        given.refuse_ignore_keys(ignore_keys)
        evaluation = self.parts.evaluate(
            eval_dataset,
            self.callback_handler.callbacks,
            is_start=self.state.global_step == 0,
            # In training a checkpoint comes next, but not before its first step.
            may_stop=not self.is_in_train or self.state.global_step == 0,
        )
        self.last_evaluation = evaluation
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in evaluation.summary().items()}
        self.log(dict(metrics))
        metrics |= self.parts.unmeasured(metrics)
        told = (self.args, self.state, self.control, metrics)
        self.control = self.callback_handler.on_evaluate(*told)
        return metrics
