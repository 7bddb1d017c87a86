"""Who decides the layout: the fastest in which a model says what it says of a row alone.

Measured once, before the first step, on a few prompts: an architecture that takes packed rows
without an error may still compute something else in them. `trainer/setup.py` (`layout_for`) asks,
and says whether the configuration (`prefix_sharing: off`) or the way of running rules packed rows
out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from neat_align.modeling.logprobs import packed_logprobs, padded_logprobs
from neat_align.modeling.packing import Layout, TokenIds, pack_rows, pad_rows
from neat_align.modeling.precision import inference
from neat_align.modeling.rounding import rounding_limit
from neat_align.modeling.self_check import (
    MODEL_ERRORS,
    check_alone,
    difference_in_a_batch,
    showing_adapter,
)
from neat_align.modeling.shared_prefix import shortest_window, unwrapped, why_not_packed

logger = logging.getLogger(__name__)
# Lengths, in tokens, of what stands in for completions: ordinary, the shortest, and long.
STAND_IN_LENGTHS = (5, 1, 24)


def choose_layout(
    model: torch.nn.Module,
    prompts: Sequence[TokenIds],
    *,
    pad_token_id: int,
    longest: int,
    may_pack: bool = True,
) -> Layout:
    """Packed where it gives what padded rows give on these prompts, else padded, else unpadded.

    Padded rows have to give what the rows give alone. A warning says why it is not packed. Each
    prompt is followed by pieces of the others in place of completions: the numbers depend on the
    layout alone, not on what the text says. `longest` is the most tokens that a prompt and a
    completion will have: where the model's attention reaches back less far, a prompt is repeated
    until it is longer than that. Without `may_pack` packed rows are not tried. Raises ConfigError
    for a model that can be scored in no layout.
    """
    with showing_adapter(model):
        alone = check_alone(model, prompts)
        in_a_batch = difference_in_a_batch(model, prompts, alone)
        if in_a_batch is not None:
            logger.warning(
                "%s gives a row other log-probabilities in a padded batch than alone (%.2g nats "
                "per token apart). Rows go through it one at a time, correct but slower",
                type(unwrapped(model)).__name__,
                in_a_batch,
            )
            return "unpadded"
        if not may_pack:
            return "padded"
        reason = why_not_packed(model) or _disagreement(model, prompts, pad_token_id, longest)
    if reason is None:
        return "packed"
    logger.warning(
        "prompts are not shared between completions: %s. Training goes on with padded rows, "
        "correct but slower",
        reason,
    )
    return "padded"


def _disagreement(
    model: torch.nn.Module, prompts: Sequence[TokenIds], pad_token_id: int, longest: int
) -> str | None:
    """Why packed rows cannot be used, from the numbers of both layouts; None where they agree."""
    sources = [*prompts, *prompts, *prompts]
    pieces = [list(p[:n]) for p, n in zip(sources, STAND_IN_LENGTHS, strict=False)]
    window = shortest_window(model)
    if window is not None and window < longest:
        repeated = list(prompts[0]) * -(-(window + 8) // len(prompts[0]))
        prompts = [repeated[: window + 8], *prompts[1:]]
    device = next(model.parameters()).device
    packed = pack_rows(prompts, [pieces] * len(prompts)).to(device)
    repeated_prompts = [p for p in prompts for _ in pieces]
    padded = pad_rows(repeated_prompts, pieces * len(prompts), pad_token_id).to(device)
    try:
        with inference(model, None):
            difference = packed_logprobs(model, packed) - padded_logprobs(model, padded)
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS as error:
        return f"{type(unwrapped(model)).__name__} fails on packed rows ({error})"
    limit = rounding_limit(model)
    measured = limit.measure(difference)
    if measured <= limit.nats:
        return None
    return (
        f"its log-probabilities differ by {measured:.2g} nats between packed and padded rows "
        f"(at most {limit.nats} is rounding)"
    )
