"""How near an answer is to the data's own one: the cosine of their sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neat_align.prompts.rows import Prompt
from neat_align.rewards.minilm_tone import find_encoder, load_encoder
from neat_align.rewards.protocol import CompletionInput, Score, Unscorable, completion_text

_NO_ANSWER = (
    "has no chosen answer, and the reward 'similarity' is the nearness to that: give the row one, "
    "or use another reward"
)


class SimilarityReward:
    """Cosine, in [-1, 1], of the embeddings of a completion and of its row's `chosen` answer.

    What Self-Contrast (arXiv:2404.00604) tells negatives by: of a policy's own answers those that
    are least like the answer to learn. Embeddings are those of `MiniLMEncoder` (that paper's come
    from larger encoders). It knows what a text is about, hardly whether it is right. An empty
    completion abstains; a row without a chosen answer cannot be scored. The chosen answer itself,
    cut at max_completion_length, is held against the whole of it.
    """

    name = "similarity"

    def __init__(self) -> None:
        self._source = find_encoder(f"the reward {self.name!r}")

    def unscorable_answers(self, chosen: Sequence[str | None]) -> dict[int, str]:
        """The reason by position, for rows without a chosen answer."""
        return {i: _NO_ANSWER for i, text in enumerate(chosen) if _is_blank(text)}

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        chosen: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[Score]:
        """The cosine for each completion; the prompt is not looked at."""
        texts = [completion_text(completion).strip() for completion in completions]
        answers = ["" if text is None else text.strip() for text in chosen or [None] * len(texts)]
        rows = [i for i, text in enumerate(texts) if text and answers[i]]
        place = {
            text: n for n, text in enumerate({x: 0 for i in rows for x in (texts[i], answers[i])})
        }
        scores: list[Score] = [None if answer else Unscorable(_NO_ANSWER) for answer in answers]
        vectors = load_encoder(self._source).embed(list(place)) if rows else None
        for i in rows:
            assert vectors is not None
            cosine = float(vectors[place[texts[i]]] @ vectors[place[answers[i]]])
            scores[i] = max(-1.0, min(1.0, cosine))
        return scores


def _is_blank(text: str | None) -> bool:
    return text is None or not text.strip()
