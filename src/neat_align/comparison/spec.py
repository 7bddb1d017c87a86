"""What a comparison is made of: methods, strengths, seeds, one common set of settings.

Read from YAML, checked before it runs:

    name: demo
    like: compare-demo                    # optional: begins as this one, which the command line has
                                          # put under this one by now
    settings: {…}                         # any options of `neat-align train`, the same for all
    seeds: [0, 1, 2]
    strengths: [{learning_rate: 1e-4}]    # optional: every method is run at each
    kl_target: 0.02                       # optional: nats per token at which methods are compared
    methods:                              # in the order of the table
      base:                               # a shipped method as it is …
      neat: {learning_rate: 2.0e-4}       # … or with changes …
      mine: {like: neat, beta: 4.0}       # … or a new one that begins as another …
      theirs: {policy: "runs/theirs/seed{seed}"}  # … or models that were trained elsewhere
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from neat_align.errors import ConfigError, did_you_mean

BASE = "base"
_KEYS = ("name", "settings", "seeds", "strengths", "methods", "kl_target")
# In a file there may also be `like`, which `comparison_source` has resolved before it is parsed.
_FILE_KEYS = (_KEYS[0], "like", *_KEYS[1:])
# What one comparison must not change from method to method: the policy, the data, what is judged,
# and the budget.
_COMMON = (
    *("model_name_or_path", "dataset_name", "dataset_train_split", "dataset_limit"),
    *("datasets", "dataset_config", "dataset_columns", "drop_old_turns"),
    *("as_conversations", "as_texts", "holdout", "eval_dataset_name", "eval_dataset_split"),
    *("eval_dataset_config", "eval_dataset_columns"),
    *("judge_funcs", "output_dir", "num_train_epochs"),
    *("data_passes", "max_steps", "on_bad_row", "max_prompt_length", "prompts_per_round"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_completion_length", "temperature", "top_p", "top_k", "num_eval_generations"),
    *("num_eval_prompts", "seed"),
)
# What a method may train on instead: it is evaluated by the comparison's reward all the same.
_OWN_REWARD = ("reward_funcs", "reward_weights")
# Options of train that a comparison decides itself, and what says it here.
_NOT_SETTINGS = {
    "seed": "seeds lists them",
    "output_dir": "every run has a folder of its own under the command's --output_dir",
    "resume": "a comparison always goes on where it stopped",
    "auto_resume": "a comparison always goes on where it stopped",
}


@dataclass(frozen=True)
class Method:
    """A named way to train: its changes to the common settings.

    `base` is the start policy and has none. `policy` names the models of a method that was trained
    elsewhere (a folder or hub name, `{seed}` in it standing for the seed): they are evaluated, and
    there is nothing to set.
    """

    name: str
    description: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    policy: str | None = None

    @property
    def is_trained_here(self) -> bool:
        """Whether the comparison makes its runs."""
        return self.name != BASE and self.policy is None

    @property
    def has_own_reward(self) -> bool:
        """Whether it is trained on another reward than the comparison's, which still judges it."""
        return any(name in self.settings for name in _OWN_REWARD)

    def policy_of(self, seed: int) -> str | None:
        """The model of a seed, of a method that was trained elsewhere."""
        return None if self.policy is None else self.policy.replace("{seed}", str(seed))


