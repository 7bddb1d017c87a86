"""What can be said of a comparison before its first run, which may be hours before the last: every
run's settings, methods with a reward of their own, policies that were trained elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoConfig
from transformers.utils import find_adapter_config_file

from neat_align.comparison.spec import CompareSpec, Method, strength_name
from neat_align.config import NEATConfig
from neat_align.errors import ConfigError, one_line
from neat_align.files.atomic import sha256_of
from neat_align.modeling.adapters import LOAD_ERRORS
from neat_align.pipeline import load_data
from neat_align.prompts.skipped_rows import BadRows, SkippedRows
from neat_align.rewards.contrast import ContrastReward
from neat_align.rewards.judge_file import judges_among
from neat_align.rewards.protocol import ChecksAnswers, ChecksPrompts, RewardSum
from neat_align.script_arguments import ScriptArguments
from neat_align.trainer.reward_setup import named_rewards, scorable_places

Settings: TypeAlias = tuple[ScriptArguments, NEATConfig]
# A run's options, as a recipe holds them, as typed arguments. Raises ConfigError.
ReadOptions: TypeAlias = Callable[[Mapping[str, Any]], Settings]
# What a model is made of, in its folder.
_MODEL_FILES = ("*.safetensors", "config.json", "adapter_config.json")


def checked_settings(
    spec: CompareSpec, read_options: ReadOptions, to_make: Collection[str]
) -> dict[str, Settings]:
    """Every run's options as settings, at the first seed, by method and strength.

    `to_make` are the methods of which a run is still to be made. Raises ConfigError, and what the
    rewards of their own raise on the data.
    """
    configs: dict[str, Settings] = {}
    counts: dict[str, int] = {}
    own: dict[str, Settings] = {}
    for method in spec.methods:
        _check_policies(spec, method)
        for strength in spec.strengths_of(method):
            name = f"{method.name} ({strength_name(strength)})" if strength else method.name
            configs[name] = read_options(spec.options(method, strength, spec.seeds[0]))
            if method.is_trained_here:
                counts[name] = configs[name][1].num_generations
            if method.has_own_reward and method.name in to_make:
                own.setdefault(method.name, configs[name])
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise ConfigError(
            f"the methods do not sample the same number of completions a prompt ({said}), so "
            "their budgets are not equal: change num_positive, num_negative and num_plain under "
            "methods until the sums agree"
        )
    _check_common_judge(read_options(spec.options(spec.methods[0], {}, spec.seeds[0]))[0])
    for name, (settings, config) in own.items():
        _check_own_reward(name, settings, config)
    return configs


def trained_here(spec: CompareSpec, configs: Mapping[str, Settings]) -> list[NEATConfig]:
    """The settings of the runs that the comparison makes, of `checked_settings`."""
    others = {m.name for m in spec.methods if not m.is_trained_here}
    return [config for name, (_, config) in configs.items() if name not in others]


def common_reward(spec: CompareSpec, method: Method, read_options: ReadOptions) -> RewardSum | None:
    """What a method with a reward of its own is evaluated by; None for one without."""
    if not method.has_own_reward:
        return None
    settings, config = read_options(spec.options(spec.methods[0], {}, spec.seeds[0]))
    return RewardSum(settings.reward_funcs, config.reward_weights)


def own_options(
    spec: CompareSpec, method: Method, strength: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """What a run may not change when the comparison goes on: its options, and what else decides its
    evaluation.
    """
    options = spec.options(method, strength, seed)
    if method.has_own_reward:
        options["evaluated by"] = [spec.settings.get(k) for k in ("reward_funcs", "reward_weights")]
    named = [spec.settings.get("reward_funcs"), options.get("reward_funcs")]
    judges = judges_among([*_listed(*named), *_listed(options.get("judge_funcs"))])
    if judges:
        options["judges' files"] = {name: judge.fingerprint() for name, judge in judges.items()}
    policy = method.policy_of(seed)
    if policy is not None:
        options |= {"policy": policy, "policy's files": _digest(Path(policy))}
    return options


def _listed(*given: Any) -> list[Any]:
    """Reward functions as a recipe names them: one, several or none."""
    return [f for value in given for f in ([value] if isinstance(value, str) else value or ())]


def _check_common_judge(settings: ScriptArguments) -> None:
    """Refuse a judge that says nothing about one policy against another. Raises ConfigError."""
    for name, judge in judges_among(settings.reward_funcs).items():
        if judge.compares_group:
            raise ConfigError(
                f"reward_funcs has {name}, which holds a prompt's answers against each other: its "
                "mean is ½ for every method. Give it to the methods (reward_funcs under a method), "
                "and compare them by form: pointwise, or form: pairwise with against: chosen"
            )


def _check_own_reward(method: str, settings: ScriptArguments, config: NEATConfig) -> None:
    """Resolve a method's own reward functions and look at whether they can score the data.

    Raises ConfigError, RewardError and DataError.
    """
    weights = config.reward_weights
    if weights is not None and len(weights) != len(settings.reward_funcs):
        raise ConfigError(
            f"method {method!r} has {len(weights)} reward weights for "
            f"{len(settings.reward_funcs)} rewards: give one a reward, in the same order"
        )
    # `contrast` is the policy's own, and there is none yet: it is asked nothing here.
    unasked = ContrastReward(score=_unasked, render=_unasked)
    rewards = named_rewards(settings.reward_funcs, config, unasked, weights)
    if any(isinstance(r.function, ChecksPrompts | ChecksAnswers) for r in rewards):
        skipped = SkippedRows()
        rows, _ = load_data(settings, config.on_bad_row, skipped)
        what = f"training prompts of method {method!r}"
        scorable_places(rows, rewards, BadRows(what, config.on_bad_row, skipped))


def _unasked(*_: Any) -> Any:
    raise AssertionError("nothing is scored before the first run")


def _check_policies(spec: CompareSpec, method: Method) -> None:
    """Raise ConfigError where a policy that was trained elsewhere is not there."""
    for seed in spec.seeds:
        policy = method.policy_of(seed)
        if policy is None:
            return
        try:
            if find_adapter_config_file(policy) is None:
                AutoConfig.from_pretrained(policy)
        except LOAD_ERRORS as error:
            raise ConfigError(
                f"the policy of method {method.name!r} with seed {seed} is {policy}, and there is "
                f"no model ({one_line(error, 200)}): train it first, or take the method out"
            ) from error


def _digest(folder: Path) -> dict[str, str]:
    """What a policy's files hold; nothing for a hub name."""
    paths = [path for pattern in _MODEL_FILES for path in sorted(folder.glob(pattern))]
    return {path.name: sha256_of(path)[:16] for path in paths}
