"""What every command does with the terminal, and the option that most of them share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

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

    `--alpha 0.5 1` as in recipes' options, beside `--alpha 0.5 --alpha 1`.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Every value with the name of its option before it."""
        lists = {
            name
            for option in self.params
            if isinstance(option, TyperOption) and option.multiple
            for name in option.opts
        }
        return super().parse_args(ctx, _one_each(args, lists))


def _one_each(args: list[str], lists: set[str]) -> list[str]:
    spread: list[str] = []
    current: str | None = None  # the list option that has its first value
    for word in args:
        if word.startswith("-") and not (spread and spread[-1] == current):
            current = (
                word
                if word.replace("-", "_").removeprefix("__")
                in {name.replace("-", "_").removeprefix("__") for name in lists}
                else None
            )
            spread.append(word)
        elif current is not None and spread[-1] != current:
            spread += [current, word]
        else:
            spread.append(word)
    return spread


def quiet() -> None:
    """Keep libraries' chatter off the terminal; warnings that matter come through logging."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()
