"""The command `render`: clips that anyone can make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from syncdpo.cli.options import say


def render(
    family: Annotated[
        str, typer.Argument(help="impacts, speech, several or weak; blinds: none of these.")
    ],
    folder: Annotated[Path, typer.Argument(help="Where the clips go, an mp4 per seed.")],
    count: Annotated[int, typer.Option(min=1, help="Clips wanted.")] = 256,
    first: Annotated[int, typer.Option(min=0, help="Seed of the first; the others follow.")] = 0,
    offset_spread: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="Spread (σ) of the clips' A/V offset."),
    ] = 0.0,
) -> None:
    """Render clips of a family as mp4, the same for the same seed; those there are kept."""
    from syncdpo.data.families import find_family
    from syncdpo.data.synthetic import render_folder

    seeds = range(first, first + count)
    written = render_folder(folder, seeds, offset_spread=offset_spread, family=find_family(family))
    kept = f"; kept {count - written} that were there, as they are" if written < count else ""
    say(f"{written} of {count} clips of {family} rendered into {folder}{kept}.")
