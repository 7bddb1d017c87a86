"""From a recipe (YAML) and the command line to typed settings: defaults < recipe < command line.

Where a wrong setting is reported, with the recipe's file and line:

- an unknown key or option, with the nearest name: `refuse_unknown`;
- a value of the wrong type, in argparse's words: `_read`;
- a value out of range, or two that contradict each other: NEATConfig and ScriptArguments raise, and
  `_place` says which line of the recipe that is about;
- what is no YAML, or a key given twice: `neat_align.files.yaml`.

transformers' own HfArgumentParser reads the values of the recipe as it reads those of the command
line, so that both are checked and converted alike.
"""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from argparse import ArgumentError, Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, fields
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from neat_align.config import NEATConfig
from neat_align.config.constraints import default_of
from neat_align.config.trainer_defaults import TrainerDefaults
from neat_align.config.unsupported import REFUSED, SCRIPT_OPTIONS
from neat_align.errors import ConfigError, did_you_mean
from neat_align.files.yaml import YamlDocument, read_yaml
from neat_align.script_arguments import ScriptArguments


def parse_options(
    arguments: Sequence[str], config_file: Path | None
) -> tuple[ScriptArguments, NEATConfig]:
    """Settings from a recipe and `--name value` arguments. Raises ConfigError naming what is
    unknown and the nearest name, and the recipe's line where a value of the recipe is wrong.
    """
    parser = _parser()
    recipe = YamlDocument({}, {}, "")
    if config_file is not None:
        recipe = read_recipe(config_file, _known(parser))
    return _settings(parser, recipe, arguments)


def options_from(values: Mapping[str, Any]) -> tuple[ScriptArguments, NEATConfig]:
    """Settings from plain options, as a recipe holds them; numbers that YAML reads as text ("1e-5")
    are numbers here, too.
    """
    parser = _parser()
    recipe = YamlDocument(dict(values), {}, "the settings")
    refuse_unknown(recipe, _known(parser))
    return _settings(parser, recipe, ())


def read_recipe(path: Path, known: Collection[str]) -> YamlDocument:
    """A YAML recipe, or the shipped one of that name. Raises ConfigError for what is not a mapping
    of known names.
    """
    path = recipe_file(path, "recipe", "*")
    recipe = read_yaml(path, ConfigError)
    if not isinstance(recipe.value, dict):
        raise ConfigError(
            f"{path} holds {type(recipe.value).__name__}; a recipe is a mapping of option names "
            "to values"
        )
    refuse_unknown(recipe, known)
    return recipe


def refuse_unknown(recipe: YamlDocument, known: Collection[str]) -> None:
    """Raises ConfigError for a key that is no option, with its line and the nearest name."""
    for name in map(str, recipe.value):
        if name not in known:
            raise ConfigError(_unknown(name, known, recipe.place(name)))


def option_name(argument: str) -> str:
    """The option that a `--name` or `--name=value` of the command line means, with either dash."""
    return argument.removeprefix("--").split("=")[0].replace("-", "_")


