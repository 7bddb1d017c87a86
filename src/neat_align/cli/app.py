"""The command line's commands and how they end: one module a verb.

Heavy imports happen inside commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from neat_align import __version__
from neat_align.cli.capability import capability
from neat_align.cli.compare import compare
from neat_align.cli.console import ANY_OPTION, EITHER_DASH
from neat_align.cli.demo import demo
from neat_align.cli.doctor import doctor
from neat_align.cli.evaluate import evaluate
from neat_align.cli.expand import expand
from neat_align.cli.export import export
from neat_align.cli.init import init
from neat_align.cli.inspect import inspect
from neat_align.cli.merge import merge
from neat_align.cli.probe import probe
from neat_align.cli.processes import check_alone, leaving, quiet_replicas, say_once
from neat_align.cli.push import push
from neat_align.cli.report import report
from neat_align.cli.train import train
from neat_align.cli.verb import Verb, Verbs
from neat_align.errors import (
    NEATError,
    OtherProcessError,
    RewardUnavailableError,
    SamplerUnavailableError,
)
from neat_align.files.secrets import scrubbed
from neat_align.runs.launch import store
from neat_align.runs.lock import NO_ROOM

app = typer.Typer(
    name="neat-align",
    cls=Verbs,
    help="Align a language model with NEAT: it writes good and bad answers itself, and learns to "
    "rank them.",
    pretty_exceptions_enable=False,
)
# EX_TEMPFAIL of sysexits.h: schedulers know it as "try again later".
PAUSED = 75


@app.callback(invoke_without_command=True)
def _no_verb(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"neat-align {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), color=ctx.color)
        raise typer.Exit(2)


# (verb, whether it takes the options of a run); the order is that of `--help`, group by group.
_VERBS: tuple[tuple[Callable[..., None], bool], ...] = (
    (init, False),
    (demo, False),
    (doctor, False),
    (probe, False),
    (train, True),
    (expand, True),
    (evaluate, True),
    (compare, True),
    (capability, False),
    (inspect, False),
    (export, False),
    (merge, False),
    (push, False),
    (report, False),
)
for _verb, _takes_run_options in _VERBS:
    app.command(cls=Verb, context_settings=ANY_OPTION if _takes_run_options else EITHER_DASH)(_verb)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; an error meant for the user is one line on stderr and exit code 2.

    A reward server or vLLM server that stays down is exit code 75: nothing is wrong with the run,
    and the same command goes on with it later. Of several processes one says it, and all end with
    the code; a launcher has an exit code of its own.
    """
    with leaving():
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(given: list[str]) -> Any:
    quiet_replicas()
    try:
        store()  # also where nothing is said: it is where the processes meet
        check_alone(given)
        return app(given, prog_name="neat-align", standalone_mode=True)
    except (RewardUnavailableError, SamplerUnavailableError) as error:
        how = _how_to_resume(given, "when the server is up")
        say_once(f"paused: {scrubbed(str(error))}\n{how}")
        sys.exit(PAUSED)
    except OtherProcessError:
        sys.exit(2)  # the one that failed has said why
    except NEATError as error:
        say_once(f"error: {scrubbed(str(error))}")
        sys.exit(2)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = f" ({error.filename})" if error.filename else ""
        what = f"error: the disk is full: {scrubbed(f'{error.strerror}{where}')}"
        say_once(f"{what}\n{_how_to_resume(given, 'when there is room')}")
        sys.exit(2)


def _how_to_resume(arguments: list[str], when: str) -> str:
    command = arguments[0] if arguments else ""
    if command in ("train", "expand"):
        return (
            f"what is sampled and scored is kept; {when}, go on with the same command and "
            "--resume true"
        )
    if command == "compare":
        return f"what is sampled and scored is kept; {when}, go on with the same command"
    return f"{when}, run the same command again"
