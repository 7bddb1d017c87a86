"""Small rounds without a model: answers, rewards and prompts are functions of seeds and numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neat_align.prompts.instruction_banks import InstructionBank, InstructionPair
from neat_align.prompts.rows import PromptRow
from neat_align.rewards.protocol import NamedReward
from neat_align.rounds.make_round import make_round
from neat_align.rounds.params import RoundParams, RoundTools
from neat_align.rounds.round_files import FinishedRound
from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, SamplingParams
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer("none")
EOS = TOKENIZER.eos_token_id
BANK = InstructionBank("b", "", (InstructionPair("Be very kind.", "Be very rude."),))
PARAMS = RoundParams(
    seed=3,
    num_positive=1,
    num_negative=1,
    num_plain=1,
    use_human_completions=False,
    placement="user_suffix",
    sampling=SamplingParams(8),
    rank_by="reward",
    reward_margin=0.0,
    max_prompt_length=200,
)


def letters(seed: int, length: int) -> tuple[int, ...]:
    """Tokens of printable text, a function of the seed."""
    return tuple(
        TOKENIZER.convert_tokens_to_ids(chr(97 + (seed >> 5 * k) % 26)) for k in range(length)
    )


class Seeded:
    """Answers that are a function of the request, as `answer` says; keeps what it was asked for."""

    def __init__(self) -> None:
        self.requests: list[SampleRequest] = []

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        self.requests += requests
        if progress is not None:
            progress(len(requests))
        return [self.answer(r, r.limit(params)) for r in requests]

    def answer(self, request: SampleRequest, limit: int) -> Sample:
        """Some are cut at the limit, others end before."""
        length = request.seed % 9
        if length >= limit:
            return Sample(letters(request.seed, limit), "length", -float(limit))
        return Sample((*letters(request.seed, length), EOS), "stop", -float(length))


def scores(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    return [sum(ids) % 1009 / 1009 for ids in completion_ids]


def rows(count: int, chosen: str | None = None, rejected: str | None = None) -> list[PromptRow]:
    return [
        PromptRow(f"id-{i}", f"Question {i}:", chosen, rejected, {}, f"row {i}")
        for i in range(count)
    ]


def tools(sampler: Sampler, reward: Any = scores, **changes: Any) -> RoundTools:
    given = {
        "tokenizer": TOKENIZER,
        "bank": BANK,
        "rewards": (NamedReward("r", reward, 1.0),),
        "sampler": sampler,
        "negative_sampler": sampler,
        "batch_size": 6,
    }
    return RoundTools(**{**given, **changes})


def run(
    folder: Path, t: RoundTools, *, p: RoundParams, data: Sequence[PromptRow], **changes: Any
) -> FinishedRound:
    """The first round of all of `data`."""
    options: dict[str, Any] = {"num_groups": len(data), "position": 0, "round_index": 0, **changes}
    return make_round(data, params=p, tools=t, folder=folder, **options)


def files_of(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """Every file below the folder, by its relative path."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob(pattern))
        if p.is_file()
    }
