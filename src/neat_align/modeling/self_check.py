"""A model compared with itself, on tiny rows, before anything is sampled.

What a model says of a row that stands alone, given its token ids and nothing else, is what the
policy says. Everything done for speed has to give the same: other rows beside it, padding, packed
rows. So has the forward pass in training mode, or the policy that learns would be another one than
the one that samples and is scored. `layout.choose_layout` and the samplers ask here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from neat_align.errors import ConfigError, one_line
from neat_align.modeling.logprobs import padded_logprobs
from neat_align.modeling.packing import PaddedRows, TokenIds, pad_rows
from neat_align.modeling.precision import autocast, inference
from neat_align.modeling.rounding import Limit, own_type, rounding_limit
from neat_align.modeling.shared_prefix import unwrapped
from neat_align.modeling.text_config import text_config

# What a model's own code has been seen to raise on rows that it was not made for.
MODEL_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    AssertionError,
)
# (prompt, completion) lengths of the tiny rows: unequal in both and in sum.
_LENGTHS = ((9, 3), (4, 6), (6, 1))
# Of a model that draws random numbers in training mode: more passes, over up to so many tokens.
_RANDOM_PASSES, _LONG = 8, 128
# Parts of the names of a configuration's options that make the forward pass in training a random
# one.
_RANDOM_OPTIONS = ("dropout", "drop_path", "layerdrop", "jitter", "noise")


def tiny_rows(prompts: Sequence[TokenIds], *, one_at_a_time: bool = False) -> PaddedRows:
    """Three rows of unequal lengths from the tokens of real prompts."""
    tokens = [token for prompt in prompts for token in prompt]
    tokens = tokens * -(-max(p + c for p, c in _LENGTHS) // len(tokens))
    starts = [(i * (len(tokens) - p - c)) // len(_LENGTHS) for i, (p, c) in enumerate(_LENGTHS)]
    rows = [tokens[s : s + p + c] for s, (p, c) in zip(starts, _LENGTHS, strict=True)]
    return pad_rows(
        [row[:p] for row, (p, _) in zip(rows, _LENGTHS, strict=True)],
        [row[p:] for row, (p, _) in zip(rows, _LENGTHS, strict=True)],
        tokens[0],
        one_at_a_time=one_at_a_time,
    )


def _logprobs(model: torch.nn.Module, rows: PaddedRows) -> Float[Tensor, " tokens"]:
    device = next(model.parameters()).device
    return padded_logprobs(model, rows.to(device))[rows.completion_mask.to(device)]


def difference_in_a_batch(
    model: torch.nn.Module, prompts: Sequence[TokenIds], alone: Float[Tensor, " tokens"]
) -> float | None:
    """By how many nats a token rows in a padded batch differ from each alone; None: by rounding.

    `alone` is what `check_alone` gave of the same prompts.
    """
    limit = rounding_limit(model)
    try:
        with inference(model, None):
            batch = _logprobs(model, tiny_rows(prompts))
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS:
        return float("inf")
    difference = limit.measure(batch - alone)
    # In half precision other shapes alone round so differently that only more than that counts.
    return difference if limit.is_passed_by(difference / (1 if limit.exact else 4)) else None


def check_alone(model: torch.nn.Module, prompts: Sequence[TokenIds]) -> Float[Tensor, " tokens"]:
    """Refuse a model that token ids alone do not decide, or that sees what it should predict.

    Gives the log-probabilities of the tiny rows' completions, each row alone. Raises ConfigError.
    """
    name = type(unwrapped(model)).__name__
    limit = rounding_limit(model)
    if invocation_tokens(model):
        raise ConfigError(
            "the adapter has alora_invocation_tokens and acts only after them: one row of a batch, "
            "and one new token, does not say where that is; use LoRA without them"
        )
    try:
        with inference(model, None):
            first, again = (
                _logprobs(model, tiny_rows(prompts, one_at_a_time=True)) for _ in range(2)
            )
            shorter = _first_tokens(model, prompts)
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS as error:
        raise ConfigError(
            f"{_named(model)} fails when it is given token ids and nothing else "
            f"({one_line(error, 200)}): a policy that needs more cannot be trained "
            "here; choose another model or adapter"
        ) from error
    difference = limit.measure(first - again)
    if limit.is_passed_by(difference):
        raise ConfigError(
            f"{name} gives the same row other log-probabilities each time, {difference:.2g} nats "
            "per token apart, in evaluation mode: what it samples could not be scored. Choose "
            "another model"
        )
    starts = [sum(c for _, c in _LENGTHS[:i]) for i in range(len(_LENGTHS))]
    difference = limit.measure(first[starts] - shorter)
    # Far from any rounding: this ends the run.
    if limit.is_passed_by(difference / (10 if limit.exact else 5)):
        raise ConfigError(
            f"{name} sees the words that it should predict: a completion's first token gets "
            f"another log-probability, {difference:.2g} nats away, once more tokens follow it. A "
            "policy continues its prompt, so name a causal (decoder-only) language model"
        )
    return first


def _first_tokens(model: torch.nn.Module, prompts: Sequence[TokenIds]) -> Float[Tensor, " rows"]:
    """Log-probabilities of the tiny rows' first completion tokens, with nothing after them."""
    rows = tiny_rows(prompts)
    lengths = [p for p, _ in _LENGTHS]
    cut = pad_rows(
        [row[:n] for row, n in zip(rows.input_ids.tolist(), lengths, strict=True)],
        [row[n : n + 1] for row, n in zip(rows.input_ids.tolist(), lengths, strict=True)],
        0,
        one_at_a_time=True,
    )
    return _logprobs(model, cut)


