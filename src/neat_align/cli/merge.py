"""`neat-align merge`: a run's adapter merged into its base, as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neat_align.cli.console import quiet

if TYPE_CHECKING:
    from neat_align.modeling.merged_folder import MergedFolder


def merge(
    path: Annotated[Path, typer.Argument(help="A run, or the folder of an adapter.")],
    output: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the merged weights: auto (the base's own), float32, bfloat16, float16."
        ),
    ] = "auto",
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run Python that comes with the base; read it first."
        ),
    ] = False,
) -> None:
    """Merge a run's adapter into its base: a model that plain transformers and servers load.

    It counts only when it is read back and says what the adapter said.
    """
    quiet()
    from neat_align.modeling.load_options import LoadOptions
    from neat_align.modeling.merged_folder import write_merged
    from neat_align.reporting.card_facts import CardModel
    from neat_align.reporting.model_card import write_model_card

    LoadOptions(dtype=dtype)  # a wrong word is refused before anything is loaded
    adapter = model_folder(path)
    run = adapter.parent if (adapter.parent / "run.json").is_file() else adapter

    def card(folder: Path, base: str, revision: str | None) -> None:
        write_model_card(folder, run, CardModel(base, revision, was_merged=True))

    done = write_merged(
        adapter, output, dtype=dtype, trust_remote_code=trust_remote_code, beside=card
    )
    typer.echo("\n".join(_lines(done, output)))


def model_folder(path: Path) -> Path:
    """The model's folder of a run; a model's own folder stays itself. Raises ConfigError."""
    from neat_align.errors import ConfigError

    is_model = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    if is_model:
        return path
    if (path / "model").is_dir():
        return path / "model"
    if (path / "run.json").is_file():
        raise ConfigError(
            f"{path} has no model/ yet, which is written when a run is done: finish it with "
            f"--resume true, or name one of its checkpoints ({path}/checkpoint-N)"
        )
    raise ConfigError(f"{path} is no run and no model's folder: give the output_dir of a run")


def _lines(done: MergedFolder, output: Path) -> list[str]:
    where = "at most" if done.is_worst else "on average"
    lines = [
        f"merged {done.kind} into {done.base}: {done.parameters:,} weights in {done.dtype}",
        f"read back, it says what the adapter said: {done.difference:.2g} nats per token apart "
        f"{where},",
        f"over {done.tokens} tokens (up to {done.limit:g} is rounding)",
    ]
    if done.parted:
        lines.append(
            "embeddings and head are two tensors now: the adapter changed one, and they were shared"
        )
    return [*lines, f"model  {output}", "", f"try:  vllm serve {output}"]