@dataclass(frozen=True)
class CompareSpec:
    """A comparison: every method but `base` is trained at every strength with every seed.

    `methods` begin with `base`.
    """

    name: str
    settings: Mapping[str, Any]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    strengths: tuple[Mapping[str, Any], ...] = ({},)
    kl_target: float | None = None

    def strengths_of(self, method: Method) -> tuple[Mapping[str, Any], ...]:
        """The strengths of a method's runs; what is not trained here has none."""
        return self.strengths if method.is_trained_here else ({},)

    def options(self, method: Method, strength: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """All options of one run.

        A strength's options win over a method's, a method's over the common ones. A method's own
        reward functions have their own weights, too: the common ones are others'.
        """
        common = dict(self.settings)
        if "reward_funcs" in method.settings:
            common.pop("reward_weights", None)
        return {**common, **method.settings, **strength, "seed": seed}


def strength_name(strength: Mapping[str, Any]) -> str:
    """A strength in words, for tables and folders."""
    return ",".join(f"{k}={v}" for k, v in strength.items()) or "as set"


def shipped_methods() -> dict[str, Method]:
    """The methods of methods.yaml."""
    raw = yaml.safe_load(
        (files("neat_align.comparison") / "methods.yaml").read_text(encoding="utf-8")
    )
    return {name: Method(name, m["description"], m.get("settings", {})) for name, m in raw.items()}


def parse_spec(raw: Any, where: str) -> CompareSpec:
    """A comparison from plain data. Raises ConfigError that names `where` and what to change."""
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{where} holds {type(raw).__name__}; a comparison is a mapping with "
            f"{', '.join(_FILE_KEYS)}"
        )
    _check_keys(raw, where)
    seeds, strengths = raw.get("seeds", [0]), raw.get("strengths") or [{}]
    _check_values(raw, seeds, strengths, where)
    known = shipped_methods()
    methods: dict[str, Method] = {BASE: known[BASE]}
    for name, changes in raw["methods"].items():
        folder = _folder_name(name, f"{where}: the method")
        methods[str(name)] = _method(folder, changes, known | methods, where)
    spec = CompareSpec(
        name=_folder_name(raw.get("name") or Path(where).stem, f"{where}: name"),
        settings=raw["settings"],
        methods=tuple(methods.values()),
        seeds=tuple(seeds),
        strengths=tuple(strengths),
        kl_target=raw.get("kl_target"),
    )
    _check_common(spec, where)
    return spec


def _check_keys(raw: Mapping[Any, Any], where: str) -> None:
    for key in raw:
        if key in _KEYS:
            continue
        hint = did_you_mean(key, _FILE_KEYS) or (
            f"it may have {', '.join(_FILE_KEYS)}; options of train go under settings"
        )
        raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _check_values(raw: Mapping[str, Any], seeds: Any, strengths: Any, where: str) -> None:
    """Each key's own value; `seeds` and `strengths` with their defaults."""
    if not _are_seeds(seeds):
        raise ConfigError(
            f"{where}: seeds is {seeds!r}; it must be a list of different whole numbers of 0 or "
            "more"
        )
    if not _are_strengths(strengths):
        raise ConfigError(
            f"{where}: strengths is {strengths!r}; it must be a list of different mappings, such "
            "as [{learning_rate: 1e-4}]"
        )
    methods, settings, target = (raw.get(key) for key in ("methods", "settings", "kl_target"))
    if not isinstance(methods, dict) or not methods:
        raise ConfigError(
            f"{where}: methods is {methods!r}; it must be a mapping of names, such as {{base: , "
            "neat: }"
        )
    if not isinstance(settings, dict) or not _are_names(settings):
        raise ConfigError(
            f"{where}: settings is {settings!r}; it must hold the options of train that all "
            "methods share"
        )
    if target is not None and not _is_kl(target):
        raise ConfigError(
            f"{where}: kl_target is {target!r}; it must be a number above 0, in nats per token, "
            "or unset"
        )


def _are_seeds(seeds: Any) -> bool:
    if not isinstance(seeds, list) or not seeds:
        return False
    # Exactly int: True is an int, too.
    return all(type(s) is int and s >= 0 for s in seeds) and len(set(seeds)) == len(seeds)


def _are_strengths(strengths: Any) -> bool:
    """Whether they are mappings of names, and no two share a name, and with it a folder."""
    if not isinstance(strengths, list):
        return False
    if not all(isinstance(s, dict) and _are_names(s) for s in strengths):
        return False
    return len({strength_name(s) for s in strengths}) == len(strengths)