def without_overruled(settings: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The settings without those that an option which was given in their place makes void.

    How long to train is said by `data_passes`, or by `num_train_epochs` and `max_steps`: what wins
    over a recipe wins over either.
    """
    passes, others = {"data_passes"}, {"num_train_epochs", "max_steps"}
    void = others if passes & set(given) else passes if others & set(given) else set()
    return {name: value for name, value in settings.items() if name not in void}


# ---- the parser ----------------------------------------------------------------------------------


def _parser() -> HfArgumentParser:
    kinds: Any = (ScriptArguments, NEATConfig)
    return HfArgumentParser(kinds, allow_abbrev=False, exit_on_error=False, add_help=False)


def _known(parser: HfArgumentParser) -> Collection[str]:
    return vars(parser.parse_args([]))


def _settings(
    parser: HfArgumentParser, recipe: YamlDocument, arguments: Sequence[str]
) -> tuple[ScriptArguments, NEATConfig]:
    values = parser.parse_args([])  # the defaults
    given = {option_name(a) for a in arguments if a.startswith("--")}
    kept = without_overruled(recipe.value, given)
    taken = [n for n, value in kept.items() if n not in given and value is not None]
    for name in taken:
        where = f"{recipe.place(name)}: "
        left = _read(parser, _as_words(name, recipe.value[name], where), values, where)
        if left:
            raise ConfigError(f"{where}{name} takes one value, and here is a list: correct it")
    for argument in _read(parser, arguments, values, ""):
        if argument.startswith("--"):
            raise ConfigError(_unknown(option_name(argument), _known(parser), "the command line"))
        raise ConfigError(f"{argument!r} belongs to no option: options are written --name value")
    if values.hub_token:
        # A recipe is shared and a command line is seen by every user of the machine.
        raise ConfigError(
            "hub_token is a secret, and those come from the environment only: leave it out and "
            "set HF_TOKEN"
        )
    try:
        script, config = parser.parse_dict(vars(values))
    except ConfigError as error:
        raise ConfigError(f"{_place(str(error), recipe, taken)}{error}") from error
    return script, config


def _read(
    parser: HfArgumentParser, words: Sequence[str], into: Namespace, where: str
) -> Sequence[str]:
    """Read `--name value` words into the settings; gives the words that belong to no option."""
    try:
        return parser.parse_known_args(words, into)[1]
    except ArgumentError as error:
        name = option_name((error.argument_name or "").split("/")[0])
        raise ConfigError(
            f"{where}{name}: {error.message.rstrip('.')}: correct the value (`neat-align train "
            "--help` says what is meant)"
        ) from error


def _as_words(name: str, value: Any, where: str) -> list[str]:
    """An option of a recipe as it would stand on the command line."""
    if isinstance(value, list):
        words = [_as_word(name, v, where) for v in value]
        for word in words:
            if word.startswith("--"):
                raise ConfigError(f"{where}{name} lists {word!r}, which is written like an option")
        return [f"--{name}", *words] if words else []
    return [f"--{name}={_as_word(name, value, where)}"]


def _as_word(name: str, value: Any, where: str) -> str:
    """A mapping (`lr_scheduler_kwargs`) becomes the JSON that transformers reads."""
    if isinstance(value, Mapping):
        try:
            return json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{where}{name} holds a mapping that is no JSON ({error}): use plain texts, "
                "numbers and lists in it"
            ) from error
    if not isinstance(value, str | int | float | date | Path):
        raise ConfigError(
            f"{where}{name} holds a {type(value).__name__}; it must be text, a number, true or "
            "false, or a list of them"
        )
    return str(value)


def _place(message: str, recipe: YamlDocument, taken: Collection[str]) -> str:
    """Where the recipe sets the option that a message speaks of first; nothing when it sets none
    of them.
    """
    set_here = (w for w in re.findall(r"\w+", message) if w in taken and w in recipe.lines)
    name = next(set_here, None)
    return "" if name is None else f"{recipe.place(name)}: "


def _unknown(name: str, known: Collection[str], where: str) -> str:
    hint = did_you_mean(name, known) or "`neat-align train --help` lists all"
    return f"{where}: unknown option {name!r}; {hint}"


# ---- help ----------------------------------------------------------------------------------------


def print_help() -> None:
    """Every option that may be set, with its help text and default: ours first, then those of
    transformers.
    """
    refused = {"hub_token", *REFUSED, *SCRIPT_OPTIONS}
    training = [f for f in fields(NEATConfig) if f.init and f.name not in refused]
    theirs = {f.name for f in fields(TrainingArguments)} - set(TrainerDefaults.__annotations__)
    groups = {
        "The model, the data and the rewards": fields(ScriptArguments),
        "NEAT": [f for f in training if f.name not in theirs],
        "From transformers.TrainingArguments": [f for f in training if f.name in theirs],
    }
    print(
        "Usage: neat-align train [--config RECIPE.yaml] [--name value ...]\n\n"
        "An option on the command line wins over the recipe's. A list is written\n"
        "--name a b; --output-dir means the same as --output_dir. --dry-run says what\n"
        "the run would do and how much memory it would take, and does nothing."
    )
    width = min(shutil.get_terminal_size().columns, 100)
    for title, options in groups.items():
        print(f"\n{title}\n{'-' * len(title)}")
        for option in options:
            print(_option_help(option, width))


def _option_help(option: Field[Any], width: int) -> str:
    default = default_of(option)
    shown = "" if default in (None, "", []) else f"  (default: {default})"
    words = str(option.metadata.get("help", "")).replace("%%", "%").split()
    return f"  --{option.name}{shown}\n" + textwrap.indent(
        textwrap.fill(" ".join(words), width - 6), " " * 6
    )


# ---- recipe files --------------------------------------------------------------------------------


def recipe_file(path: Path, what: str, pattern: str) -> Path:
    """The file at `path`, or the shipped one that its name means.

    Raises ConfigError: there is no `what`, these (`pattern`) ship.
    """
    if is_file(path):
        return path
    shipped = recipe_path(path.stem)
    if path.parent.name in ("", "recipes") and is_file(shipped):
        return shipped
    names = shipped_names(pattern)
    meant = did_you_mean(path.stem, names.split(", "))
    raise ConfigError(f"there is no {what} at {path}{meant and f'; {meant}'}; these ship: {names}")


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
