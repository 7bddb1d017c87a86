"""What an option may be set to, declared where the option is, and one function that checks it.

`option` declares a dataclass field: its default, its help text (with unit and source), and its
limits. `check_options` checks every field of a configuration against them, then the rules that look
at several options at once. Every message says what came, what was needed, and what to change, and
begins with the name of an option that was set: the command line looks up its line in the recipe.
"""

from __future__ import annotations

import functools
import json
import math
import os
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, TypeVar, cast

from neat_align.errors import ConfigError

T = TypeVar("T")
# A field's type as a dataclass has it (text, or an object once a parser has resolved it), and what
# reads a value of that type from text.
_NUMBERS: dict[str, type[int] | type[float]] = {
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": float,
}


@dataclass(frozen=True)
class OnlyWith:
    """An option that is read only while another one has some values.

    Attributes:
        option: the other option.
        message: what is wrong otherwise; `{c.name}` stands for the value of any option.
        one_of: values of the other option under which this one is read; empty allows any.
        none_of: values of the other option under which this one is not read.
    """

    option: str
    message: str
    one_of: tuple[Any, ...] = ()
    none_of: tuple[Any, ...] = ()

    def is_met(self, value: Any) -> bool:
        """Whether the option is read when the other one has this value."""
        return (not self.one_of or value in self.one_of) and value not in self.none_of


@dataclass(frozen=True)
class Rule:
    """A combination of options that cannot work.

    Attributes:
        when: whether a configuration has it.
        message: what is wrong and what to change; `{c.name}` stands for the value of any option.
    """

    when: Callable[[Any], bool]
    message: str


@dataclass(frozen=True)
class Limits:
    """What one option may be set to. An option whose default is None may also be None.

    Attributes:
        choices: the only values, where there are any.
        ge, gt, le, lt: bounds of a number (≥, >, ≤, <).
        whole: whether the number must be a whole one.
        also: values that are allowed although a bound forbids them, such as 0 for "off".
        needed: the part of the message that says what is needed; None derives it from the bounds.
        only_with: what other options must be when this one is not its default.
    """

    choices: tuple[str, ...] = ()
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    whole: bool = False
    also: tuple[float, ...] = ()
    needed: str | None = None
    only_with: tuple[OnlyWith, ...] = ()

    @property
    def has_bounds(self) -> bool:
        """Whether only some numbers are allowed."""
        return self.whole or (self.ge, self.gt, self.le, self.lt) != (None,) * 4

    def allows(self, value: Any) -> bool:
        """Whether a value (other than None) is allowed, whatever the other options are."""
        if self.choices:
            return value in self.choices
        if not self.has_bounds or value in self.also:
            return True
        return isinstance(value, Real) and self._within(float(value))

    def _within(self, value: float) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and (not self.whole or value == int(value))
        )

    def said(self) -> str:
        """What is needed, for a message: "it must be …"."""
        if self.needed is not None:
            return self.needed
        if self.choices:
            return f"it must be one of {', '.join(self.choices)}"
        if self.ge == 0 and self.le is None and self.lt is None:
            return "it must not be negative"
        bounds = (
            (self.ge, "{:g} or more"),
            (self.gt, "above {:g}"),
            (self.le, "at most {:g}"),
            (self.lt, "below {:g}"),
        )
        return "it must be " + " and ".join(s.format(b) for b, s in bounds if b is not None)


class _Help(str):
    """A help text that carries the limits of its option.

    They cannot stand beside the text in the field's metadata: transformers' HfArgumentParser, which
    users may call with our dataclasses, hands all of the metadata to argparse, and argparse refuses
    a name that it does not know.
    """

    limits: Limits


def option(
    default: T,
    help_text: str,
    *,
    choices: tuple[str, ...] = (),
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    whole: bool = False,
    also: tuple[float, ...] = (),
    needed: str | None = None,
    only_with: tuple[OnlyWith, ...] = (),
) -> T:
    """A dataclass field with a default, a help text and limits (see `Limits`)."""
    text = _Help(help_text)
    text.limits = Limits(choices, ge, gt, le, lt, whole, also, needed, only_with)
    return field(default=default, metadata={"help": text})


def limits_of(f: Field[Any]) -> Limits:
    """The limits that a field was declared with; none for a field that `option` did not make."""
    text = f.metadata.get("help")
    return text.limits if isinstance(text, _Help) else Limits()


