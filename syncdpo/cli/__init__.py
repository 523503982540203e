"""The command line: `syncdpo --help` lists its commands.

Each command imports what it needs when it runs, so that help does not wait for torch.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from syncdpo import __version__
from syncdpo.cli.clips import evaluate, sample
from syncdpo.cli.demonstration import compare_rules, demo, tune
from syncdpo.cli.evidence import compare
from syncdpo.cli.latents import prepare, prepare_pairs, probe
from syncdpo.cli.models import check_model
from syncdpo.cli.options import say
from syncdpo.cli.ranking import rank
from syncdpo.cli.rendering import render
from syncdpo.cli.reports import report
from syncdpo.cli.training import train
from syncdpo.training import TrainingDiverged
from syncdpo.versions import WrongVersions, checked_versions

__all__ = ["app", "main"]

app = typer.Typer(
    help="Post-train joint video-audio generators to keep time (SyncDPO, arXiv 2605.12179). "
    "Exit codes: 2 for input to be mended, 3 for a training that diverged.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def info() -> None:
    """What is installed, what was built, and what runs where."""
    from syncdpo.info import describe

    typer.echo(describe())


COMMANDS = (
    demo, tune, compare_rules, compare, render, prepare, prepare_pairs, train, report, sample, rank,
    evaluate, probe, check_model, info,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Run a command; what the user can mend ends in one sentence.

    Exit codes: 2 for wrong input, 3 for a training that diverged.
    """
    try:
        with checked_versions():
            app()
    except (ValueError, OSError, WrongVersions, TrainingDiverged) as error:
        say(f"syncdpo: {error}", err=True)
        sys.exit(3 if isinstance(error, TrainingDiverged) else 2)
