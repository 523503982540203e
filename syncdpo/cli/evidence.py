"""The command `compare`: what each method is worth on rendered families."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from syncdpo.cli.options import Jobs, Output


def compare(
    output: Output = Path("runs/evidence"),
    result: Annotated[
        Path | None,
        typer.Option(help="All figures, as JSON; default: evidence.json in the output folder."),
    ] = None,
    jobs: Jobs = 2,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Every part in a minute; its figures say nothing."),
    ] = False,
) -> None:
    """Base, SFT, DPO of ranked samples and SyncDPO on four families of clips and a fifth.

    The protocol is in docs/evidence.md. Hours on two cores; the same command goes on where it was
    stopped.
    """
    from syncdpo.evidence import FULL, QUICK
    from syncdpo.evidence import compare as compare_methods

    protocol = QUICK if quick else FULL
    folder = output / "quick" if quick else output
    typer.echo(compare_methods(protocol, folder, result or folder / "evidence.json", jobs))
