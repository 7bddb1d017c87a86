"""What every command does with the terminal, and the option that most of them share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

# Options that a command does not name itself are those of `train`; they are read by `options`.
ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}
# --dataset_name, as the training options are written, or --dataset-name, as command lines are.
EITHER_DASH = {"token_normalize_func": lambda name: name.replace("-", "_")}
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="A YAML recipe; options after it win over it.")
]


def quiet() -> None:
    """Keep libraries' chatter off the terminal; warnings that matter come through logging."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()
