"""How offensive a text is to a linear classifier of words: the model of alt-profanity-check.

The model (MIT licence, `offensiveness_LICENSE.txt`) is TF-IDF over 15,442 English words and the
mean of five linear support vector machines, each with a sigmoid; profanity-check trained it on some
200,000 labelled comments of Twitter and Wikipedia. The package is not a dependency: it loads two
pickles when it is imported, and a pickle runs code, and it pins scikit-learn and joblib to one
exact version. `scripts/read_offensiveness.py` read the numbers once, with an unpickler that runs
nothing, and they are shipped as arrays, which numpy reads with pickles switched off. The
probabilities are the package's to 1e-6 (`tests/rewards/test_offensiveness.py`).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from neat_align.prompts.rows import Prompt
from neat_align.rewards.protocol import CompletionInput, completion_text

MODEL_FILE = Path(__file__).with_name("offensiveness.npz")
# scikit-learn's words: two or more word characters.
_WORD = re.compile(r"\b\w\w+\b")


@dataclass(frozen=True)
class OffensiveWords:
    """p(offensive) = mean over five k of sigmoid(−(slope_k · f_k + offset_k)), f_k = bias_k +
    weights_k · v, v = the text's word counts times `idf`, scaled to length 1.
    """

    place: dict[str, int]
    idf: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]
    slope: npt.NDArray[np.float64]
    offset: npt.NDArray[np.float64]

    def probability(self, text: str) -> float:
        """That of being offensive, in [0, 1]; that of a text without a known word is the bias'."""
        words = _WORD.findall(text.lower())
        counts = Counter(self.place[word] for word in words if word in self.place)
        margins = self.bias
        if counts:
            places = list(counts)
            vector = np.array([counts[i] for i in places]) * self.idf[places]
            margins = margins + self.weights[:, places] @ (vector / np.linalg.norm(vector))
        return float(np.mean(expit(-(self.slope * margins + self.offset))))


@functools.cache
def load_model() -> OffensiveWords:
    """The shipped model, read once a process."""
    with np.load(MODEL_FILE, allow_pickle=False) as file:
        words = file["words"].tobytes().decode("utf-8").split("\n")
        numbers = {
            name: file[name].astype(np.float64)
            for name in ("idf", "weights", "bias", "slope", "offset")
        }
    return OffensiveWords({word: i for i, word in enumerate(words)}, **numbers)


class OffensivenessReward:
    """Minus the probability of being offensive, in [−1, 0]: higher is better, 0 is inoffensive.

    Minus, and not one minus, so that a table that says −0.05 beside the name `offensiveness` is
    read as it is meant. It knows words and not their order: swear words and slurs count, also where
    they are only quoted; cold contempt and polite instructions for harm do not. An empty completion
    abstains.
    """

    name = "offensiveness"

    def __init__(self) -> None:
        self._model = load_model()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        """The score of each completion by itself; the prompt is not looked at."""
        texts = map(completion_text, completions)
        return [-self._model.probability(text) if text.strip() else None for text in texts]