def _is_kl(target: Any) -> bool:
    return type(target) in (int, float) and math.isfinite(target) and target > 0


def _are_names(options: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) for name in options)


def _folder_name(name: Any, what: str) -> str:
    """A name that becomes a folder: nothing that a shell or another system trips over.

    No separators, no leading dot, no blank or dot at the end.
    """
    text = str(name)
    is_plain = re.fullmatch(r"\w[\w .,+=@-]{0,79}", text) is not None
    if not is_plain or text != text.strip() or text.endswith("."):
        raise ConfigError(
            f"{what} is {text[:90]!r}, and it names a folder: use letters, digits, spaces and "
            ". , + = @ - _ (at most 80 characters, a letter, digit or _ first)"
        )
    return text


def _method(name: str, changes: Any, known: Mapping[str, Method], where: str) -> Method:
    changes = {} if changes is None else changes
    if not isinstance(changes, dict) or not _are_names(changes):
        raise ConfigError(
            f"{where}: method {name!r} is {changes!r}; give a mapping of options, or nothing for "
            "the shipped one"
        )
    if name == BASE and changes.keys() - {"description"}:
        told = ", ".join(k for k in changes if k != "description")
        raise ConfigError(
            f"{where}: base is the start policy and is not trained; it takes no options ({told})"
        )
    changes = dict(changes)
    description = changes.pop("description", None)
    if description is not None and not isinstance(description, str):
        raise ConfigError(
            f"{where}: the description of method {name!r} is {description!r}; it must be text: "
            "put it in quotes"
        )
    if "policy" in changes:
        return _trained_elsewhere(name, changes, description, where)
    like = str(changes.pop("like", name))
    if like not in known:
        meant = did_you_mean(like, known)
        hint = f"; {meant}" if meant else "."
        raise ConfigError(
            f"{where}: there is no method {like!r}{hint} Known: {', '.join(known)}. A method of "
            "your own says which one it begins as: {like: neat, …}"
        )
    begun = known[like]
    if begun.policy is not None:
        raise ConfigError(
            f"{where}: method {name!r} begins as {like!r}, which was trained elsewhere (policy) "
            "and has no options: name its own policy, or begin as another"
        )
    if not description:
        is_begun = not changes or like == name
        description = begun.description if is_begun else f"{like} with {strength_name(changes)}"
    return Method(name, description, {**begun.settings, **changes})


def _trained_elsewhere(
    name: str, changes: Mapping[str, Any], description: str | None, where: str
) -> Method:
    policy, others = changes["policy"], sorted(changes.keys() - {"policy"})
    if not isinstance(policy, str) or not policy:
        raise ConfigError(
            f"{where}: the policy of method {name!r} is {policy!r}; it must be the folder or hub "
            'name of the trained model, such as "runs/theirs/seed{seed}"'
        )
    if others:
        raise ConfigError(
            f"{where}: method {name!r} has a policy, which was trained elsewhere, and also "
            f"{', '.join(others)}: nothing here would read that; take it out"
        )
    return Method(name, description or f"the models in {policy}", policy=policy)


def _check_common(spec: CompareSpec, where: str) -> None:
    for name, instead in _NOT_SETTINGS.items():
        if name in spec.settings:
            raise ConfigError(
                f"{where}: settings sets {name}, which a comparison decides itself ({instead}): "
                "take it out"
            )
    for method in spec.methods:
        changed = [k for k in method.settings if k in _COMMON]
        if changed:
            raise ConfigError(
                f"{where}: method {method.name!r} sets {', '.join(changed)}, which must be equal "
                "for all: put it under settings"
            )
    for strength in spec.strengths:
        changed = [k for k in strength if k in (*_COMMON, *_OWN_REWARD)]
        if changed:
            raise ConfigError(
                f"{where}: a strength sets {', '.join(changed)}, which must be equal for all: put "
                "it under settings"
            )
    if len(spec.methods) < 2:
        raise ConfigError(f"{where}: methods names only base: add a method to compare it with")
