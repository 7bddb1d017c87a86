"""What a round is made of and who does the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from neat_align.prompts.instruction_banks import InstructionBank, Polarity
from neat_align.prompts.skipped_rows import OnBadRow
from neat_align.rewards.protocol import NamedReward
from neat_align.rounds.ranking import RankBy
from neat_align.sampling.protocol import Sampler, SamplingParams

# Told (stage, finished, of how many).
Progress = Callable[[str, int, int], None]
# (prompt ids, completion ids) → per-token log-probabilities in nats, in order.
LogprobFunction = Callable[
    [Sequence[Sequence[int]], Sequence[Sequence[int]]], list[tuple[float, ...]]
]


@dataclass(frozen=True)
class RoundParams:
    """What a round is made of. Counts are per prompt; `seed` is the run's."""

    seed: int
    num_positive: int
    num_negative: int
    num_plain: int
    use_human_completions: bool
    placement: str
    sampling: SamplingParams
    rank_by: RankBy
    reward_margin: float
    max_prompt_length: int
    min_pair_fraction: float = 0.0
    negative_source: Literal["instruction", "other_prompts"] = "instruction"

    def counts(self) -> tuple[tuple[Polarity, int], ...]:
        """How many completions of each origin are sampled.

        Good ones come first: of two equal texts the first is kept.
        """
        return (
            ("positive", self.num_positive),
            ("plain", self.num_plain),
            ("negative", self.num_negative),
        )


@dataclass(frozen=True)
class RoundTools:
    """Who does the work.

    `negative_sampler` writes the negatives; `policy_logprobs` and `ref_logprobs` score every
    completion under the plain prompt, for the current and for the start policy (None: not
    computed). `on_bad_row`: a completion that a reward cannot score is an error, or has no reward.

    A batch is `batch_size` completions: as many are sampled, or rewarded, at once, and then stored.
    `between_batches` is called before each: what it raises (a run that is asked to stop) loses no
    finished batch.
    """

    tokenizer: Any
    bank: InstructionBank
    rewards: tuple[NamedReward, ...]
    sampler: Sampler
    negative_sampler: Sampler
    policy_logprobs: LogprobFunction | None = None
    ref_logprobs: LogprobFunction | None = None
    batch_size: int = 64
    between_batches: Callable[[], None] = lambda: None
    on_bad_row: OnBadRow = "error"


def progress_counter(progress: Progress | None, stage: str, total: int) -> Callable[[int], None]:
    """A function that adds to what a stage has finished and tells `progress` the sum."""
    finished = 0

    def report(n: int) -> None:
        nonlocal finished
        finished += n
        if progress is not None:
            progress(stage, finished, total)

    return report
