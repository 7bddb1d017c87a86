"""What every command does with the terminal, and the option that most of them share."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from neat_align.cli import completion
from neat_align.errors import ConfigError

# --dataset_name, as the training options are written, or --dataset-name, as command lines are.
EITHER_DASH = {"token_normalize_func": lambda name: name.replace("-", "_")}
# Options that a command does not name itself are those of `train`; they are read by `options`.
ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True, **EITHER_DASH}
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="A YAML recipe, or the name of one that ships.",
        autocompletion=completion.recipes,
    ),
]


def quiet() -> None:
    """Keep libraries' chatter off the terminal; warnings that matter come through logging."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import the libraries of a run inside of this: a process takes two seconds less.

    What they make stays until the end. Python would look through all of it for garbage again and
    again while it grows, then in every full collection of the run, and once more as it ends. Where
    torch is there already, so is what else a program made: that is left as it is.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def json_file(output: Path | None, name: str) -> Path | None:
    """The JSON file that an `--output` means: itself, or the one of that name in a folder.

    Raises ConfigError for a file that is no .json.
    """
    if output is None or output.suffix == ".json":
        return output
    if output.suffix and not output.is_dir():
        raise ConfigError(
            f"{output} must end in .json, or be a folder: the numbers are written as JSON"
        )
    return output / name
