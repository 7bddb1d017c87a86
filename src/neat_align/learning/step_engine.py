"""The step engine: one optimizer step on groups of completions.

Groups are cut into micro-batches under a token budget. The loss of a micro-batch is divided by
counts over the *whole* optimizer step (all micro-batches, all ranks), so how a step is cut changes
neither its loss nor its gradient. That is also what lets a step that ran out of memory be made
again in smaller micro-batches.

The engine owns no model and no optimizer: the trainer hands it a function that does one
micro-batch's forward and backward pass.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from neat_align.config import NEATConfig
from neat_align.errors import name_list
from neat_align.learning.batches import collate_groups, without_unread_completions
from neat_align.learning.distillation import distillation
from neat_align.learning.finite import CheckedBatch, checked_batch, non_finite
from neat_align.learning.losses import total_loss
from neat_align.learning.objective import (
    LossCounts,
    MicroBatch,
    counts_of,
    loss_terms,
    micro_batch_of,
    objective_params,
)
from neat_align.learning.step_facts import METRICS, SHARE_NEEDS, step_facts
from neat_align.learning.step_metrics import StepMetrics, sum_dtype
from neat_align.learning.teacher_rows import TeacherRows, teacher_rows
from neat_align.modeling.head_inputs import head_inputs
from neat_align.modeling.lockstep import lockstep
from neat_align.modeling.logprobs import completion_logprobs, logprobs_of
from neat_align.modeling.packing import Layout, fill_budget, rows_in_layout, tokens_in
from neat_align.modeling.precision import autocast
from neat_align.modeling.reference import Reference
from neat_align.modeling.shared_prefix import sharing_prefixes
from neat_align.rounds.completions import CompletionGroup
from neat_align.rounds.ranking import RankBy

logger = logging.getLogger(__name__)

# Forward and backward over one micro-batch: Trainer's own training step. None is a micro-batch
# without groups, of ranks that have fewer than the others.
ForwardBackward = Callable[[torch.nn.Module, MicroBatch | None, LossCounts], Tensor]
# How bad a number that is not finite is: a loss breaks the gradient of every rank, so it is named
# rather than the gradients that it broke.
BAD_GRADIENT, BAD_LOSS = 1, 2


@dataclass(frozen=True)
class NonFinite:
    """What is not a finite number on this rank, and how bad that is: 0 where all is well."""

    messages: tuple[str, ...] = ()
    severity: int = 0


class StepEngine:
    """Micro-batches, loss and checks of one optimizer step.

    Args:
        args: the configuration; its objective and its `max_tokens_per_micro_batch`.
        accelerator: for sums over ranks and for skipping DDP's gradient exchange.
        forward_backward: what the trainer does with a micro-batch.
        layout: packed or padded rows.
        pad_token_id: of the policy's tokenizer.
        reference: opens the start policy, which contrast distillation learns from.
        sharded: whether ranks hold parts of weights, gradients or optimizer states (FSDP2,
            DeepSpeed). Each makes as many passes a step as the one with the most micro-batches.
    """

    def __init__(
        self,
        args: NEATConfig,
        accelerator: Accelerator,
        forward_backward: ForwardBackward,
        *,
        layout: Layout,
        pad_token_id: int,
        reference: Reference,
        sharded: bool,
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.forward_backward = forward_backward
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.reference = reference
        self.sharded = sharded
        self.objective = objective_params(args)
        self.micro_batch_tokens = args.max_tokens_per_micro_batch
        self.metrics = StepMetrics(METRICS, self.device, needs=SHARE_NEEDS)
        # Of the optimizer step that is being made: its groups by accumulation step, the metrics
        # before it, whether its numbers are finite.
        self._groups: list[list[CompletionGroup]] = []
        self._num_batches = self._passes_to_add = 0
        self._metrics_before = self.metrics.copy()
        self._checked: list[CheckedBatch] = []

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return cast("torch.device", self.accelerator.device)

    # ---- micro-batches ----

    def collate(self, groups: list[CompletionGroup]) -> dict[str, Any]:
        """A batch of the data loader: micro-batches under the token budget, and their groups."""
        groups = [without_unread_completions(g, self.args) for g in groups]
        return {"micro_batches": self._micro_batches(groups), "groups": groups}

    def _micro_batches(self, groups: Sequence[CompletionGroup]) -> list[MicroBatch]:
        sizes = [self._tokens_in(g) for g in groups]
        cut = fill_budget(sizes, self.micro_batch_tokens)
        return [self.micro_batch([groups[i] for i in members]) for members in cut]

    def _tokens_in(self, group: CompletionGroup) -> int:
        lengths = [len(c.token_ids) for c in group.completions]
        return tokens_in(len(group.prompt_ids), lengths, self.layout)

    def micro_batch(self, groups: Sequence[CompletionGroup]) -> MicroBatch:
        """These groups as one micro-batch."""
        batch = collate_groups(
            groups,
            pad_token_id=self.pad_token_id,
            rank_by=cast("RankBy", self.args.rank_by),
            lm_on_bad_origins=self.args.lm_on_bad_origins,
            lm_on_cut=self.args.lm_on_cut_completions,
            layout=self.layout,
        )
        teacher: tuple[TeacherRows, ...] = ()
        if self.objective.distil_weight:
            teacher = teacher_rows(
                groups,
                batch.rows,
                self.objective.teach,
                layout=self.layout,
                pad_token_id=self.pad_token_id,
            )
        return micro_batch_of(batch, self.objective, teacher)

    # ---- a step ----

    def begin(self, batches: Iterable[dict[str, Any]]) -> LossCounts:
        """Begin an optimizer step on these batches of the data loader: what its loss terms are
        divided by.
        """
        self._groups, self._metrics_before, self._checked = [], self.metrics.copy(), []
        self.metrics.begin_step()
        cut = [batch["micro_batches"] for batch in batches]
        here = [micro for micros in cut for micro in micros]
        self._num_batches, self._passes_to_add = len(cut), self._fewer_than_most(len(here))
        return self.count(here)

    def _fewer_than_most(self, passes: int) -> int:
        """How many more passes the rank with the most makes, where ranks have to make as many."""
        if not self.sharded or self.args.world_size == 1:
            return 0
        here = torch.tensor([passes], device=self.device)
        return int(cast("Tensor", self.accelerator.gather(here)).max()) - passes

    def count(self, micro_batches: Sequence[MicroBatch]) -> LossCounts:
        """Counts over these micro-batches and over all ranks."""
        counts: Sequence[float] = counts_of(micro_batches)
        if self.args.world_size > 1:
            here = torch.tensor(counts, dtype=sum_dtype(self.device), device=self.device)
            counts = self.sum_over_ranks(here).tolist()
        return LossCounts(*(max(1.0, count) for count in counts))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """All ranks' values, added up. Every rank has to call this, in the same order."""
        if self.args.world_size == 1:
            return values
        return cast("Tensor", self.accelerator.reduce(values, "sum"))

    def accumulate(
        self, model: torch.nn.Module, batch: dict[str, Any], counts: LossCounts
    ) -> Tensor:
        """Forward and backward over the micro-batches of one accumulation step; its loss.

        When memory runs out on a single rank, the gradient of the step so far is thrown away and
        made again in micro-batches of half as many tokens, which stay that small. Several ranks
        cannot do that: the others wait for this one's gradient.
        """
        self._groups.append(batch["groups"])
        micro_batches: list[MicroBatch | None] = [*batch["micro_batches"]]
        if len(self._groups) == self._num_batches:
            micro_batches += [None] * self._passes_to_add
        loss = self._unless_out_of_memory(
            lambda: self._forward_backward(model, micro_batches, counts)
        )
        while loss is None:
            self._halve_micro_batches()
            model.zero_grad()
            self.metrics.restore(self._metrics_before)
            self._checked = []
            loss = self._unless_out_of_memory(lambda: self._replay(model, counts))
        return loss

    def _forward_backward(
        self,
        model: torch.nn.Module,
        micro_batches: Sequence[MicroBatch | None],
        counts: LossCounts,
    ) -> Tensor:
        losses = []
        for i, micro_batch in enumerate(micro_batches):
            with contextlib.ExitStack() as opened:
                opened.enter_context(self._exchange(model, is_last=i + 1 == len(micro_batches)))
                if self.layout == "packed":
                    # Over the backward pass too: gradient checkpointing runs the attention again.
                    opened.enter_context(sharing_prefixes(model))
                losses.append(self.forward_backward(model, micro_batch, counts))
        return torch.stack(losses).sum()

    @contextlib.contextmanager
    def _exchange(self, model: torch.nn.Module, *, is_last: bool) -> Iterator[None]:
        """When ranks exchange the gradient of a micro-batch; `is_last` of its accumulation step.

        DDP: once, after the last one. FSDP2: after each, whatever Trainer says of the accumulation
        step: kept for later, a gradient would be as large as the model, and ranks whose
        accumulation steps are cut into other numbers of micro-batches would not meet. DeepSpeed:
        after each as well; its optimizer steps at what it takes for the last.
        """
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)
            yield
        elif self.sharded:
            state = self.accelerator.gradient_state
            steps = state.sync_gradients
            state._set_sync_gradients(steps and is_last)
            yield
            state._set_sync_gradients(steps)
        else:
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                yield

    def _replay(self, model: torch.nn.Module, counts: LossCounts) -> Tensor:
        """All accumulation steps so far, again; the loss of the last one (Trainer has the rest)."""
        losses = []
        for groups in self._groups:
            micro_batches = [m.to(self.device) for m in self._micro_batches(groups)]
            losses.append(self._forward_backward(model, micro_batches, counts))
        return losses[-1]

    def _unless_out_of_memory(self, work: Callable[[], Tensor]) -> Tensor | None:
        try:
            return work()
        except torch.OutOfMemoryError:
            if self.args.world_size > 1 or self.sharded:
                raise
        # Outside of the except block: the exception would keep the failed batch's tensors alive.
        clear_device_cache(garbage_collection=True)
        return None

    def _halve_micro_batches(self) -> None:
        """Halve the token budget. Raises torch.OutOfMemoryError when one group alone is too large.

        The largest micro-batch so far is halved, which may be less than the budget.
        """
        sizes = [[self._tokens_in(g) for g in groups] for groups in self._groups]
        shared = []
        for row in sizes:
            for members in fill_budget(row, self.micro_batch_tokens):
                if len(members) > 1:
                    shared.append(sum(row[i] for i in members))
        if not shared:
            raise torch.OutOfMemoryError(
                "memory ran out in training on one group at a time (the largest has "
                f"{max(map(max, sizes))} tokens): turn gradient_checkpointing on, or lower "
                "max_completion_length or the number of completions per prompt"
            )
        is_first_time = self.micro_batch_tokens == self.args.max_tokens_per_micro_batch
        self.micro_batch_tokens = max(shared) // 2
        if is_first_time:
            logger.warning(
                "memory ran out in training: the step is made again in micro-batches of at most %d "
                "tokens, with the same loss. max_tokens_per_micro_batch sets how many from the "
                "start",
                self.micro_batch_tokens,
            )

    # ---- loss ----

    def loss(
        self,
        model: torch.nn.Module,
        micro_batch: MicroBatch | None,
        counts: LossCounts | None,
        *,
        autocast_dtype: torch.dtype | None,
    ) -> Tensor:
        """Loss of one micro-batch in nats, scaled to its share of the whole step.

        Without `counts` the micro-batch is taken for the whole step; None is one without groups,
        whose loss is 0 with a gradient of 0. No number is read from the device: what is logged and
        checked stays there until the end of the step.
        """
        if micro_batch is None:
            return self._loss_of_nothing(model, autocast_dtype)
        counts = self.count([micro_batch]) if counts is None else counts
        # Accelerate puts autocast around the model; packed rows run the head outside of it.
        p, rows = self.objective, micro_batch.rows
        with self._in_step(model), autocast(self.device.type, autocast_dtype):
            inputs = head_inputs(model, rows)
            # Without a teacher there must be a gradient, of 0, all the same: other ranks wait.
            needs_grad = p.reads_logprobs or not micro_batch.teacher
            with torch.set_grad_enabled(torch.is_grad_enabled() and needs_grad):
                logps = logprobs_of(model, rows, inputs)
            distilled = [
                distillation(
                    model, self.reference, inputs, part, p.distil, autocast_dtype=autocast_dtype
                )
                for part in micro_batch.teacher
            ]
        answers = torch.cat(distilled) if distilled else None
        terms = loss_terms(micro_batch, logps, counts, p, answers)
        loss = total_loss(
            terms,
            lm_weight=p.lm_weight,
            negative_weight=p.negative_weight,
            kl_weight=p.kl_weight,
            distil_weight=p.distil_weight,
        )
        # Said before the optimizer step: raised here, it would leave the other ranks waiting for
        # this gradient.
        self._checked.append(checked_batch(micro_batch.groups, logps, loss))
        self.metrics.add(step_facts(micro_batch, logps, terms, p))
        # Ranks average their gradients; the counts are global, so the shares have to be summed.
        return cast("Tensor", loss * self.args.world_size)

    def _loss_of_nothing(
        self, model: torch.nn.Module, autocast_dtype: torch.dtype | None
    ) -> Tensor:
        """0, from a completion of one token that goes the way of any other: ranks exchange weights
        and gradients in the order in which a pass uses them.
        """
        rows = rows_in_layout([[0]], [[[0]]], self.layout, self.pad_token_id).to(self.device)
        with self._in_step(model), autocast(self.device.type, autocast_dtype):
            return completion_logprobs(model, rows).sum() * 0

    def _in_step(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """Ranks make as many passes of the teacher as the one with the most, before any goes back.

        Without a teacher each rank makes one pass a micro-batch.
        """
        if not self.sharded or not self.objective.distil_weight:
            return contextlib.nullcontext()
        with self.reference() as start:
            return lockstep(model, start)

    def non_finite(
        self, parameters: Iterable[tuple[str, torch.nn.Parameter]], step: int
    ) -> NonFinite:
        """What in this step's losses or gradients is not finite on this rank, with its prompts.

        Call it before the optimizer step.
        """
        scaler = self.accelerator.scaler
        # fp16's loss scaling expects gradients that overflow, and skips such steps itself.
        scales = scaler is not None and scaler.is_enabled()
        found = non_finite(self._checked, () if scales else parameters)
        if found.batches:
            return NonFinite(tuple(b.in_words(step) for b in found.batches), BAD_LOSS)
        if not found.weights:
            return NonFinite()
        prompts = name_list([g.prompt_id for groups in self._groups for g in groups])
        message = (
            f"the gradient of {found.weights[0]} is not finite at step {step} "
            f"({len(found.weights)} of {found.of} weights); prompts {prompts}"
        )
        return NonFinite((message,), BAD_GRADIENT)
