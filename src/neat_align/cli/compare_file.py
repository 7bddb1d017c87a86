"""What `neat-align compare` is asked for: a comparison's YAML file (`--config`), the comparison
that it begins as (`like:`), and the command line over both.

A wrong key or value of a comparison is reported by `neat_align.comparison.spec`; a wrong option of
`train` in it by `neat_align.cli.options`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neat_align.cli.option_names import canonical, check_one_spelling, option_name
from neat_align.cli.options import (
    is_file,
    recipe_file,
    recipe_path,
    shipped_names,
    without_overruled,
)
from neat_align.comparison.spec import BASE, CompareSpec, parse_spec
from neat_align.errors import ConfigError
from neat_align.files.yaml import parse_yaml, read_yaml

SHIPPED = "compare-*"


def read_spec(path: Path, arguments: Sequence[str] = ()) -> CompareSpec:
    """The comparison in a YAML file, or in a shipped one of that name, with `--name value`
    arguments over it.

    A comparison with `like: NAME` (or the path of a file, from its own folder) has the settings of
    that one under its own, and everything else that it does not say itself. Of the arguments
    `--seeds` and `--methods` take lists, a method being one of the file's or of the shipped ones;
    all others are options of train that every method shares. Raises ConfigError.
    """
    given = _values(arguments)
    for name in ("methods", "seeds"):
        if given.get(name) is True:
            raise ConfigError(f"--{name} is given without a value: write --{name} A B")
    raw = _raw(recipe_file(path, "comparison", SHIPPED), ())
    if not isinstance(raw, Mapping):
        return parse_spec(raw, str(path))
    chosen = [str(name) for name in _listed(given.pop("methods", []))]
    changed = dict(raw)
    if "seeds" in given:
        changed["seeds"] = _listed(given.pop("seeds"))
    if chosen and isinstance(raw.get("methods"), Mapping):
        shipped = [name for name in chosen if name not in raw["methods"]]
        changed["methods"] = {**raw["methods"], **dict.fromkeys(shipped)}
    if given and isinstance(raw.get("settings"), Mapping):
        changed["settings"] = {**without_overruled(raw["settings"], given), **given}
    spec = parse_spec(changed, str(path))
    # Taken out only now: a method may begin as one that is not to be run.
    kept = [m for m in spec.methods if m.name in {BASE, *chosen}]
    if chosen and len(kept) < 2:
        raise ConfigError(f"--methods names only {BASE}: add a method to compare it with")
    return replace(spec, methods=tuple(kept)) if chosen else spec


def _raw(path: Path, from_: tuple[Path, ...]) -> Any:
    """A file's comparison as plain data, with what it has from the one that it begins as.

    `from_` are the files that led here.
    """
    if path.resolve() in from_:
        ring = " -> ".join(str(p) for p in (*from_, path))
        raise ConfigError(f"{path} begins as itself: {ring}. Take one like out")
    document = read_yaml(path, ConfigError)
    raw = _own_names(document.value, document.place)
    if not isinstance(raw, dict) or "like" not in raw:
        return raw
    other = _like(raw["like"], path.parent, document.place("like"))
    begun = _raw(other, (*from_, path.resolve()))
    own = {key: value for key, value in raw.items() if key != "like"}
    if not isinstance(begun, dict):
        return own  # which lacks what every comparison has, and is told so
    both = {key: value for key, value in begun.items() if key != "name"} | own
    if isinstance(begun.get("settings"), dict) and isinstance(own.get("settings"), dict):
        changes = own["settings"]
        both["settings"] = without_overruled(begun["settings"], changes) | changes
    return both


def _own_names(raw: Any, place: Callable[[str], str]) -> Any:
    """The comparison with every option of train under its own name (`model_name_or_path`, not
    `model`): what is set over it is found then. Raises ConfigError for one under two names.
    """
    if not isinstance(raw, dict):
        return raw
    changed = dict(raw)
    if isinstance(raw.get("settings"), dict):
        changed["settings"] = _canonical(raw["settings"], place("settings"))
    if isinstance(raw.get("methods"), dict):
        changed["methods"] = {
            name: _canonical(options, place("methods")) if isinstance(options, dict) else options
            for name, options in raw["methods"].items()
        }
    return changed


def _canonical(options: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    check_one_spelling([name for name in options if isinstance(name, str)], lambda _: where)
    return {canonical(k) if isinstance(k, str) else k: value for k, value in options.items()}


def _like(name: Any, folder: Path, where: str) -> Path:
    """The file that a `like:` names: one in this folder, or a shipped one."""
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{where}: like is {name!r}; it names the comparison that this one begins as"
        )
    for path in (folder / name, recipe_path(Path(name).stem)):
        if is_file(path):
            return path
    raise ConfigError(
        f"{where}: like is {name!r}, and there is no such file beside this one; these ship: "
        f"{shipped_names(SHIPPED)}"
    )


# ---- the command line ----------------------------------------------------------------------------


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _values(arguments: Sequence[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--name a b` and `--name` (true) as a file would hold them.

    Raises ConfigError.
    """
    words: dict[str, list[str]] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            name = option_name(argument)
            if name in words:
                raise ConfigError(f"--{name} is given twice, and only one could count: keep one")
            _, equals, value = argument.partition("=")
            words[name] = [value] if equals else []
        elif name is None:
            raise ConfigError(
                f"{argument!r} belongs to no option: options are written --name value"
            )
        else:
            words[name].append(argument)
    return {name: _value(name, given) for name, given in words.items()}


def _value(name: str, words: Sequence[str]) -> Any:
    values = [parse_yaml(word, f"--{name}", ConfigError).value for word in words]
    if not values:
        return True
    return values[0] if len(values) == 1 else values
