"""What a probe is asked for, and who does its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from neat_align.prompts.placement import Placement
from neat_align.prompts.row_prompts import InstructedPairs
from neat_align.prompts.skipped_rows import OnBadRow
from neat_align.rewards.protocol import NamedReward
from neat_align.rounds.params import LogprobFunction
from neat_align.sampling.contrast_decoding import Contrast
from neat_align.sampling.contrast_sampler import ContrastSampler
from neat_align.sampling.protocol import Sampler, SamplingParams

# Rounds count from 0 and evaluation is -1: a probe's seeds are apart from both.
PROBE_ROUND = -2

# A sampler from the instructed prompts of each plain one, and how far they move it.
Decoder: TypeAlias = Callable[
    [Mapping[tuple[int, ...], InstructedPairs], Contrast], ContrastSampler
]


@dataclass(frozen=True)
class DecodingParams:
    """What is decoded from the contrast: once with each of `alphas`.

    The log-ratio is the mean over `num_pairs` of the bank's pairs, drawn for each prompt; of the
    other names see `Contrast`.
    """

    alphas: tuple[float, ...]
    num_pairs: int = 3
    min_p: float = 0.05


@dataclass(frozen=True)
class ProbeParams:
    """What is sampled: `samples` answers a prompt under each instruction at each placement.

    `decoding` None: nothing is decoded from the contrast.
    """

    placements: tuple[Placement, ...]
    sampling: SamplingParams
    samples: int = 2
    seed: int = 0
    decoding: DecodingParams | None = None


@dataclass(frozen=True)
class ProbeTools:
    """Who does the work.

    `rewards` None scores with the contrast of the very pair that is probed (`ContrastReward`).
    `max_prompt_length` is the longest prompt in tokens, instruction included, that leaves room for
    an answer; None: no limit. `template_kwargs` are the option that the rows have been given
    already: that contrast is told the rows' own columns only. `on_bad_row`: an answer that a reward
    cannot score is an error, or has no reward. `decoder` makes the sampler that decodes from the
    contrast, of the same policy as `sampler`.
    """

    tokenizer: Any
    sampler: Sampler
    logprobs: LogprobFunction
    rewards: tuple[NamedReward, ...] | None
    max_prompt_length: int | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    on_bad_row: OnBadRow = "error"
    decoder: Decoder | None = None
