"""The command `train`, with an option for every setting."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from syncdpo.cli.options import given
from syncdpo.training import TrainConfig


def with_settings(command):
    """Give the command an option for every setting; None: as in the file, or the default."""
    parameters = list(inspect.signature(command).parameters.values())[:-1]
    for setting in fields(TrainConfig):
        option = typer.Option(
            help=setting.metadata["help"], show_default=str(setting.default) or "none"
        )
        parameters.append(
            inspect.Parameter(
                setting.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[type(setting.default) | None, option],
            )
        )
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@with_settings
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
