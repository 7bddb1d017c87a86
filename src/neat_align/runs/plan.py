"""How much a run will do, and with what share of its data: said before anything is paid for."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from neat_align.config import NEATConfig
from neat_align.rounds.prompt_order import percent_of_data, prompt_at

WIDTH = 80


@dataclass(frozen=True)
class RunPlan:
    """What a run does if nothing stops it and every prompt gives a pair to rank.

    A prompt without a pair is replaced by another, up to twice the prompts of a round.

    Attributes:
        rows: rows of the training data that can be used.
        rounds: rounds of the whole run.
        prompts_per_round: prompts of a round.
        completions_per_prompt: completions sampled for each; the data's own answers come on top.
        prompt_tokens: tokens of all those prompts, each counted once; None: not known.
        max_completion_length: tokens of a completion at most.
        optimizer_steps: steps of the whole run.
    """

    rows: int
    rounds: int
    prompts_per_round: int
    completions_per_prompt: int
    prompt_tokens: int | None
    max_completion_length: int
    optimizer_steps: int

    @property
    def prompts(self) -> int:
        """Prompts of all rounds."""
        return self.rounds * self.prompts_per_round

    @property
    def completions(self) -> int:
        """Sampled completions of all rounds."""
        return self.prompts * self.completions_per_prompt

    @property
    def share(self) -> float:
        """Prompts by rows: above 1, a part of the data is used more than once."""
        return self.prompts / self.rows

    def to_json(self) -> dict[str, Any]:
        """Plain data, for run.json."""
        return {
            **asdict(self),
            "prompts": self.prompts,
            "completions": self.completions,
            "max_completion_tokens": self.completions * self.max_completion_length,
            "share_of_data": self.share,
        }

    def lines(self, *, more: str, done_steps: int = 0) -> list[str]:
        """The plan in a few lines of at most 80 columns.

        `more` says how to use all of the data. `done_steps` were made before a resumed run goes on.
        """
        rounds = _counted(self.rounds, "round")
        of_rounds = f"{rounds} of {_counted(self.prompts_per_round, 'prompt')}"
        steps = _counted(self.optimizer_steps, "optimizer step")
        if done_steps:
            steps += f" ({done_steps:,} done)"
        data = (
            f"{_counted(self.prompts, 'prompt')}: {percent_of_data(self.share)} of the data "
            f"({_counted(self.rows, 'row')})"
        )
        if self.share < 1:
            data += f"; {more}"
        elif self.share > 1:
            data += "; the last round goes on into another pass"
        sampled = "no completions are sampled"
        if self.completions:
            tokens = self.completions * self.max_completion_length
            count = _counted(self.completions, "completion")
            sampled = f"{count} of at most {_counted(tokens, 'token')}"
            if self.prompt_tokens is not None:
                sampled += f", from prompts of {_counted(self.prompt_tokens, 'token')}"
            if self.rows > self.prompts_per_round:
                sampled += "; more where prompts give nothing to learn from, at most twice as many"
        plan = of_rounds if not self.optimizer_steps else f"{of_rounds}, {steps}"
        parts = [f"plan: {plan}", f"data: {data}", f"sampling: {sampled}"]
        return [
            line
            for part in parts
            for line in textwrap.wrap(part, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        ]


def plan_run(
    args: NEATConfig,
    prompt_lengths: Sequence[int],
    *,
    prompts_per_round: int,
    steps_per_round: int,
) -> RunPlan:
    """The plan of a run over prompts of these lengths in tokens, one entry a row."""
    rows = len(prompt_lengths)
    rounds = number_of_rounds(args, rows, prompts_per_round, steps_per_round)
    return RunPlan(
        rows=rows,
        rounds=rounds,
        prompts_per_round=prompts_per_round,
        completions_per_prompt=args.num_generations,
        prompt_tokens=_tokens_of_stream(prompt_lengths, args.seed, rounds * prompts_per_round),
        max_completion_length=args.max_completion_length,
        optimizer_steps=args.max_steps if args.max_steps > 0 else rounds * steps_per_round,
    )


def number_of_rounds(
    args: NEATConfig, rows: int, prompts_per_round: int, steps_per_round: int
) -> int:
    """Rounds of the whole run: from `max_steps`, `data_passes` or `num_train_epochs`.

    As many rounds as give at least that many passes: the last one may be of the next pass in part.
    """
    if args.max_steps > 0:
        return -(-args.max_steps // steps_per_round)
    if args.data_passes is not None:
        prompts = Fraction(str(args.data_passes)) * rows  # 0.1 is a tenth here
        return -int(-prompts // prompts_per_round)
    return int(args.num_train_epochs)


def _tokens_of_stream(lengths: Sequence[int], seed: int, prompts: int) -> int:
    """Tokens of the first prompts of the endless stream (`prompt_order`)."""
    passes, rest = divmod(prompts, len(lengths))
    start = passes * len(lengths)
    last = sum(lengths[prompt_at(len(lengths), seed, start + i)] for i in range(rest))
    return passes * sum(lengths) + last


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
