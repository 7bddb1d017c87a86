"""From what the user wrote (names, URLs, paths, models, functions) to named, weighted rewards."""

from __future__ import annotations

import functools
import importlib
import math
import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from neat_align.errors import NEATError, RewardError, did_you_mean
from neat_align.files.paths import is_surely_path, no_such_path
from neat_align.rewards.http import DEFAULT_TIMEOUT, HttpReward, check_tokens
from neat_align.rewards.judge import JudgeReward
from neat_align.rewards.judge_file import is_judge
from neat_align.rewards.protocol import AsksServer, NamedReward, RewardFunction, RewardSpec
from neat_align.rewards.vllm_reward import VllmReward, is_vllm


def _vader() -> RewardFunction:
    from neat_align.rewards.vader import VaderReward

    return VaderReward()


def _minilm_tone() -> RewardFunction:
    from neat_align.rewards.minilm_tone import MiniLMToneReward

    return MiniLMToneReward()


def _offensiveness() -> RewardFunction:
    from neat_align.rewards.offensiveness import OffensivenessReward

    return OffensivenessReward()


def _harmless_pairs() -> RewardFunction:
    from neat_align.rewards.harmless_pairs import HarmlessPairsReward

    return HarmlessPairsReward()


def _similarity() -> RewardFunction:
    from neat_align.rewards.similarity import SimilarityReward

    return SimilarityReward()


SHIPPED: dict[str, Callable[[], RewardFunction]] = {
    "vader": _vader,
    "minilm_tone": _minilm_tone,
    "offensiveness": _offensiveness,
    "harmless_pairs": _harmless_pairs,
    "similarity": _similarity,
}


def resolve_rewards(
    reward_funcs: RewardSpec | Sequence[RewardSpec],
    weights: Sequence[float] | None,
    processing_classes: Any = None,
    *,
    timeout: float | None = None,
    allow_http_hosts: Sequence[str] | None = None,
    bits: Literal[4, 8] | None = None,
) -> tuple[NamedReward, ...]:
    """Reward functions with their names and weights, in order.

    `weights` None is 1 for each. `processing_classes` is a tokenizer, or one entry a reward: a
    tokenizer for a model, None for the model's own and for functions. Equal names get `_2`, `_3`, …
    so that each has its own metric. `timeout` is in seconds: a call of a function, or each request
    to a server (None: no limit for a function, a minute for a server). `allow_http_hosts` names
    private hosts that may be asked over plain http, such as "10.0.0.5" or "*.svc". `bits` is in how
    many a reward model that is given by name holds its weights; None: as it was saved.
    """
    specs = (
        [reward_funcs]
        if isinstance(reward_funcs, str) or callable(reward_funcs)
        else list(reward_funcs)
    )
    resolved_weights = _checked_weights(weights, len(specs))
    if isinstance(processing_classes, list | tuple):
        tokenizers = list(processing_classes)
    else:
        tokenizers = [None] * len(specs) if processing_classes is None else [processing_classes]
    if len(tokenizers) != len(specs):
        raise RewardError(
            f"there are {len(tokenizers)} reward processing classes for {len(specs)} rewards: "
            "give one a reward, None where there is none"
        )
    named: list[NamedReward] = []
    for spec, weight, tokenizer in zip(specs, resolved_weights, tokenizers, strict=True):
        function = _resolve(spec, tokenizer, timeout, allow_http_hosts, bits)
        name, n = _name(spec, function), 1
        taken = {reward.name for reward in named}
        while (unique := name if n == 1 else f"{name}_{n}") in taken:
            n += 1
        # A server's tries and pauses together may take longer than one request.
        limit = None if isinstance(function, AsksServer) else timeout
        named.append(NamedReward(unique, function, weight, limit))
    check_tokens([r.function for r in named])
    return tuple(named)


def _checked_weights(weights: Sequence[float] | None, n: int) -> list[float]:
    if weights is None:
        return [1.0] * n
    if len(weights) != n:
        raise RewardError(
            f"there are {len(weights)} reward weights for {n} rewards: give one a reward, in the "
            "same order"
        )
    bad = [w for w in weights if not math.isfinite(w)]
    if bad:
        raise RewardError(f"reward weights are {list(weights)}: each must be a finite number")
    if n and not any(weights):
        raise RewardError(
            "every reward weight is 0, so that no row would have a reward: set at least one"
        )
    return [float(w) for w in weights]