def check_autocast(
    model: torch.nn.Module,
    prompts: Sequence[TokenIds],
    dtype: torch.dtype | None,
    *,
    one_at_a_time: bool = False,
) -> None:
    """Refuse a model whose code fails under autocast, or without it.

    `one_at_a_time` for a model that is given its rows so. Raises ConfigError.
    """
    if dtype is None:
        if own_type(model) is not None:
            raise ConfigError(
                f"attn_implementation is {unwrapped(model).config._attn_implementation}, whose "
                "kernels know bf16 and fp16 only, and bf16 and fp16 are false: set one to true, or "
                "use another attn_implementation"
            )
        return
    try:
        with inference(model, dtype):
            _logprobs(model, tiny_rows(prompts, one_at_a_time=one_at_a_time))
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS as error:
        raise ConfigError(
            f"{_named(model)} fails when it computes in {str(dtype).removeprefix('torch.')} "
            f"autocast ({one_line(error, 200)}): set bf16 (or fp16) to false"
        ) from error


def invocation_tokens(model: torch.nn.Module) -> Sequence[int]:
    """Tokens after which an adapter begins to act (aLoRA); none for every other adapter."""
    from peft import LoraConfig, PeftModel

    if not isinstance(model, PeftModel) or not isinstance(model.active_peft_config, LoraConfig):
        return ()
    return model.active_peft_config.alora_invocation_tokens or ()


def _named(model: torch.nn.Module) -> str:
    from peft import PeftModel

    name = type(unwrapped(model)).__name__
    if isinstance(model, PeftModel):
        kind = model.active_peft_config.peft_type
        return f"{name} with the adapter ({getattr(kind, 'value', kind)})"
    return name


def check_training_forward(
    model: torch.nn.Module, prompts: Sequence[TokenIds], *, one_at_a_time: bool = False
) -> None:
    """Refuse a model that computes something else in training mode than in evaluation mode.

    Dropout is expected to be off. `one_at_a_time` for a model that is given its rows so. Raises
    ConfigError that names the options that may be the reason.
    """
    limit = rounding_limit(model)
    name = type(unwrapped(model)).__name__
    rows = tiny_rows(prompts, one_at_a_time=one_at_a_time)
    was_training = model.training
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            difference, draws = _difference_in_training(model, rows, limit)
            if draws:  # what is random need not show in every token
                for long in [_long_rows(prompts, one_at_a_time)] * _RANDOM_PASSES:
                    difference = max(difference, _difference_in_training(model, long, limit)[0])
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS as error:
        raise ConfigError(
            f"{name} fails in training mode on rows that it scores in evaluation mode "
            f"({one_line(error, 300)}): choose another model"
        ) from error
    finally:
        model.train(was_training)
    if not limit.is_passed_by(difference):
        return
    random = _random_options(model)
    where = f" (its configuration has {', '.join(random)})" if random else ""
    raise ConfigError(
        f"{name} computes something else in training mode than in evaluation mode, "
        f"{difference:.2g} nats per token apart{where}: the policy that learns would not be "
        "the one that samples and is scored. Switch off what adds noise or drops parts of the "
        "model in training (in its configuration, or a hook that was put on it), or choose another "
        "model"
    )


def _difference_in_training(
    model: torch.nn.Module, rows: PaddedRows, limit: Limit
) -> tuple[float, bool]:
    """Nats per token between both modes, and whether training mode drew random numbers."""
    device = next(model.parameters()).device
    with inference(model, None):
        scored = _logprobs(model, rows)
    model.train()
    before = _random_state(device)
    with torch.no_grad(), autocast(device.type, own_type(model)):
        difference = limit.measure(_logprobs(model, rows) - scored)
    return difference, not torch.equal(before, _random_state(device))


def _long_rows(prompts: Sequence[TokenIds], one_at_a_time: bool) -> PaddedRows:
    """The prompts themselves, or their first tokens, all but the first of each predicted."""
    rows = [list(p if len(p) > 1 else [*p, *p])[:_LONG] for p in prompts]
    return pad_rows(
        [row[:1] for row in rows], [row[1:] for row in rows], 0, one_at_a_time=one_at_a_time
    )


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _random_options(model: torch.nn.Module) -> list[str]:
    """Options of a model's configuration that may make its training a random one."""
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        return []
    return [
        f"{name}: {value}"
        for name, value in sorted(vars(text_config(inner.config)).items())
        if any(part in name for part in _RANDOM_OPTIONS)
        and isinstance(value, int | float)
        and value
    ]


@contextlib.contextmanager
def showing_adapter(model: torch.nn.Module) -> Iterator[None]:
    """While open, no part of an adapter is without effect.

    A new adapter often changes nothing yet: one of its factors is zero, or all its scales are one.
    Such weights hold one number throughout; they are moved away from it and put back exactly.
    """
    from peft import PeftModel

    moved: list[tuple[torch.nn.Parameter, Any]] = []
    if isinstance(model, PeftModel):
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if not parameter.requires_grad or parameter.numel() == 0:
                continue
            value = parameter.detach().flatten()[0].item()
            if not bool((parameter.detach() == value).all()):
                continue
            moved.append((parameter, value))
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            with torch.no_grad():
                parameter.add_(noise.to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in moved:
                parameter.fill_(value)
