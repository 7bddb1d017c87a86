"""From a recipe (YAML) and the command line to typed settings: defaults < recipe < command line.

Where a wrong setting is reported, with the recipe's file and line:

- an unknown key or option, with the nearest name: `known_options`;
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
from argparse import ArgumentError, Namespace
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from neat_align.cli.option_names import (
    canonical,
    check_one_spelling,
    meant,
    one_spelling,
    option_name,
)
from neat_align.config import NEATConfig
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
    return _settings(parser, recipe, one_spelling(arguments))


def options_from(values: Mapping[str, Any]) -> tuple[ScriptArguments, NEATConfig]:
    """Settings from plain options, as a recipe holds them; numbers that YAML reads as text ("1e-5")
    are numbers here, too.
    """
    parser = _parser()
    recipe = YamlDocument(dict(values), {}, "the settings")
    return _settings(parser, known_options(recipe, _known(parser)), ())


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
    return known_options(recipe, known)


def known_options(recipe: YamlDocument, known: Collection[str]) -> YamlDocument:
    """The recipe with every option under its own name (`model` is `model_name_or_path`).

    Raises ConfigError for a key that is no option, with its line and the nearest name, and for an
    option under two names.
    """
    written = {str(key): key for key in recipe.value}
    for name in written:
        if canonical(name) not in known:
            raise ConfigError(_unknown(name, known, recipe.place(name)))
    check_one_spelling(written, recipe.place)
    values = {canonical(name): recipe.value[key] for name, key in written.items()}
    lines = {canonical(name): line for name, line in recipe.lines.items()}
    return YamlDocument(values, lines, recipe.where)


def without_overruled(settings: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The settings without those that an option which was given in their place makes void.

    How long to train is said by `data_passes`, or by `num_train_epochs` and `max_steps`: what wins
    over a recipe wins over either.
    """
    passes, others = {"data_passes"}, {"num_train_epochs", "max_steps"}
    void = others if passes & set(given) else passes if others & set(given) else set()
    return {name: value for name, value in settings.items() if name not in void}


# Options that are one text or a list of them, of which transformers' parser knows the one text.
_ONE_OR_SEVERAL = ("report_to", "optim_target_modules")


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
        if name in _ONE_OR_SEVERAL and isinstance(recipe.value[name], list):
            setattr(values, name, [_as_word(name, v, where) for v in recipe.value[name]])
            continue
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
            "--help-all` says what is meant)"
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
    near = meant(name, known)
    hint = f"did you mean {near!r}?" if near else "`neat-align train --help-all` lists all"
    return f"{where}: unknown option {name!r}; {hint}"


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
