"""`neat-align push`: a finished model to the hub, and nothing else of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    path: Annotated[Path, typer.Argument(help="A finished run, or the folder of a model.")],
    repo: Annotated[
        str, typer.Option(help="OWNER/NAME on the hub; it is made if it is not there.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Not a private repository, where it is new.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str, typer.Option(help="The commit's message.")] = "Upload model",
) -> None:
    """Push a model, its tokenizer and its card to the hub; never rounds, reports or checkpoints.

    A repository that is not there yet is made, private unless --public. The token is read from
    HF_TOKEN, or is that of `hf auth login`.
    """
    from neat_align.cli.merge import model_folder
    from neat_align.network.hub import (
        check_base_is_known,
        make_repository,
        model_files,
        push_folder,
    )

    folder = model_folder(path)
    files = model_files(folder)
    check_base_is_known(folder)
    name = make_repository(repo, token=None, private=not public)
    typer.echo(f"pushing {len(files)} files of {folder} to {name}: {', '.join(files)}")
    done = push_folder(folder, name, message=message, revision=revision)
    typer.echo(f"done: {done.commit_url}")
