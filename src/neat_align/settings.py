"""From a recipe and the command line to typed settings: defaults < YAML < command line, unknown names refused."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError


@dataclass
class RunSettings:
    """What a run is made of besides the training configuration. Names follow TRL's scripts."""

    model_name_or_path: str = field(default="", metadata={"help": "The model: a hub name, a folder, or `demo` (SmolLM2-135M-Instruct)."})
    dataset_name: str = field(
        default="", metadata={"help": "Training prompts: a .jsonl, .json, .parquet or .csv file, a saved data set, a hub name, or `demo`."}
    )
    dataset_train_split: str | None = field(default=None, metadata={"help": "Split of a hub data set to train on."})
    dataset_limit: int | None = field(default=None, metadata={"help": "Use only the first this many rows."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out prompts; None keeps back `holdout` training rows."})
    eval_dataset_split: str | None = field(default=None, metadata={"help": "Split of a hub data set to evaluate on."})
    holdout: int = field(default=64, metadata={"help": "Rows kept back for evaluation when there is no eval_dataset_name."})
    as_conversations: bool = field(default=False, metadata={"help": "Turn texts and Human/Assistant transcripts into chat messages."})
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Rewards: vader, minilm_tone, contrast, package.module:function, or a sequence-classification model."},
    )
    judge_funcs: list[str] = field(default_factory=list, metadata={"help": "Rewards that only evaluation sees, never training."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale; the update is multiplied by lora_alpha / lora_r."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Modules that get an adapter; None: every linear layer."})
    resume: bool = field(default=False, metadata={"help": "Go on with the run in output_dir from its newest complete checkpoint."})


def parse(arguments: Sequence[str], config_file: Path | None) -> tuple[RunSettings, NEATConfig]:
    """Settings from a recipe and `--name value` arguments. Raises ConfigError naming what is unknown and the nearest name."""
    parser = _parser()
    known = {f.name for c in (RunSettings, NEATConfig) for f in dataclasses.fields(c) if f.init}
    values = read_recipe(config_file, known) if config_file is not None else {}
    merged = [*_as_arguments(values, arguments), *arguments]
    settings, config, unknown = parser.parse_args_into_dataclasses(merged, return_remaining_strings=True)
    for argument in unknown:
        if argument.startswith("--"):
            raise ConfigError(_unknown(argument.removeprefix("--").split("=")[0].replace("-", "_"), known, "the command line"))
    if unknown:
        raise ConfigError(f"{unknown[0]!r} belongs to no option: options are written --name value")
    return settings, config


def settings_from(values: Mapping[str, Any]) -> tuple[RunSettings, NEATConfig]:
    """Settings from plain options, as a recipe holds them; numbers that YAML reads as text ("1e-5") are numbers here, too."""
    known = {f.name for c in (RunSettings, NEATConfig) for f in dataclasses.fields(c) if f.init}
    for name in values:
        if name not in known:
            raise ConfigError(_unknown(str(name), known, "the settings"))
    return parse(_as_arguments(dict(values), []), None)


def _parser() -> HfArgumentParser:
    return HfArgumentParser((RunSettings, NEATConfig), prog="neat-align train", allow_abbrev=False)  # type: ignore[arg-type]


def print_help() -> None:
    """Every option with its help text and default."""
    _parser().print_help()


def read_recipe(path: Path, known: set[str]) -> dict[str, Any]:
    """The mapping in a YAML recipe. Raises ConfigError for what is not a mapping of known names."""
    shipped = recipe_path(path.stem)
    if not path.is_file() and path.parent.name in ("", "recipes") and shipped.is_file():
        path = shipped
    if not path.is_file():
        raise ConfigError(f"there is no recipe at {path}; these ship: {', '.join(sorted(p.stem for p in shipped.parent.glob('*.yaml')))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; a recipe is a mapping of option names to values")
    for name in values:
        if name not in known:
            raise ConfigError(_unknown(str(name), known, str(path)))
    return values


def _as_arguments(values: dict[str, Any], arguments: Sequence[str]) -> list[str]:
    """A recipe's values as command-line words, without the ones that the command line gives itself."""
    given = {a.removeprefix("--").split("=")[0].replace("-", "_") for a in arguments if a.startswith("--")}
    words: list[str] = []
    for name, value in values.items():
        if name in given or value is None:
            continue
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        else:
            words += [f"--{name}", str(value)]
    return words


def _unknown(name: str, known: set[str], where: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{where}: unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; `neat-align train --help` lists all")


def recipe_path(name: str) -> Path:
    """Path of a shipped recipe by name."""
    return Path(str(files("neat_align") / "recipes" / f"{name}.yaml"))
