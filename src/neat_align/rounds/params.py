"""What a round is made of and who does the work."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

from neat_align.prompts.instruction_banks import InstructionBank, Polarity
from neat_align.prompts.skipped_rows import OnBadRow
from neat_align.rewards.aggregation import Aggregation
from neat_align.rewards.protocol import NamedReward
from neat_align.rewards.scoring import ScoreFunction, score_answers
from neat_align.rounds.ranking import RankBy
from neat_align.sampling.protocol import Sampler, SamplingParams

# Where positive and negative answers begin.
ContrastFrom: TypeAlias = Literal["prompt", "branch"]
# Told (stage, finished, of how many).
Progress = Callable[[str, int, int], None]
# Prompts of a round, its first ones, whose answers are scored for metrics alone: `logps`, `kl` and
# `sampling/instruction_gap` are means over their tokens, and cost a forward pass over each. At most
# so many, and at most this share of a round: in a small one they would take longer than sampling.
MEASURED_PROMPTS = 16
MEASURED_SHARE = 1 / 8
# (prompt ids, completion ids) → per-token log-probabilities in nats, in order.
LogprobFunction = Callable[
    [Sequence[Sequence[int]], Sequence[Sequence[int]]], list[tuple[float, ...]]
]
# Fields of `RoundParams` that earlier versions did not have: unfinished rounds of these go on.
_LATER_FIELDS = frozenset(
    {
        *("contrast_pairs", "needs_pairs", "contrast_from", "weighing_pairs"),
        *("may_be_empty", "aggregation"),
    }
)


@dataclass(frozen=True)
class RoundParams:
    """What a round is made of. Counts are per prompt; `seed` is the run's.

    `contrast_pairs`: under how many instruction pairs a group keeps its prompt (`contrast_ids`).
    `weighing_pairs`: of how many of them, the first ones, completions keep their tokens' contrasts.
    `needs_pairs`: whether a group without two completions that can be ranked is left out.
    `may_be_empty`: whether a round may end without any group.
    `aggregation`: how the rewards of a completion become one.
    """

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
    contrast_pairs: int = 0
    needs_pairs: bool = True
    contrast_from: ContrastFrom = "prompt"
    weighing_pairs: int = 0
    may_be_empty: bool = False
    aggregation: Aggregation = "sum"

    def deciding(self) -> dict[str, Any]:
        """All of it as JSON: what decides a round's samples.

        Fields that earlier versions did not have are in it only where they are used.
        """
        decides: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        unused = {f.name: f.default for f in fields(self) if f.name in _LATER_FIELDS}
        return {k: v for k, v in decides.items() if k not in unused or v != unused[k]}

    def counts(self) -> tuple[tuple[Polarity, int], ...]:
        """How many completions of each origin are sampled.

        Good ones come first: of two equal texts the first is kept.
        """
        return (
            ("positive", self.num_positive),
            ("plain", self.num_plain),
            ("negative", self.num_negative),
        )

    def sampled_for(self, prompts: int) -> int:
        """How many completions are sampled for so many prompts that are sampled together."""
        alone = prompts == 1 and self.negative_source == "other_prompts"
        each = sum(n for origin, n in self.counts() if not (alone and origin == "negative"))
        return prompts * each


@dataclass(frozen=True)
class RoundTools:
    """Who does the work.

    `negative_sampler` writes the negatives. `policy_logprobs` and `ref_logprobs` are
    log-probabilities under the plain prompt, of the current and of the start policy (None: not
    computed; one function twice: computed once). The current policy's are for metrics only, so they
    are computed for the round's first prompts (`measured_prompts`); the start policy's for every
    completion, or, without `ref_for_all`, for the same ones. Where answers branch,
    `policy_logprobs` is needed: it also scores plain answers under the instructions.
    `start_logprobs` is the start policy again, whether or not `ref_logprobs` is computed: it scores
    completions under the instructions where tokens are weighed by that. `score` calls the rewards.
    `on_bad_row`: a completion that a reward cannot score is an error, or has no reward.
    `aggregation` is that of the round's parameters.

    A batch is `batch_size` completions: as many are sampled, or rewarded, at once, and then stored.
    `between_batches` is called before each: what it raises (a run that is asked to stop) loses no
    finished batch. `count_tokens` hears how many tokens were just sampled.
    """

    tokenizer: Any
    bank: InstructionBank
    rewards: tuple[NamedReward, ...]
    sampler: Sampler
    negative_sampler: Sampler
    policy_logprobs: LogprobFunction | None = None
    ref_logprobs: LogprobFunction | None = None
    ref_for_all: bool = True
    start_logprobs: LogprobFunction | None = None
    batch_size: int = 64
    between_batches: Callable[[], None] = lambda: None
    count_tokens: Callable[[int], None] = lambda tokens: None
    on_bad_row: OnBadRow = "error"
    score: ScoreFunction = score_answers
    aggregation: Aggregation = "sum"


def measured_prompts(prompts: int) -> int:
    """Of how many prompts of a round of so many the answers are scored for metrics alone."""
    return max(1, min(MEASURED_PROMPTS, math.ceil(prompts * MEASURED_SHARE)))


def progress_counter(progress: Progress | None, stage: str, total: int) -> Callable[[int], None]:
    """A function that adds to what a stage has finished and tells `progress` the sum."""
    finished = 0

    def report(n: int) -> None:
        nonlocal finished
        finished += n
        if progress is not None:
            progress(stage, finished, total)

    return report


class RoundProgress:
    """How far the stages of a round are, over all of its slices.

    `tell` hears of "sample" in completions and of "score" in prompts, of as many as the round is
    known to need: prompts that take the place of others are added to both.
    """

    def __init__(self, tell: Progress | None, params: RoundParams) -> None:
        self._tell = tell
        self._params = params
        self._prompts = self._alone = 0
        self._finished = {"sample": 0, "score": 0}

    def expect(self, prompts: int) -> None:
        """So many more prompts are in the round; they are sampled one beside the other."""
        if prompts == 1:
            self._alone += 1
        else:
            self._prompts += prompts

    def sampled(self, completions: int) -> None:
        """So many more completions are sampled."""
        self._add("sample", completions)

    def scored(self, prompts: int) -> None:
        """All completions of so many more prompts are scored."""
        self._add("score", prompts)

    def _add(self, stage: str, number: int) -> None:
        self._finished[stage] += number
        if self._tell is None:
            return
        total = self._prompts + self._alone
        if stage == "sample":
            count = self._params.sampled_for
            total = count(self._prompts) + self._alone * count(1)
        self._tell(stage, self._finished[stage], total)
