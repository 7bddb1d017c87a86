"""From a recipe and the command line to typed settings: defaults < YAML < command line, unknown
names refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from neat_align.config import NEATConfig
from neat_align.errors import ConfigError
from neat_align.files.yaml import YamlDocument, read_yaml
from neat_align.script_arguments import ScriptArguments


def parse_options(
    arguments: Sequence[str], config_file: Path | None
) -> tuple[ScriptArguments, NEATConfig]:
    """Settings from a recipe and `--name value` arguments. Raises ConfigError naming what is
    unknown and the nearest name, and the recipe's line where a value of the recipe is wrong.
    """
    known = _known()
    recipe, path = (
        (YamlDocument({}, {}), None) if config_file is None else _recipe(config_file, known)
    )
    given = _given(arguments)
    merged = [*_as_arguments(recipe.value, given), *arguments]
    try:
        settings, config, unknown = _parser().parse_args_into_dataclasses(
            merged, return_remaining_strings=True, look_for_args_file=False
        )
    except ConfigError as error:
        lines = {name: line for name, line in recipe.lines.items() if name not in given}
        raise ConfigError(f"{_place(str(error), lines, path)}{error}") from error
    for argument in unknown:
        if argument.startswith("--"):
            raise ConfigError(_unknown(option_name(argument), known, "the command line"))
    if unknown:
        raise ConfigError(f"{unknown[0]!r} belongs to no option: options are written --name value")
    if config.hub_token:
        # A recipe is shared and a command line is seen by every user of the machine.
        raise ConfigError(
            "hub_token is a secret, and those come from the environment only: leave it out and "
            "set HF_TOKEN"
        )
    return settings, config


def options_from(values: Mapping[str, Any]) -> tuple[ScriptArguments, NEATConfig]:
    """Settings from plain options, as a recipe holds them; numbers that YAML reads as text ("1e-5")
    are numbers here, too.
    """
    known = _known()
    for name in values:
        if name not in known:
            raise ConfigError(_unknown(str(name), known, "the settings"))
    return parse_options(_as_arguments(values, set()), None)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A wrong value is a ConfigError, as everywhere; argparse would print its usage
        and exit.
        """
        raise ConfigError(
            f"{message.removeprefix('argument ')}: correct the value (`neat-align train --help` "
            "says what is meant)"
        )


def _parser() -> HfArgumentParser:
    return _Parser((ScriptArguments, NEATConfig), prog="neat-align train", allow_abbrev=False)  # type: ignore[arg-type]


def _known() -> set[str]:
    return {f.name for c in (ScriptArguments, NEATConfig) for f in dataclasses.fields(c) if f.init}


def print_help() -> None:
    """Every option with its help text and default."""
    _parser().print_help()


def read_recipe(path: Path, known: set[str]) -> dict[str, Any]:
    """The mapping in a YAML recipe. Raises ConfigError for what is not a mapping of known names."""
    value: dict[str, Any] = _recipe(path, known)[0].value
    return value


def _recipe(path: Path, known: set[str]) -> tuple[YamlDocument, Path]:
    """A recipe with the lines of its options, and where it was found."""
    path = recipe_file(path, "recipe", "*")
    recipe = read_yaml(path, ConfigError)
    if not isinstance(recipe.value, dict):
        raise ConfigError(
            f"{path} holds {type(recipe.value).__name__}; a recipe is a mapping of option names "
            "to values"
        )
    for name in recipe.value:
        if name not in known:
            raise ConfigError(
                _unknown(
                    str(name),
                    known,
                    f"{path}:{recipe.lines[name]}" if name in recipe.lines else str(path),
                )
            )
    return recipe, path


def _given(arguments: Sequence[str]) -> set[str]:
    return {option_name(a) for a in arguments if a.startswith("--")}


def option_name(argument: str) -> str:
    """The option that a `--name` or `--name=value` of the command line means, with either dash."""
    return argument.removeprefix("--").split("=")[0].replace("-", "_")


def _place(message: str, lines: Mapping[str, int], path: Path | None) -> str:
    """Where the recipe sets the option that a message speaks of first; nothing when the recipe sets
    none of them.
    """
    said = (word for word in re.findall(r"\w+", message) if word in lines)
    name = next(said, None)
    return "" if name is None else f"{path}:{lines[name]}: "


def _as_arguments(values: Mapping[str, Any], given: set[str]) -> list[str]:
    """A recipe's values as command-line words, without the ones that the command line
    gives itself.
    """
    words: list[str] = []
    for name, value in values.items():
        if name in given or value is None:
            continue
        if isinstance(value, list):
            words += [f"--{name}", *(_as_word(name, v) for v in value)] if value else []
        else:
            words.append(f"--{name}={_as_word(name, value)}")
    return words


def _as_word(name: str, value: Any) -> str:
    """A value as it would stand on the command line; a mapping (`lr_scheduler_kwargs`) as the JSON
    that transformers reads.
    """
    if isinstance(value, Mapping):
        try:
            return json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{name} holds a mapping that is no JSON ({error}): use plain texts, numbers and "
                "lists in it"
            ) from error
    if not isinstance(value, str | int | float | date | Path):
        raise ConfigError(
            f"{name} holds a {type(value).__name__}; it must be text, a number, true or false, or "
            "a list of them"
        )
    return str(value)


def _unknown(name: str, known: set[str], where: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{where}: unknown option {name!r}" + (
        f"; did you mean {near[0]!r}?" if near else "; `neat-align train --help` lists all"
    )


def recipe_file(path: Path, what: str, pattern: str) -> Path:
    """The file at `path`, or the shipped one that its name means.

    Raises ConfigError: there is no `what`, these (`pattern`) ship.
    """
    if is_file(path):
        return path
    shipped = recipe_path(path.stem)
    if path.parent.name in ("", "recipes") and is_file(shipped):
        return shipped
    raise ConfigError(f"there is no {what} at {path}; these ship: {shipped_names(pattern)}")


def is_file(path: Path) -> bool:
    """Whether there is a file at a path that a user wrote, which may be too long for any."""
    try:
        return path.is_file()
    except OSError:
        return False


def shipped_names(pattern: str) -> str:
    """Names of the shipped recipes that match, for messages."""
    return ", ".join(sorted(p.stem for p in recipe_path(pattern).parent.glob(f"{pattern}.yaml")))


def recipe_path(name: str) -> Path:
    """Path of a shipped recipe by name."""
    return Path(str(files("neat_align.cli") / "recipes" / f"{name}.yaml"))
