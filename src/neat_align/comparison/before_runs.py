"""What can be said of a comparison before its first run, which may be hours before the last: every
run's settings, methods with a reward of their own, policies that were trained elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import file_digest
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoConfig
from transformers.utils import find_adapter_config_file

from neat_align.comparison.spec import CompareSpec, Method, strength_name
from neat_align.config import NEATConfig
from neat_align.errors import ConfigError, one_line
from neat_align.modeling.adapters import LOAD_ERRORS
from neat_align.pipeline import load_data
from neat_align.prompts.skipped_rows import BadRows, SkippedRows
from neat_align.rewards.protocol import RewardSum
from neat_align.rewards.resolve import resolve_rewards
from neat_align.script_arguments import ScriptArguments
from neat_align.trainer.reward_setup import scorable_places

Settings: TypeAlias = tuple[ScriptArguments, NEATConfig]
# A run's options, as a recipe holds them, as typed arguments. Raises ConfigError.
ReadOptions: TypeAlias = Callable[[Mapping[str, Any]], Settings]
# What a model is made of, in its folder.
_MODEL_FILES = ("*.safetensors", "config.json", "adapter_config.json")


def checked_settings(spec: CompareSpec, read_options: ReadOptions) -> dict[str, Settings]:
    """Every run's options as settings, at the first seed, by method and strength.

    Raises ConfigError, and what the rewards of a method's own raise on the data.
    """
    configs, counts = {}, {}
    for method in spec.methods:
        _check_policies(spec, method)
        for strength in spec.strengths if method.is_trained_here else ({},):
            name = f"{method.name} ({strength_name(strength)})" if strength else method.name
            configs[name] = read_options(spec.options(method, strength, spec.seeds[0]))
            if method.is_trained_here:
                counts[name] = configs[name][1].num_generations
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise ConfigError(
            f"the methods do not sample the same number of completions a prompt ({said}), so "
            "their budgets are not equal: change num_positive, num_negative and num_plain under "
            "methods until the sums agree"
        )
    for method in spec.methods:
        if method.has_own_reward:
            options = spec.options(method, spec.strengths[0], spec.seeds[0])
            _check_own_reward(method, *read_options(options))
    return configs


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
    policy = method.policy_of(seed)
    if policy is not None:
        options |= {"policy": policy, "policy's files": _digest(Path(policy))}
    return options


def _check_own_reward(method: Method, settings: ScriptArguments, config: NEATConfig) -> None:
    """Resolve a method's own reward functions and look at whether they can score the data.

    Raises ConfigError, RewardError and DataError. `contrast` is the policy's own: nothing to ask.
    """
    weights = config.reward_weights or [1.0] * len(settings.reward_funcs)
    if len(weights) != len(settings.reward_funcs):
        raise ConfigError(
            f"method {method.name!r} has {len(weights)} reward weights for "
            f"{len(settings.reward_funcs)} rewards: give one a reward, in the same order"
        )
    names = [name for name in settings.reward_funcs if name != "contrast"]
    rewards = resolve_rewards(
        names,
        None,
        timeout=config.reward_timeout,
        allow_http_hosts=config.allow_http_hosts,
    )
    if rewards:
        skipped = SkippedRows()
        rows, _ = load_data(settings, config.on_bad_row, skipped)
        what = f"training prompts of method {method.name!r}"
        scorable_places(rows, rewards, BadRows(what, config.on_bad_row, skipped))


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
    found = {}
    for pattern in _MODEL_FILES:
        for path in sorted(folder.glob(pattern)):
            with path.open("rb") as file:
                found[path.name] = file_digest(file, "sha256").hexdigest()[:16]
    return found
