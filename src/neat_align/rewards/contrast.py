"""The contrast self-reward: how much likelier an answer is under the positive instruction than
under the negative one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neat_align.errors import RewardError
from neat_align.prompts.rows import Prompt, TemplateInputs
from neat_align.prompts.template_inputs import COLUMNS, read_template_inputs
from neat_align.rewards.protocol import CompletionInput

Scorer = Callable[[list[list[int]], list[list[int]]], list[float]]
# (prompt, polarity), and the row's template inputs where it has any.
Renderer = Callable[..., list[int]]


@dataclass(frozen=True)
class ContrastReward:
    """(log π(y | x, positive) − log π(y | x, negative)) / |y|, in nats per token (DLMA,
    arXiv:2402.11907).

    `score(prompt_ids, completion_ids)` gives, a row, the sum over completion tokens of
    log-probabilities in nats; `render(prompt, polarity)` gives the token ids of the prompt with
    that polarity's instruction, generation prompt included; of a row with `tools` or
    `chat_template_kwargs` it is given those as a third argument, a `TemplateInputs`. DLMA uses the
    sum; dividing by length keeps long answers from winning by length. A completion without tokens
    abstains. The score is the policy's own opinion: it moves as the policy does.
    """

    score: Scorer
    render: Renderer
    name: str = "contrast"

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        """Nats per token for each row."""
        rows = [i for i, ids in enumerate(completion_ids) if len(ids) > 0]
        answers = [list(completion_ids[i]) for i in rows]
        inputs = [_template_inputs(columns, i) for i in rows]
        positive, negative = (
            [
                self.render(prompts[i], polarity, *given)
                for i, given in zip(rows, inputs, strict=True)
            ]
            for polarity in ("positive", "negative")
        )
        for i, good, bad in zip(rows, positive, negative, strict=True):
            if good == bad:
                raise RewardError(
                    f"row {i}'s prompt is the same tokens under the positive and the negative "
                    "instruction, so its contrast would always be 0: check the instructions, and "
                    "that the chat template keeps them"
                )
        rewards: list[float | None] = [None] * len(completion_ids)
        if not rows:
            return rewards
        sums = [
            self._sums(prompt_ids, answers, polarity)
            for prompt_ids, polarity in ((positive, "positive"), (negative, "negative"))
        ]
        for i, answer, good_sum, bad_sum in zip(rows, answers, *sums, strict=True):
            rewards[i] = (good_sum - bad_sum) / len(answer)
        return rewards

    def _sums(
        self, prompt_ids: list[list[int]], answers: list[list[int]], polarity: str
    ) -> list[float]:
        # Copies: whoever scores may add to what it is given, and the answers are scored twice.
        sums = self.score([list(ids) for ids in prompt_ids], [list(ids) for ids in answers])
        if len(sums) != len(answers):
            raise RewardError(
                f"the contrast's scorer returned {len(sums)} sums for {len(answers)} completions"
            )
        for i, value in enumerate(sums):
            if not math.isfinite(value):
                raise RewardError(
                    f"the log-probability under the {polarity} instruction is {value} (scored "
                    f"completion {i})"
                )
        return sums


def _template_inputs(columns: Mapping[str, Sequence[Any]], row: int) -> tuple[TemplateInputs, ...]:
    """What the row's columns give its chat template; nothing where they give nothing."""
    own = {name: columns[name][row] for name in COLUMNS if name in columns}
    inputs = read_template_inputs(own)
    return (inputs,) if inputs else ()
