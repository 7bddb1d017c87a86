"""Decoding from the contrast of instructions inside of `generate`, for who cannot train.

At every token the model is also asked what it would write under each pair's positive and negative
instruction, and the next token comes from the distribution of `modeling/contrast.py`. One more
cached pass a token, over 2 x pairs rows for each row of the batch, is what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from neat_align.errors import ConfigError
from neat_align.modeling.contrast import contrast_logprobs, mean_log_ratio
from neat_align.modeling.packing import TokenIds
from neat_align.modeling.precision import inference
from neat_align.modeling.requirements import context_of
from neat_align.modeling.shared_prefix import unwrapped
from neat_align.prompts.instruction_banks import InstructionBank, load_bank
from neat_align.prompts.rendering import prompt_ids
from neat_align.prompts.row_prompts import instructed_pairs
from neat_align.prompts.rows import Prompt, TemplateInputs
from neat_align.prompts.seeds import draw_pairs
from neat_align.prompts.template_check import check_template
from neat_align.sampling.row_kinds import read_rows
from neat_align.sampling.token_rows import TokenRows, left_padded
from neat_align.sampling.transformers_sampler import TransformersSampler


@dataclass(frozen=True)
class Contrast:
    """How far the instructions move what is decoded (`contrast_logprobs`).

    `alpha` 0 moves nothing. Only tokens of at least `min_p` times the likeliest one's
    probability are moved; 0 moves all. `clip` keeps each pair's log-ratio within ± so many nats;
    None leaves it. Raises ConfigError for other values.
    """

    alpha: float
    min_p: float = 0.05
    clip: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ConfigError(
                f"alpha is {self.alpha}; it must be a number of 0 or more (0 moves nothing; to "
                "move the other way, swap the instructions)"
            )
        if not 0 <= self.min_p < 1:
            raise ConfigError(
                f"min_p is {self.min_p}; it must be 0 (every token is moved) "
                "or more, and below 1 (only the likeliest token would be left to move)"
            )
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"clip is {self.clip}; it must be above 0 nats, or None for no limit")


def contrasted(
    start: Float[Tensor, "rows vocab"],
    instructed: Float[Tensor, "rows contexts vocab"],
    contrast: Contrast,
) -> Float[Tensor, "rows vocab"]:
    """log q in nats, from log p0 and the logits under each row's instructions.

    Those are in the order positive, negative, positive, negative … . What has probability 0 keeps
    it.
    """
    if contrast.alpha == 0:
        return start
    pairs = (
        (
            instructed[:, i].float().log_softmax(-1),
            instructed[:, i + 1].float().log_softmax(-1),
        )
        for i in range(0, instructed.shape[1], 2)
    )
    # −∞ − −∞ is no number: a model may rule a token out whatever it reads.
    ratio = mean_log_ratio(pairs, contrast.clip).masked_fill(start.isneginf(), 0.0)
    return contrast_logprobs(start, ratio, contrast.alpha, contrast.min_p)


class ContrastLogitsProcessor(LogitsProcessor):
    """Makes `model.generate` decode from q ∝ p0(·|x) · [p0(·|x,+) / p0(·|x,−)]^alpha.

    `prompts` are the rows that `generate` will be given, as token ids without padding; `pairs` are
    for each of them the same prompt under the positive and under the negative instruction of one or
    more pairs, whose log-ratio is averaged (all rows have equally many). `contrast_processor` makes
    all of it from prompts and an instruction bank; `inputs()` are the rows, padded on the left.

    The other options are those of `Contrast`. Temperature, top-p and top-k shape what is moved, as
    `generate` applies them afterwards; processors of its own that come before (repetition
    penalties, suppressed tokens) are part of p0.

    What it returns depends on the tokens alone, so that a processor can be used for any number of
    calls of `generate` with its prompts, also to go on with their answers, with
    `num_return_sequences`, beams and assistants. The caches of the instructed prompts are kept
    between tokens of a call; `reset` gives their memory back. After the model's weights have
    changed, begin with the prompts or call `reset`.

    Raises ConfigError for prompts and pairs that do not fit together, an encoder-decoder, a model
    that no way of sampling draws from rightly, and prompts of unequal lengths for one that minds
    padding. Which rows a model reads together is measured once, as for training.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prompts: Sequence[TokenIds],
        pairs: Sequence[Sequence[tuple[TokenIds, TokenIds]]],
        *,
        alpha: float = 1.0,
        min_p: float = 0.05,
        clip: float | None = None,
        pad_token_id: int = 0,
    ) -> None:
        self.contrast = Contrast(alpha, min_p, clip)
        self.model, self.pad_token_id = model, pad_token_id
        self.prompts = tuple(tuple(prompt) for prompt in prompts)
        self._contexts = [tuple(tuple(ids) for pair in of_row for ids in pair) for of_row in pairs]
        _check_rows(self.prompts, self._contexts)
        if unwrapped(model).config.is_encoder_decoder:
            raise ConfigError(
                f"{type(unwrapped(model)).__name__} has an encoder that reads the prompt: the "
                "contrast is for causal language models"
            )
        everything = [*self.prompts, *(ids for row in self._contexts for ids in row)]
        self._way = TransformersSampler(model, (), pad_token_id).settle(everything)
        if self._way != "together" and len(set(map(len, self.prompts))) > 1:
            raise ConfigError(
                f"{type(unwrapped(model)).__name__} gives a padded prompt other numbers than the "
                "prompt alone, and generate pads prompts of unequal lengths: make a processor for "
                "each length, or for each prompt"
            )
        self._longest = max(len(ids) for row in self._contexts for ids in row)
        self._limit = context_of(model)
        self._padded: tuple[Tensor, Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was generated, and give the memory of the caches back."""
        self._rows: TokenRows | None = None
        self._seen: Int[Tensor, "rows tokens"] | None = None

    def inputs(self) -> dict[str, Int[Tensor, "rows width"]]:
        """`input_ids` and `attention_mask` of the prompts for `generate`, on the model's device."""
        input_ids, mask = self._padded_prompts(next(self.model.parameters()).device)
        return {"input_ids": input_ids.clone(), "attention_mask": mask.clone()}

    def _padded_prompts(
        self, device: torch.device
    ) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
        """The prompts padded on the left, and their mask; made once, not for every token."""
        if self._padded is None or self._padded[0].device != device:
            self._padded = left_padded(self.prompts, self.pad_token_id, device)
        return self._padded

    def __call__(
        self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        """log q, in nats, of what follows each row of `input_ids`; `scores` are logits of p0.

        Raises ConfigError for rows that are not the prompts, and for a row that passes the model's
        context under its instructions.
        """
        if self.contrast.alpha == 0:
            return scores
        completions = self._completions(input_ids)
        length = self._longest + completions.shape[1]
        if self._limit is not None and length > self._limit:
            raise ConfigError(
                f"the longest prompt has {self._longest} tokens under its instructions, and with "
                f"{completions.shape[1]} tokens of the answer it passes the model's context of "
                f"{self._limit}: lower max_new_tokens, or shorten the prompt"
            )
        device = next(self.model.parameters()).device
        kind = device.type
        used = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with inference(self.model, used):
            logits = self._read(completions.to(device)).logits.to(scores.device)
        start = scores.float().log_softmax(-1)
        log_q = contrasted(start, logits.view(len(scores), -1, logits.shape[-1]), self.contrast)
        return log_q.to(scores.dtype)

    def _completions(self, input_ids: Int[Tensor, "rows tokens"]) -> Int[Tensor, "rows new"]:
        """What follows the prompt in each row; rows of one prompt stand together."""
        count, length = input_ids.shape
        if count % len(self.prompts):
            raise ConfigError(
                f"generate has {count} rows, and the contrast was made for {len(self.prompts)} "
                "prompts: give it those, in their order, or make a processor for these"
            )
        expected, mask = self._padded_prompts(input_ids.device)
        each, width = count // len(self.prompts), expected.shape[1]
        expected, hidden = (rows.repeat_interleave(each, 0) for rows in (expected, mask == 0))
        # The first place is where the longest prompt has no padding; others come of rows that were
        # padded to some longer length.
        for start in range(length - width + 1):
            window = input_ids[:, start : start + width]
            if bool(((window == expected) | hidden).all()):
                return input_ids[:, start + width :]
        window = input_ids[:, :width]
        wrong = 0
        if length >= width:
            wrong = ((window == expected) | hidden).all(-1).tolist().index(False) // each
        raise ConfigError(
            f"row {wrong + 1} of what generate was given does not begin with the prompt that the "
            f"contrast was made for ({len(self.prompts[wrong])} tokens, beginning with "
            f"{list(self.prompts[wrong][:8])}): call generate(**processor.inputs(), …), or pad "
            "the same prompts in the same order on the left"
        )

    def _read(self, completions: Int[Tensor, "rows new"]) -> TokenRows:
        """The instructed rows up to here: one token more than before, or read anew."""
        count = len(completions)
        order = self._continued(completions)
        if self._rows is None or order is None:
            self.reset()  # before the next cache is made
            each = count // len(self.prompts)
            answers = completions.tolist()
            rows = [
                (*ids, *answer)
                for i, answer in enumerate(answers)
                for ids in self._contexts[i // each]
            ]
            self._rows = read_rows(self.model, rows, self.pad_token_id, self._way)
        else:
            contexts = len(self._contexts[0])
            if order != list(range(count)):
                self._rows.keep([i * contexts + c for i in order for c in range(contexts)])
            self._rows.advance(completions[:, -1].repeat_interleave(contexts))
        self._seen = completions
        return self._rows

    def _continued(self, completions: Int[Tensor, "rows new"]) -> list[int] | None:
        """Which row of the last call each of these has one token more of; None where one has none.

        Beams change places among those of their prompt.
        """
        count, new = completions.shape
        if self._seen is None or self._seen.shape != (count, new - 1):
            return None
        if torch.equal(self._seen, completions[:, :-1]):
            return list(range(count))
        each = count // len(self.prompts)
        before = self._seen.view(-1, 1, each, new - 1)
        same = (completions[:, :-1].reshape(-1, each, 1, new - 1) == before).all(-1)
        if not bool(same.any(-1).all()):
            return None
        first = torch.arange(0, count, each, device=same.device)[:, None]
        order: list[int] = (same.int().argmax(-1) + first).flatten().tolist()
        return order


def _check_rows(
    prompts: Sequence[tuple[int, ...]], contexts: Sequence[tuple[tuple[int, ...], ...]]
) -> None:
    if not prompts or len(prompts) != len(contexts):
        raise ConfigError(
            f"there are {len(prompts)} prompts and pairs for {len(contexts)}: a contrast needs one "
            "prompt or more, and the instructed prompts of each"
        )
    counts = {len(of_row) // 2 for of_row in contexts}
    if counts == {0} or len(counts) > 1:
        raise ConfigError(
            f"the prompts have {', '.join(map(str, sorted(counts)))} pairs; all must have equally "
            "many, and at least one"
        )
    if not all(map(len, prompts)) or not all(len(ids) for row in contexts for ids in row):
        raise ConfigError(
            "a prompt is empty: its first token would be predicted from nothing; give it a token, "
            "such as the tokenizer's bos"
        )


def contrast_processor(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    bank: InstructionBank | str,
    *,
    alpha: float = 1.0,
    placement: str = "user_suffix",
    num_pairs: int = 3,
    min_p: float = 0.05,
    clip: float | None = None,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ContrastLogitsProcessor:
    """A `ContrastLogitsProcessor` for prompts (texts, or lists of messages) and a bank of pairs.

    `bank` is a shipped bank's name, the path of a YAML file, or a bank. Each prompt gets
    `num_pairs` of its pairs, or all where it has no more, drawn with `seed` and the prompt alone;
    they are put where `placement` says, as in training, and rendered with `chat_template_kwargs`.

    Raises ConfigError for options out of range and PromptError for a bank that cannot be read, and
    for a chat template that drops the instruction.
    """
    if num_pairs < 1:
        raise ConfigError(f"num_pairs is {num_pairs}; it must be 1 or more")
    known = load_bank(bank) if isinstance(bank, str) else bank
    inputs = TemplateInputs(None, chat_template_kwargs or {})
    for conversational in {not isinstance(prompt, str) for prompt in prompts}:
        check_template(tokenizer, known, placement, conversational=conversational, inputs=inputs)
    plain = [tuple(prompt_ids(tokenizer, prompt, inputs=inputs)) for prompt in prompts]
    contexts = []
    for prompt, ids in zip(prompts, plain, strict=True):
        name = " ".join(map(str, ids))
        drawn = draw_pairs(known, num_pairs, run_seed=seed, round_index=0, prompt_id=name)
        contexts.append(instructed_pairs(tokenizer, prompt, drawn, placement, inputs))
    return ContrastLogitsProcessor(
        model,
        plain,
        contexts,
        alpha=alpha,
        min_p=min_p,
        clip=clip,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
