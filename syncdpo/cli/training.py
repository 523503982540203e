"""The command `train`, with an option for every setting."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from syncdpo.cli.options import given, with_options
from syncdpo.training import TrainConfig

SETTINGS = {
    setting.name: Annotated[
        type(setting.default) | None,
        typer.Option(help=setting.metadata["help"], show_default=str(setting.default) or "none"),
    ]
    for setting in fields(TrainConfig)
}


@with_options(SETTINGS)
def train(
    config: Annotated[Path | None, typer.Option(help="yaml file of the settings below.")] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print all settings as yaml, train nothing.")
    ] = False,
    **settings,
) -> None:
    """Train on prepared latents. On several GPUs: accelerate launch -m syncdpo train …"""
    from syncdpo.training import dump_config, load_config

    chosen = replace(load_config(config) if config else TrainConfig(), **given(settings))
    if show_config:
        typer.echo(dump_config(chosen), nl=False)
        return
    from syncdpo.train import train as run

    result = run(chosen)
    typer.echo(
        f"{result['steps']} steps in {result['seconds']:.0f} s, {result['skipped']} skipped; "
        f"weights in {chosen.output}"
    )
