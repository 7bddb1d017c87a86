"""Which prompts a model samples together: as many as give each the numbers that it has alone.

Prompts of unequal lengths are sampled together, and what the sampler says of each completion is
compared with what the model says of the row alone, given its token ids and nothing else. Models
that ignore the mask over left padding, or read it in a way of their own, are given prompts of one
length at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from neat_align.errors import CollapseError, ConfigError
from neat_align.modeling.logprobs import score_completions
from neat_align.modeling.rounding import EXACT, rounding_limit
from neat_align.modeling.self_check import MODEL_ERRORS
from neat_align.modeling.shared_prefix import unwrapped
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams

logger = logging.getLogger(__name__)

# together: prompts of any lengths, padded on the left, with a mask and positions. one_length:
# prompts of equal lengths, without mask or positions. one_row: the same, one at a time. whole: one
# length again, and every token from a pass over the whole row instead of a cache.
SamplingWay: TypeAlias = Literal["together", "one_length", "one_row", "whole"]
WAYS: tuple[SamplingWay, ...] = get_args(SamplingWay)
_IN_WORDS = {
    "one_length": "only prompts of equal length are sampled together",
    "one_row": "completions are sampled one at a time",
    "whole": "completions are sampled without a cache, each token from a pass over its whole row",
}
# Tokens of the prompts, and what their completions may have. The last one gets the place of the
# first, which is short, and so comes beside rows that are on their way.
_LENGTHS, _LIMITS = (12, 12, 3, 2), (2, None, None, None)
PLACES = 3
_NEW_TOKENS = 4
# In exact numbers a high temperature draws unlikely tokens, where computations that differ are far
# apart; in half precision those are the ones that rounding moves most.
_TEMPERATURES = {True: 2.0, False: 1.0}
# In half precision, in nats per token: what is always rounding, and from where on nothing is; in
# between, so many times what a row alone shows.
_HALF_PRECISION, _NO_ROUNDING, _ROUNDING = 0.01, 1.0, 5

Draw: TypeAlias = Callable[[SamplingWay, Sequence[SampleRequest], SamplingParams], list[Sample]]


@dataclass
class KnownWay:
    """How a model is sampled, and by which attention on a CPU; None until it was measured."""

    way: SamplingWay | None = None
    attention: str | None = None


def choose_way(
    model: torch.nn.Module,
    draw: Draw,
    prompts: Sequence[tuple[int, ...]],
    autocast_dtype: torch.dtype | None,
) -> SamplingWay:
    """The fastest way in which `draw`, with `PLACES` places, says what the model says of each row
    alone.

    A warning names the model where it is not the first. Raises ConfigError where there is none.
    """
    exact = rounding_limit(model).exact and autocast_dtype is None
    params = SamplingParams(_NEW_TOKENS, temperature=_TEMPERATURES[exact])
    requests = _requests(prompts)
    failed: list[Exception] = []

    def difference(way: SamplingWay) -> float:
        try:
            samples = draw(way, requests, params)
        except torch.OutOfMemoryError:
            raise
        except CollapseError:
            return math.nan  # broken weights: the draw that is asked for will say so
        except MODEL_ERRORS as error:
            failed.append(error)
            return math.inf
        return _difference(model, requests, samples, autocast_dtype)

    first = difference("together")
    limit = EXACT.nats if exact else _HALF_PRECISION
    if first > limit and not exact:
        limit = max(limit, min(_ROUNDING * difference("one_row"), _NO_ROUNDING))
    if not first > limit:
        return "together"
    best = math.inf
    for way in WAYS[1:]:
        found = difference(way)
        if not found > limit:
            _warn(model, way, first)
            return way
        best = min(best, found)
    if math.isinf(first) and math.isinf(best):
        raise failed[0]
    raise ConfigError(
        f"{type(unwrapped(model)).__name__} cannot be sampled from: in no way of sampling do the "
        "log-probabilities of what was drawn agree with those of a forward pass over the same row "
        f"alone (at best: {_nats(best)}). Choose another model"
    )


def _warn(model: torch.nn.Module, way: SamplingWay, difference: float) -> None:
    logger.warning(
        "%s gives what it samples other log-probabilities in a batch of prompts of unequal lengths "
        "than for each alone (%s): %s, correct but slower",
        type(unwrapped(model)).__name__,
        _nats(difference),
        _IN_WORDS[way],
    )


def _nats(difference: float) -> str:
    if math.isinf(difference):
        return "its code fails"
    return f"{difference:.2g} nats per token apart"


def _requests(prompts: Sequence[tuple[int, ...]]) -> list[SampleRequest]:
    """Two prompts of one length and two shorter ones, from the tokens of real ones."""
    tokens = [token for prompt in prompts for token in prompt]
    tokens = tokens * -(-2 * max(_LENGTHS) // len(tokens))
    spread = (0, len(tokens) - _LENGTHS[1], (len(tokens) - _LENGTHS[2]) // 2, 1)
    return [
        SampleRequest(tuple(tokens[start : start + length]), seed, limit)
        for seed, (start, length, limit) in enumerate(zip(spread, _LENGTHS, _LIMITS, strict=True))
    ]


def _difference(
    model: torch.nn.Module,
    requests: Sequence[SampleRequest],
    samples: Sequence[Sample],
    autocast_dtype: torch.dtype | None,
) -> float:
    """Nats per token between the sampler's numbers and a pass over each row alone, at the worst."""
    scored = score_completions(
        model,
        [r.prompt_ids for r in requests],
        [s.token_ids for s in samples],
        layout="unpadded",
        pad_token_id=0,
        autocast_dtype=autocast_dtype,
    )
    return max(abs(s.logprob - sum(row)) / len(row) for s, row in zip(samples, scored, strict=True))