def _resolve(
    spec: RewardSpec,
    tokenizer: Any,
    timeout: float | None,
    allow_http_hosts: Sequence[str] | None,
    bits: Literal[4, 8] | None,
) -> RewardFunction:
    function: RewardFunction
    if isinstance(spec, str) and is_judge(spec):
        function = JudgeReward.from_file(spec.removeprefix("judge:"), allow_http_hosts or ())
    elif isinstance(spec, str) and "://" in spec:
        asks = VllmReward if is_vllm(spec) else HttpReward
        function = asks(
            spec,
            timeout=DEFAULT_TIMEOUT if timeout is None else timeout,
            allow_http_hosts=allow_http_hosts or (),
        )
    elif isinstance(spec, str):
        if spec == "contrast":
            raise RewardError(
                "the reward 'contrast' scores with the policy itself, so only NEATTrainer can "
                "build it: pass 'contrast' to the trainer, or build "
                "neat_align.rewards.ContrastReward and pass that"
            )
        is_path = Path(spec).exists()
        if spec not in SHIPPED and (":" not in spec or is_path):
            return _load_model(spec, tokenizer, bits)
        function = SHIPPED[spec]() if spec in SHIPPED else _import(spec)
    elif _is_model(spec):
        from neat_align.rewards.hf import ModelReward

        return ModelReward(cast("Any", spec), tokenizer)
    else:
        function = cast("RewardFunction", spec)
    if tokenizer is not None:
        raise RewardError(
            f"the reward {_name(spec, function)!r} is a function and would ignore its processing "
            "class: pass None for it"
        )
    return function


def _is_model(spec: Any) -> bool:
    # A model brings torch with it; without torch loaded there is no model to recognise.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(spec, torch.nn.Module) and hasattr(spec, "config")


def _load_model(name: str, tokenizer: Any, bits: Literal[4, 8] | None) -> RewardFunction:
    from neat_align.rewards.hf import ModelReward

    if is_surely_path(name) and not Path(name).expanduser().exists():
        raise RewardError(f"the reward {no_such_path(name)}")
    try:
        return ModelReward.from_name(name, tokenizer, bits=bits)
    except NEATError:
        raise
    except (OSError, ValueError) as error:
        names = [*SHIPPED, "contrast"]
        meant = did_you_mean(name, names)
        raise RewardError(
            f"the reward {name!r} is not a shipped one ({', '.join(names)}), no https:// URL, no "
            "judge (judge:FILE.yaml), not of the form 'package.module:function', and could not be "
            f"loaded as a sequence-classification model{meant and f'; {meant}'}: {error}"
        ) from error


def _import(spec: str) -> RewardFunction:
    """The object at "package.module:name"; modules in the working directory are found too."""
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise RewardError(f"the reward {spec!r} must have the form 'package.module:function'")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        is_judge = f": a judge is named by its file, judge:{attribute}.yaml (docs/judges.md)"
        hint = is_judge if module_name == "judge" else ""
        raise RewardError(f"the reward {spec!r} cannot be imported: {error}{hint}") from error
    try:
        reward: Any = operator.attrgetter(attribute)(module)
    except AttributeError:
        meant = did_you_mean(attribute, [n for n in vars(module) if not n.startswith("_")])
        raise RewardError(
            f"the reward {spec!r} cannot be imported: module {module_name!r} has no "
            f"{attribute!r}{meant and f'; {meant}'}"
        ) from None
    if isinstance(reward, type) or not callable(reward):
        raise RewardError(
            f"the reward {spec!r} is a {type(reward).__name__}: it must be a function, or an "
            "object that can be called"
        )
    return cast("RewardFunction", reward)


def _name(spec: RewardSpec, function: Any) -> str:
    """A function's own `name` if it has one, else what Python calls it, else its class."""
    while isinstance(function, functools.partial):
        function = function.func
    for attribute in ("name", "__name__"):
        name = getattr(function, attribute, None)
        if isinstance(name, str) and name:
            return name
    return spec if isinstance(spec, str) else type(function).__name__