def default_of(f: Field[Any]) -> Any:
    """The value of a field that is left out; `dataclasses.MISSING` where there is none."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def check_limits(f: Field[Any], value: Any, limits: Limits) -> None:
    """Raise ConfigError for a value outside of its limits; None passes where it is the default."""
    if (value is None and f.default is None) or limits.allows(value):
        return
    shown = repr(value) if limits.choices else value
    raise ConfigError(f"{f.name} is {shown}; {limits.said()}")


def check_options(config: Any, rules: Iterable[Rule] = ()) -> None:
    """Check a dataclass against the limits of its fields, then against rules on several of them.

    Raises ConfigError for the first thing that is wrong: values by themselves, then options that
    the chosen mode would not read, then `rules`.
    """
    limits = [(f, limits_of(f)) for f in fields(config)]
    for f, limit in limits:
        check_limits(f, getattr(config, f.name), limit)
    for f, limit in limits:
        if getattr(config, f.name) == default_of(f):
            continue
        for needs in limit.only_with:
            if not needs.is_met(getattr(config, needs.option)):
                raise ConfigError(needs.message.format(c=config))
    for rule in rules:
        if rule.when(config):
            raise ConfigError(rule.message.format(c=config))


def read_numbers(config: Any) -> None:
    """Turn numbers that came as text into numbers (YAML reads 1e-5, without a dot, as text).

    Raises ConfigError for text that is no number, and for a number that is not finite.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, str):
            value = _number(f, value)
            setattr(config, f.name, value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(
                f"{f.name} is {value}; it must be a finite number: correct it, or leave it out"
            )


# What is taken for a value of a type, besides the type itself.
_ALSO: Mapping[type, tuple[type, ...]] = {
    int: (Integral,),
    float: (Real,),
    str: (os.PathLike,),
    list: (tuple,),
    dict: (Mapping,),
}
_SAID: Mapping[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


def check_kinds(config: Any) -> None:
    """Refuse a value of another kind than its option's: "yes" for true, a list for a number.

    A whole number that came as a float (64.0) becomes an int. An option may be None where that is
    its default, and where it is no number and no switch. Raises ConfigError.
    """
    by_name = _kinds_of(cast("Hashable", type(config)))
    for f in fields(config):
        value, kinds = getattr(config, f.name), by_name.get(f.name, ())
        may_be_none = f.default is None or type(None) in kinds or not {int, float, bool} & {*kinds}
        if not kinds or (value is None and may_be_none):
            continue
        if int in kinds and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
            value = int(value)
            setattr(config, f.name, value)
        taken = tuple(t for kind in kinds for t in (kind, *_ALSO.get(kind, ())))
        is_bool_as_number = isinstance(value, bool) and bool not in kinds
        if not isinstance(value, taken) or is_bool_as_number:
            said = " or ".join(_SAID[kind] for kind in kinds if kind in _SAID)
            raise ConfigError(f"{f.name} is {value!r}; it must be {said}: correct it")


@functools.cache
def _kinds_of(config_class: Any) -> dict[str, tuple[type, ...]]:
    """The classes that a dataclass allows for each field; nothing where a hint is no class."""
    hints = typing.get_type_hints(config_class)
    return {f.name: _classes(hints[f.name]) for f in fields(config_class)}


def _classes(hint: Any) -> tuple[type, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    parts = typing.get_args(hint) if is_union else (hint,)
    classes = [typing.get_origin(part) or part for part in parts]
    if not all(isinstance(c, type) for c in classes):
        return ()
    return tuple(classes)


def _number(f: Field[Any], text: str) -> str | float:
    """The number that a text stands for; the text itself where the field holds no number."""
    type_name = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
    kind = _NUMBERS.get(type_name) or _NUMBERS.get(str(f.type))
    if kind is None:
        return text
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise ConfigError(
            f"{f.name} is {text!r}; it must be a {what}, such as {kind(1)}: correct it"
        ) from None


def read_object(config: Any, name: str) -> None:
    """Turn an option that came as the text of a JSON object into that object.

    Raises ConfigError for anything else that is set.
    """
    value = getattr(config, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f'{name} is {value!r}; it must be a JSON object, such as {{"name": true}} '
                f"({getattr(error, 'msg', error)}): correct it"
            ) from None
        setattr(config, name, value)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(
            f"{name} is {value!r}; it must be a mapping of names to values: correct it, or leave "
            "it out"
        )
