"""Training steps on groups of completions: micro-batches under a token budget, one loss for the
whole step, guards.

The loss of a micro-batch is divided by counts over the *whole* optimizer step (all micro-batches,
all processes), so how a step is cut changes neither its loss nor its gradient. That is also what
lets a step that ran out of memory be cut smaller.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from neat_align.durable_trainer import DurableTrainer
from neat_align.errors import CollapseError, name_list
from neat_align.learning.batches import GroupBatch, collate_groups
from neat_align.learning.finite import non_finite_batch, non_finite_gradient
from neat_align.learning.losses import total_loss
from neat_align.learning.objective import (
    LossCounts,
    ObjectiveParams,
    counts_of,
    loss_terms,
    objective_params,
    ranking_facts,
)
from neat_align.modeling.logprobs import completion_logprobs
from neat_align.modeling.packing import Layout, fill_budget, padding_fraction, tokens_in
from neat_align.modeling.precision import autocast
from neat_align.modeling.shared_prefix import sharing_prefixes
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.ranking import RankBy, best_index, extremes, kept_completions, rank_keys

logger = logging.getLogger(__name__)


class GroupTrainer(DurableTrainer):
    """The part of `NEATTrainer` that learns from groups.

    `start_run_state` comes before Trainer's own constructor.
    """

    # The loss is divided by counts over the whole optimizer step, so Trainer must not divide it by
    # the accumulation steps.
    loss_is_scaled_for_ga = True
    layout: Layout
    objective_params: ObjectiveParams

    def start_run_state(self, args: Any) -> None:
        """Attributes that Trainer's constructor or a first step reads."""
        super().start_run_state(args)
        self.objective_params = objective_params(args)
        self.micro_batch_tokens = args.max_tokens_per_micro_batch
        # Of the optimizer step that is being made: its groups by accumulation step, the metrics
        # before it, what was not finite.
        self._sub_steps: list[list[CompletionGroup]] = []
        self._sums_before: dict[str, list[float]] = {}
        self._not_finite: list[str] = []

    @property
    def _tokenizer(self) -> Any:
        return self.processing_class

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type that forward passes compute in; None is the weights' own."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    @property
    def policy(self) -> torch.nn.Module:
        """The model that learns, without any wrapper of accelerate."""
        return cast("torch.nn.Module", self.model)

    # ---- micro-batches ----

    def _collate(self, groups: list[CompletionGroup]) -> dict[str, Any]:
        """Groups as micro-batches under the token budget, and the groups themselves."""
        groups = [self.trained_part(g) for g in groups]
        return {"groups": self._micro_batches(groups), "whole": groups}

    def _micro_batches(self, groups: Sequence[CompletionGroup]) -> list[GroupBatch]:
        sizes = [self._tokens_in(g) for g in groups]
        # Sharded models step in lockstep: one forward pass on every rank.
        budget = sum(sizes) if self.is_sharded else self.micro_batch_tokens
        return [self._batch([groups[i] for i in members]) for members in fill_budget(sizes, budget)]

    def _tokens_in(self, group: CompletionGroup) -> int:
        return tokens_in(
            len(group.prompt_ids), [len(c.token_ids) for c in group.completions], self.layout
        )

    def trained_part(self, group: CompletionGroup) -> CompletionGroup:
        """The group without completions that no term of the loss reads."""
        a = self.args
        reads_all = (
            a.kl_weight > 0
            or a.negative_penalty != "none"
            or (a.pair_selection == "all" and a.ranking_loss != "none")
        )
        if reads_all:
            return group
        keys = rank_keys(group, cast("RankBy", a.rank_by))
        best = (
            best_index(
                group,
                keys,
                allow_bad_origins=a.lm_on_bad_origins,
                allow_cut=a.lm_on_cut_completions,
            )
            if a.lm_weight
            else None
        )
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

    # ---- a step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The step's batches, and what its loss terms are divided by (in the place of Trainer's
        token count).
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._sub_steps, self._sums_before = (
            [],
            {name: list(pair) for name, pair in self._sums.items()},
        )
        return samples, self.count([batch for s in samples for batch in s["groups"]])

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward over the micro-batches of one accumulation step, one after the
        other.

        When memory runs out in one process, the gradient of the step so far is thrown away and made
        again in micro-batches of half as many tokens, which stay that small. Several processes
        cannot: the others wait for this one's gradient.
        """
        self._sub_steps.append(inputs["whole"])
        loss = self._unless_out_of_memory(
            lambda: self._forward_backward(model, inputs["groups"], num_items_in_batch)
        )
        while loss is None:
            self._halve_micro_batches()
            model.zero_grad()
            self._sums, self._not_finite = (
                {name: list(pair) for name, pair in self._sums_before.items()},
                [],
            )
            loss = self._unless_out_of_memory(lambda: self._replay(model, num_items_in_batch))
        return loss

    def _forward_backward(
        self, model: torch.nn.Module, batches: Sequence[GroupBatch], counts: Any
    ) -> Tensor:
        losses = []
        for batch in batches:
            with contextlib.ExitStack() as opened:
                if batch is not batches[-1]:
                    opened.enter_context(self.accelerator.no_sync(model))
                if self.layout == "packed":
                    # Over the backward pass too: gradient checkpointing runs the attention again
                    # there.
                    opened.enter_context(sharing_prefixes(model))
                losses.append(super().training_step(model, {"groups": batch}, counts))
        return torch.stack(losses).sum()

    def _replay(self, model: torch.nn.Module, counts: Any) -> Tensor:
        """All accumulation steps so far, again; the loss of the last one (Trainer has the
        others').
        """
        device = self.args.device
        losses = [
            self._forward_backward(
                model, [b.to(device) for b in self._micro_batches(groups)], counts
            )
            for groups in self._sub_steps
        ]
        return losses[-1]

    def _unless_out_of_memory(self, work: Callable[[], Tensor]) -> Tensor | None:
        try:
            return work()
        except torch.OutOfMemoryError:
            if self.args.world_size > 1 or self.is_sharded:
                raise
        # Outside of the except block: the exception would keep the failed batch's tensors alive.
        clear_device_cache(garbage_collection=True)
        return None

    def _halve_micro_batches(self) -> None:
        """Half the tokens of the largest micro-batch so far.

        Raises torch.OutOfMemoryError when a group alone is too large.
        """
        sizes = [[self._tokens_in(g) for g in groups] for groups in self._sub_steps]
        bins = [
            [[row[i] for i in members] for members in fill_budget(row, self.micro_batch_tokens)]
            for row in sizes
        ]
        shared = [sum(members) for row in bins for members in row if len(members) > 1]
        if not shared:
            raise torch.OutOfMemoryError(
                "memory ran out in training on one group at a time (the largest has "
                f"{max(map(max, sizes))} tokens): turn "
                "gradient_checkpointing on, or lower max_completion_length or the number of "
                "completions per prompt"
            )
        said = self.micro_batch_tokens < self.args.max_tokens_per_micro_batch
        self.micro_batch_tokens = max(shared) // 2
        if not said:
            logger.warning(
                "memory ran out in training: the step is made again in micro-batches of at most "
                "%d tokens, with the same loss. "
                "max_tokens_per_micro_batch sets how many from the start",
                self.micro_batch_tokens,
            )

    def count(self, batches: Sequence[GroupBatch]) -> LossCounts:
        """Counts over these micro-batches and over all processes."""
        counts = counts_of(batches, self.objective_params)
        if self.args.world_size > 1:
            counts = cast(
                "Tensor", self.accelerator.reduce(counts.to(self.args.device), reduction="sum")
            )
        return LossCounts(*counts.clamp(min=1).tolist())

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
        b: GroupBatch = inputs["groups"]
        counts = (
            num_items_in_batch if isinstance(num_items_in_batch, LossCounts) else self.count([b])
        )
        # Accelerate puts autocast around the model; packed rows run the head outside of it.
        with autocast(self.args.device.type, self.autocast_dtype):
            logps = completion_logprobs(model, b.rows)
        p = self.objective_params
        terms = loss_terms(b, logps, counts, p)
        loss = total_loss(
            terms, lm_weight=p.lm_weight, negative_weight=p.negative_weight, kl_weight=p.kl_weight
        )
        found = non_finite_batch(b, logps, loss, self.state.global_step + 1)
        if found is not None:
            # Said before the optimizer step: raised here, it would leave the other processes
            # waiting for this gradient.
            self._not_finite.append(found)
        for name in ("ranking", "lm", "negative", "kl"):
            # Micro-batches carry shares of one step's loss: they add up, and are divided by the
            # steps when logged.
            self._add(f"loss/{name}", float(getattr(terms, name).detach()), 0.0)
        for fact in ranking_facts(b, logps, p):
            self._add(*fact)
        self._add("packing/padding_fraction", padding_fraction(b.rows))
        self._add("packing/tokens_per_micro_batch", float(b.rows.input_ids.numel()))
        # Processes average their gradients; the counts are global, so the shares have to be summed.
        return loss * self.args.world_size

    def check_step(self) -> None:
        """Raise CollapseError on every process when one has a loss, log-probability or gradient
        that is not finite, before the optimizer step.
        """
        found, severity = self._not_finite, 2
        scaler = self.accelerator.scaler
        # fp16's loss scaling expects gradients that overflow, and skips such steps itself.
        if not found and (scaler is None or not scaler.is_enabled()):
            bad = non_finite_gradient(self.policy.named_parameters(), self.state.global_step + 1)
            if bad is not None:
                found, severity = (
                    [
                        f"{bad}; prompts "
                        f"{name_list([g.prompt_id for groups in self._sub_steps for g in groups])}"
                    ],
                    1,
                )
        worst = self.agree(severity if found else 0)
        if not worst:
            return
        # One process's loss breaks the gradient of all: the cause is named, not who shared it.
        everywhere = gather_object(found if severity == worst else [])
        raise CollapseError(
            f"{'; '.join(everywhere)}. No weight was changed by it, and the last checkpoint is "
            "untouched. Look at the learning rate "
            "and at the rewards of these prompts"
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
            if self.accelerator.is_main_process:
                self.alarms.training(logs, (self.state.global_step - 1) // self.steps_per_round)
        if "train_loss" in logs:
            # Trainer divides by the steps since the run was taken up last; the sum goes back to the
            # first.
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, start_time)
