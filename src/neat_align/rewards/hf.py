"""A sequence-classification model from the Hugging Face ecosystem as a reward function."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate.utils.memory import clear_device_cache
from jinja2 import TemplateError
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from neat_align.errors import RewardError
from neat_align.modeling.device import compute_device
from neat_align.modeling.load_options import in_few_bits
from neat_align.modeling.text_config import context_length
from neat_align.prompts.rows import Message, Prompt
from neat_align.rewards.protocol import CompletionInput, Score, Unscorable, completion_text

logger = logging.getLogger(__name__)
_INSTEAD = "or leave it out: a reward model is loaded in the type in which it was saved"
# Tokenizers that know no limit say 1e30.
_NO_LIMIT = 1_000_000


@dataclass(frozen=True, slots=True)
class _Encoded:
    ids: list[int]
    types: list[int]


class _UnscorableError(Exception):
    """A row that the model cannot score; the message is the reason."""


class ModelReward:
    """The single output of a sequence-classification model, read from its own tokenizer and chat
    template.

    With a chat template, the row is rendered as a conversation that ends with the completion (a
    text prompt is one user turn). Without one, prompt and completion go in as a text pair, which is
    only defined for text prompts and for conversations of one user turn. A row that is longer than
    the model takes, or that template or tokenizer have no form for, is `Unscorable`; nothing is
    cut.

    Batches are sorted by length, padded on the right and masked by length; results are in the rows'
    order and do not depend on `batch_size`. Where the model has a pad token its own pooling rule
    stands; where it has none, the last token is pooled, as for a single row. `bf16` computes under
    bf16 autocast. When memory runs out `batch_size` is halved. A model on the CPU moves to the
    accelerator if there is one; a dispatched or quantised model stays where it is.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        batch_size: int = 16,
        bf16: bool = False,
    ) -> None:
        if batch_size < 1:
            raise RewardError(
                f"the reward model's batch_size is {batch_size}; it must be 1 or more"
            )
        config: Any = model.config
        source = str(getattr(config, "_name_or_path", "") or "")
        self.name = name or Path(source).name or type(model).__name__
        _check_num_labels(self.name, config)
        self.tokenizer: Any = _tokenizer_for(self.name, source) if tokenizer is None else tokenizer
        added = self.tokenizer.added_tokens_decoder.values()
        self._special = [token.content for token in added if token.special]
        self.model = _placed(model)
        self.batch_size = batch_size
        self.bf16 = bf16
        self._config: Any = config.get_text_config()
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        # Only where segments have an embedding of their own: GPT-2 takes the argument too, and adds
        # word embeddings for it.
        has_types = (getattr(self._config, "type_vocab_size", 0) or 0) > 1
        self._takes_types = (
            has_types and "token_type_ids" in inspect.signature(base.forward).parameters
        )
        self._max_length = _max_length(self.tokenizer, self._config, base)

    @classmethod
    def from_name(
        cls,
        name: str,
        tokenizer: Any = None,
        *,
        batch_size: int = 16,
        bf16: bool = False,
        bits: Literal[4, 8] | None = None,
    ) -> ModelReward:
        """Load a model by hub name or folder; with `bits` its linear layers are held in so many.

        OSError when there is no such model, ConfigError where this machine has no kernels for bits.
        """
        held = {} if bits is None else in_few_bits(bits, f"reward_load_in_{bits}bit", _INSTEAD)
        # No code that comes with a model is run, and no pickle is read.
        _check_num_labels(name, AutoConfig.from_pretrained(name, trust_remote_code=False))
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype="auto",
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **held,
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise RewardError(
                f"the reward model {name!r} has no weights for {', '.join(missing[:3])}: its "
                "scores would be random. It must be a trained sequence-classification model, not "
                "a language model"
            )
        return cls(model, tokenizer, name=Path(name).name, batch_size=batch_size, bf16=bf16)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[CompletionInput],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[Score]:
        """The model's logit for each row, `Unscorable` for one that it cannot score.

        The policy's token ids are not used: this tokenizer is another one.
        """
        scores: list[Score] = [None] * len(completions)
        rows: dict[int, _Encoded] = {}
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                rows[i] = self._encode(prompt, completion)
            except _UnscorableError as error:
                scores[i] = Unscorable(str(error))
        order = sorted(rows, key=lambda i: len(rows[i].ids), reverse=True)
        self.model.eval()
        start = 0
        while start < len(order):
            batch = order[start : start + self.batch_size]
            values = self._in_memory([rows[i] for i in batch])
            if values is not None:
                start += len(batch)
                for i, value in zip(batch, values, strict=True):
                    scores[i] = value
        return scores

    def unscorable_prompts(self, prompts: Sequence[Prompt]) -> dict[int, str]:
        """The reason by position, for prompts no answer to which has a score: over the model's
        context already, or without a form that template and tokenizer have.
        """
        return {
            i: reason
            for i, prompt in enumerate(prompts)
            if self._may_be_unscorable(prompt) and (reason := self._refused(prompt)) is not None
        }

    def _may_be_unscorable(self, prompt: Prompt) -> bool:
        """A cheap look, for data of a million prompts: most are far too short to be too long."""
        if not _is_one_turn(prompt):
            return True
        if self._max_length is None:
            return False
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        # A token is a byte or more; the template adds as much as it adds to any prompt.
        return len(text.encode("utf-8", "replace")) + self._template_tokens > self._max_length

    @functools.cached_property
    def _template_tokens(self) -> int:
        return len(self._tokenized("a", "a")["input_ids"])

    def _refused(self, prompt: Prompt) -> str | None:
        try:
            self._encode(prompt, "a")  # the shortest answer there is
        except _UnscorableError as error:
            return str(error)
        return None

    def _encode(self, prompt: Prompt, completion: CompletionInput) -> _Encoded:
        """Raises _UnscorableError."""
        try:
            encoded = self._tokenized(prompt, completion)
        except TemplateError as error:
            raise _UnscorableError(
                f"is refused by the chat template of the reward model {self.name!r} ({error})"
            ) from error
        ids = list(encoded["input_ids"])
        if not ids:
            raise _UnscorableError(
                f"has no tokens for the reward model {self.name!r}: prompt and completion are empty"
            )
        if self._max_length is not None and len(ids) > self._max_length:
            raise _UnscorableError(
                f"has {len(ids)} tokens for the reward model {self.name!r}, which takes "
                f"{self._max_length}: shorten max_prompt_length or max_completion_length, or "
                "choose a model with a longer context"
            )
        return _Encoded(ids, list(encoded["token_type_ids"]))

    def _tokenized(self, prompt: Prompt, completion: CompletionInput) -> Any:
        if not getattr(self.tokenizer, "chat_template", None):
            only, answer = self._only_turn(prompt), completion_text(completion)
            as_text = any(token in text for text in (only, answer) for token in self._special)
            return self.tokenizer(
                only, answer, return_token_type_ids=True, split_special_tokens=as_text
            )
        messages = [*_messages(prompt, "user"), *_messages(completion, "assistant")]
        if any(token in message["content"] for message in messages for token in self._special):
            # An answer that spells a control token out must not end its own turn and go on as
            # the user.
            ids = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=False, sanitize_control_tokens=True
            )
            return {"input_ids": ids, "token_type_ids": [0] * len(ids)}
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False, return_token_type_ids=True)

    def _only_turn(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        if _is_one_turn(prompt):
            return str(prompt[0]["content"])
        raise _UnscorableError(
            f"has a prompt of {len(prompt)} messages, and the tokenizer of the reward model "
            f"{self.name!r} has no chat template to join them: pass a reward processing class "
            "whose chat_template is set, in the form that the model was trained on"
        )

    def _in_memory(self, rows: Sequence[_Encoded]) -> list[float] | None:
        """The batch's logits, or None when memory ran out and `batch_size` was halved.

        Raises RewardError for a row that alone is too large.
        """
        try:
            return self._forward(rows)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise RewardError(
                    f"memory ran out while the reward model {self.name!r} scored one row of "
                    f"{len(rows[0].ids)} tokens: shorten max_completion_length, or choose a "
                    "smaller reward model"
                ) from error
            self.batch_size = len(rows) // 2
            logger.warning(
                "memory ran out while the reward model %r scored %d rows at once: from now on it "
                "scores %d",
                self.name,
                len(rows),
                self.batch_size,
            )
        # Outside of the except block: the exception would keep the failed batch's tensors alive.
        clear_device_cache(garbage_collection=True)
        return None

    @torch.no_grad()
    def _forward(self, rows: Sequence[_Encoded]) -> list[float]:
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(row.ids) for row in rows])
        width = int(lengths.max())
        own_pad = self._config.pad_token_id
        has_pad = own_pad is not None and own_pad >= 0
        pad = own_pad if has_pad else _unused_as_last(rows)
        inputs = {
            "input_ids": torch.tensor(
                [row.ids + [pad] * (width - len(row.ids)) for row in rows], device=device
            ),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long().to(device),
        }
        if self._takes_types:
            inputs["token_type_ids"] = torch.tensor(
                [row.types + [0] * (width - len(row.types)) for row in rows], device=device
            )
        with (
            _pad_token(self._config, pad),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16),
        ):
            logits = self.model(**inputs).logits
        if logits.shape != (len(rows), 1):
            raise RewardError(
                f"the reward model {self.name!r} returned logits of shape {tuple(logits.shape)}; "
                f"({len(rows)}, 1) was needed"
            )
        return cast("list[float]", logits[:, 0].float().cpu().tolist())


