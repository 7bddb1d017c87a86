"""VADER's compound score: how positive the wording is. It measures tone, not harmlessness."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from neat_align.errors import RewardError
from neat_align.prompts.rows import Prompt
from neat_align.rewards.protocol import CompletionInput, completion_text


class VaderReward:
    """VADER compound in [-1, 1] (Hutto & Gilbert 2014): a lexicon and rules for English tone.

    It says nothing of harm: on HH-RLHF's harmless pairs it agrees with people 47 % of the time,
    below chance. It likes gushing. An empty completion has no tone, so it abstains there.
    """

    name = "vader"

    def __init__(self) -> None:
        try:
            module = importlib.import_module("vaderSentiment.vaderSentiment")
        except ImportError as error:
            raise RewardError(
                "the reward 'vader' needs the vaderSentiment package. Run: pip install "
                "vaderSentiment"
            ) from error
        self._analyzer: Any = module.SentimentIntensityAnalyzer()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        """The compound score of each completion by itself; the prompt is not looked at."""
        texts = map(completion_text, completions)
        return [
            float(self._analyzer.polarity_scores(text)["compound"]) if text.strip() else None
            for text in texts
        ]
