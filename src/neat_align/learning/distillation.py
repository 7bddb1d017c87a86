"""Contrast distillation: the policy learns, token by token, what the instructions make the start
policy say differently.

    teacher  q_t ∝ p0(· | x, y<t) · [p0(· | x, +, y<t) / p0(· | x, −, y<t)]^α    (modeling.contrast)
    loss     mean over answers of (1/|y|) Σ_t D(π(· | x, y<t), q_t)

on plain answers y, which the policy wrote itself. The divergence is exact, over the whole
vocabulary, and the policy sees the plain prompt only. Ours, not the paper's. Sources: on-policy
distillation (GKD 2306.13649), self-distillation from a context (SDFT, OPSD), contrastive decoding
(2210.15097); docs/method.md says what is whose.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from neat_align.config import NEATConfig
from neat_align.learning.teacher_rows import TeacherRows
from neat_align.modeling.chunked_head import parts, wide_dtype
from neat_align.modeling.chunked_values import values_in_chunks
from neat_align.modeling.contrast import (
    centred,
    contrast_logprobs,
    contrast_shift,
    mean_log_ratio,
    plausible_p0,
    plausible_tokens,
)
from neat_align.modeling.head_inputs import (
    CastHead,
    cast_head,
    head_inputs,
    head_outputs,
    rows_at_once,
)
from neat_align.modeling.packing import PackedRows, Rows
from neat_align.modeling.precision import casting_once, inference
from neat_align.modeling.reference import Reference

# Some models give tokens that they never say a logit of minus infinity, whose differences are no
# numbers. This far down a probability is 0 in fp64, too.
LEAST_LOGIT = -1e4
# Tables of a chunk's vocabulary that are held at once: on a GPU a chunk is sized for one.
_TABLES = 4

DivergenceKind: TypeAlias = Literal["reverse", "forward", "js"]
Toward: TypeAlias = Literal["contrast", "positive", "sharpened"]


@dataclass(frozen=True)
class DistilParams:
    """What is taught, and how the distance to it is measured; see the `distil_…` options."""

    alpha: float
    toward: Toward
    min_p: float
    threshold: float
    raise_only: bool
    clip: float | None
    max_kl: float | None
    divergence: DivergenceKind
    teacher: Literal["start", "current"]


def distil_params(config: NEATConfig) -> DistilParams:
    """The settings of a configuration."""
    return DistilParams(
        alpha=config.distil_alpha,
        toward=cast("Toward", config.distil_toward),
        min_p=config.distil_min_p,
        threshold=config.distil_threshold,
        raise_only=config.distil_raise_only,
        clip=config.distil_clip,
        max_kl=config.distil_max_kl,
        divergence=cast("DivergenceKind", config.distil_divergence),
        teacher=cast("Literal['start', 'current']", config.distil_teacher),
    )


# ---- the divergence ------------------------------------------------------------------------------


def token_divergence(
    logits: Float[Tensor, "n vocab"], teacher: Float[Tensor, "n vocab"], kind: DivergenceKind
) -> Float[Tensor, " n"]:
    """The divergence of each token's distribution from its teacher's, in nats; at least 0.

        reverse  KL(π ‖ q)
        forward  KL(q ‖ π)
        js       ½ KL(π ‖ m) + ½ KL(q ‖ m),    m = (π + q)/2

    π is the softmax of `logits`, `teacher` holds log q. Only `logits` get a gradient; it is exact
    and written down (g = π(log π − log q − D) for `reverse`, π − q for `forward`), so that no table
    but it is kept.
    """
    return cast("Tensor", _TokenDivergence.apply(logits, teacher, kind))  # type: ignore[no-untyped-call]


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, kind: DivergenceKind) -> Tensor:
        policy = logits.clamp(min=LEAST_LOGIT).log_softmax(-1)
        p = policy.exp()
        if kind == "reverse":
            gap = policy - teacher
            value = (p * gap).sum(-1)
            gradient = gap.sub_(value[:, None]).mul_(p)
        elif kind == "forward":
            q = teacher.exp()
            value = (q * (teacher - policy)).sum(-1)
            gradient = p.sub_(q)
        elif kind == "js":
            middle = torch.logaddexp(policy, teacher) - math.log(2)
            gap = policy - middle
            own = (p * gap).sum(-1)
            value = (own + (teacher.exp() * (teacher - middle)).sum(-1)) / 2
            gradient = gap.sub_(own[:, None]).mul_(p).div_(2)
        else:
            raise ValueError(f"there is no divergence {kind!r}")
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0][:, None], None, None


# ---- the teacher ---------------------------------------------------------------------------------

# Opens the teacher, for passes without a gradient.
Teaching: TypeAlias = Callable[[], AbstractContextManager[torch.nn.Module]]


@dataclass(frozen=True)
class Teacher:
    """What the teacher's distributions are made from: the head's inputs of the same tokens after
    the plain prompt, and after it under each positive and negative instruction.

    `head` is the teacher's, or None where the teacher has to be open to use it (`opened`); `rows`
    are those that the inputs come from.
    """

    plain: Float[Tensor, "n width"]
    positive: tuple[Float[Tensor, "n width"], ...]
    negative: tuple[Float[Tensor, "n width"], ...]
    rows: Rows
    opened: Teaching
    head: CastHead | None

    def tables(
        self, part: slice, p: DistilParams
    ) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, "n vocab"]]:
        """(log p0, the log-ratio that moves it) of a chunk of tokens, in nats.

        The log-ratio may have a constant of each token added, which moves nothing.
        """
        if self.head is not None:
            with torch.no_grad():
                return self._tables(self.head, part, p)
        with self.opened() as model:
            return self._tables(lambda states: head_outputs(model, states, self.rows), part, p)

    def _tables(
        self, head: Callable[[Tensor], Tensor], part: slice, p: DistilParams
    ) -> tuple[Tensor, Tensor]:
        def logprobs(states: Float[Tensor, "all width"]) -> Float[Tensor, "n vocab"]:
            logits = head(states[part])
            logits = logits.to(wide_dtype(logits.dtype))
            return logits.clamp_(min=LEAST_LOGIT).log_softmax(-1)

        start = logprobs(self.plain)
        if p.toward == "sharpened":
            return start, start
        others = self.negative if p.toward == "contrast" else (self.plain,) * len(self.positive)
        if isinstance(head, CastHead) and p.clip is None:
            # A linear head's mean difference is that of the mean states: one product instead of two
            # a pair. What is left out of it, the normalizers, are constants.
            ratio = head.difference(_mean_of(self.positive, part), _mean_of(others, part))
            if ratio is not None:
                return start, ratio
        sides = zip(self.positive, others, strict=True)
        return start, mean_log_ratio(((logprobs(a), logprobs(b)) for a, b in sides), p.clip)


def _mean_of(states: Sequence[Float[Tensor, "all dim"]], part: slice) -> Float[Tensor, "n dim"]:
    return torch.stack([s[part].to(wide_dtype(s.dtype)) for s in states]).mean(0)


def teacher_of(opened: Teaching, rows: TeacherRows, autocast_dtype: torch.dtype | None) -> Teacher:
    """Passes of the teacher over the distilled answers, one a prompt that it sees."""
    with opened() as model, casting_once(model):

        def inputs(of: Rows) -> Float[Tensor, "n width"]:
            return head_inputs(model, of).index_select(0, rows.places)

        plain = inputs(rows.plain)
        positive = tuple(inputs(of) for of in rows.positive)
        negative = tuple(inputs(of) for of in rows.negative)
    # The casts are half of the weights; the student's activations need the room.
    torch.clear_autocast_cache()
    with opened() as model:
        head = cast_head(model, rows.plain, autocast_dtype)
    return Teacher(plain, positive, negative, rows.plain, opened, head)


def shift_variance(
    start: Float[Tensor, "n vocab"], log_ratio: Float[Tensor, "n vocab"], p: DistilParams
) -> Float[Tensor, " n"]:
    """Σ over the plausible tokens of p0 · (s − s̄)², with s the shift at α = ±1 and s̄ its mean under
    p0 there: twice the KL(q ‖ p0) of a small α, over α². In nats².
    """
    plausible = plausible_tokens(start, p.min_p)
    shift = contrast_shift(
        start,
        log_ratio,
        math.copysign(1.0, p.alpha),
        plausible,
        threshold=p.threshold,
        raise_only=p.raise_only,
    )
    return (plausible_p0(start, plausible) * centred(start, shift, plausible).square()).sum(-1)


# ---- the loss ------------------------------------------------------------------------------------


def distillation(
    model: torch.nn.Module,
    reference: Reference,
    inputs: Float[Tensor, "places width"],
    rows: TeacherRows,
    p: DistilParams,
    *,
    autocast_dtype: torch.dtype | None,
) -> Float[Tensor, " answers"]:
    """The divergence of each distilled answer from its teacher: the mean over its distilled tokens,
    in nats.

    `inputs` are the head's inputs of the policy for the micro-batch that `rows` belongs to. Must be
    called inside of the same autocast as the policy's forward pass.
    """
    teacher = teacher_of(_teaching(model, reference, p, autocast_dtype), rows, autocast_dtype)
    size = rows_at_once(model)
    if inputs.device.type != "cpu":
        size = max(1, size // _TABLES)
    alphas = _alphas(teacher, rows, p, size)
    own_head = cast_head(model, rows.plain, autocast_dtype)

    def value_of(chunk: Float[Tensor, "n width"], part: slice) -> Float[Tensor, " n"]:
        start, ratio = teacher.tables(part, p)
        target = contrast_logprobs(
            start,
            ratio,
            alphas[part, None],
            p.min_p,
            p.threshold,
            raise_only=p.raise_only,
        )
        logits = head_outputs(model, chunk, rows.plain) if own_head is None else own_head(chunk)
        return token_divergence(logits.to(target.dtype), target, p.divergence)

    own = inputs.index_select(0, rows.student)
    frozen = own_head is not None or not isinstance(rows.plain, PackedRows)
    values = values_in_chunks(own, value_of, size, frozen_head=frozen)
    return _means(values, rows.answer, rows.lengths)


def _teaching(
    model: torch.nn.Module,
    reference: Reference,
    p: DistilParams,
    autocast_dtype: torch.dtype | None,
) -> Teaching:
    from accelerate.utils import extract_model_from_parallel

    current = extract_model_from_parallel(model, keep_fp32_wrapper=True)

    @contextlib.contextmanager
    def opened() -> Iterator[torch.nn.Module]:
        policy = reference() if p.teacher == "start" else contextlib.nullcontext(current)
        with policy as teacher, inference(teacher, autocast_dtype):
            yield teacher

    return opened


def _means(
    values: Float[Tensor, " n"], owner: Int[Tensor, " n"], lengths: Int[Tensor, " answers"]
) -> Float[Tensor, " answers"]:
    totals = values.new_zeros(len(lengths)).index_add(0, owner, values)
    return totals / lengths.clamp(min=1)


def _alphas(teacher: Teacher, rows: TeacherRows, p: DistilParams, size: int) -> Float[Tensor, " n"]:
    """α of each token: `alpha`, or less where a prompt's teacher would be too far from the start.

    α_x = min(|α|, √(2 κ / V_x)) with α's sign,    κ = `max_kl`, V_x = mean of `shift_variance`
    """
    dtype = wide_dtype(teacher.plain.dtype)
    alphas = teacher.plain.new_full((len(rows.answer),), p.alpha, dtype=dtype)
    if p.max_kl is None:
        return alphas
    variances = [shift_variance(*teacher.tables(part, p), p) for part in parts(len(alphas), size)]
    variance = torch.cat(variances).to(dtype)
    prompts = rows.prompt[rows.answer]
    zeros = variance.new_zeros(rows.num_prompts)
    total = zeros.index_add(0, prompts, variance)
    count = zeros.index_add(0, prompts, torch.ones_like(variance))
    allowed = (2 * p.max_kl * count / total.clamp(min=1e-12)).sqrt()
    return alphas.sign() * torch.minimum(alphas.abs(), allowed[prompts])
