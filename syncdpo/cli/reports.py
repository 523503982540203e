"""The command `report`: a page of any training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from syncdpo.cli.options import say


def report(
    run: Annotated[Path, typer.Argument(help="Folder that `syncdpo train` writes, or wrote, to.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; default: report.html in RUN.")
    ] = None,
) -> None:
    """One page of a training run: samples that play, curves, held-out figures, settings."""
    from syncdpo.report import write_run_report

    say(str(write_run_report(run, output)))
