"""What every command does with the terminal, and the option that most of them share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

# Options that a command does not name itself are those of `train`; they are read by `options`.
ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}
# --dataset_name, as the training options are written, or --dataset-name, as command lines are.
EITHER_DASH = {"token_normalize_func": lambda name: name.replace("-", "_")}
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="A YAML recipe; options after it win over it.")
]


class SeveralValues(TyperCommand):
    """A command without arguments, whose list options take their values in a row.

    `--alpha 0.5 1`, as the options of `train` are written, beside `--alpha 0.5 --alpha 1`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Every value with the name of its option before it."""
        options = [p for p in self.params if isinstance(p, TyperOption) and p.multiple]
        return super().parse_args(ctx, _one_each(args, {_bare(o) for p in options for o in p.opts}))


def _one_each(args: list[str], lists: set[str]) -> list[str]:
    spread: list[str] = []
    option: str | None = None  # the list option whose values these are
    has_value = True
    for word in args:
        if not has_value:  # the first value may begin with a minus
            spread.append(word)
            has_value = True
        elif word.startswith("-"):
            name, _, value = word.partition("=")
            option = name if _bare(name) in lists else None
            has_value = bool(value) or option is None
            spread.append(word)
        else:
            spread += [word] if option is None else [option, word]
    return spread


def _bare(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def quiet() -> None:
    """Keep libraries' chatter off the terminal; warnings that matter come through logging."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()