def _check_num_labels(name: str, config: Any) -> None:
    if config.num_labels != 1:
        labels = ", ".join(str(label) for label in list(config.id2label.values())[:4])
        raise RewardError(
            f"the reward model {name!r} has {config.num_labels} labels ({labels}); a reward model "
            "has one output (num_labels 1). For a classifier, write a reward function that "
            "returns the probability of the label you want"
        )


def _tokenizer_for(name: str, source: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RewardError(
            f"the tokenizer of the reward model {name!r} cannot be loaded from {source!r}: pass "
            "it as its reward processing class"
        ) from error


def _placed(model: torch.nn.Module) -> torch.nn.Module:
    on_cpu = next(model.parameters()).device.type == "cpu"
    device = compute_device()
    if on_cpu and device.type != "cpu" and getattr(model, "hf_device_map", None) is None:
        return model.to(device)
    return model


def _max_length(tokenizer: Any, config: Any, model: torch.nn.Module) -> int | None:
    """The tokens that a row may have; None where neither tokenizer nor configuration says."""
    positions = context_length(config)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the pad's: 514 of them are 512 tokens.
        if (
            name.endswith("position_embeddings")
            and isinstance(module, torch.nn.Embedding)
            and module.padding_idx is not None
        ):
            positions = module.num_embeddings - module.padding_idx - 1
    limits = [getattr(tokenizer, "model_max_length", None), positions]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < _NO_LIMIT]
    return min(known, default=None)


def _unused_as_last(rows: Sequence[_Encoded]) -> int:
    """A token id that ends no row.

    With it as the pad, pooling on "the last token that is not a pad" finds each row's real end.
    """
    last = {row.ids[-1] for row in rows}
    return next(i for i in range(len(last) + 1) if i not in last)


@contextmanager
def _pad_token(config: Any, pad: int) -> Iterator[None]:
    """Give the model's pooling a pad token for one forward pass."""
    before = config.pad_token_id
    config.pad_token_id = pad
    try:
        yield
    finally:
        config.pad_token_id = before


def _is_one_turn(prompt: Prompt) -> bool:
    return isinstance(prompt, str) or [m["role"] for m in prompt] == ["user"]


def _messages(turn: Prompt, role: str) -> list[Message]:
    return [{"role": role, "content": turn}] if isinstance(turn, str) else list(turn)
