"""The command `train`, with an option for every setting."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from syncdpo.cli.options import given, with_options
from syncdpo.training import TrainConfig

REPEATABLE = ("metric",)  # as options; as settings, texts joined by commas
SETTINGS = {
    setting.name: Annotated[
        (list[str] if setting.name in REPEATABLE else type(setting.default)) | None,
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
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print memory and operations, train nothing.")
    ] = False,
    tflops: Annotated[
        float | None, typer.Option(help="With --estimate: what the GPU reaches, for a time.")
    ] = None,
    **settings,
) -> None:
    """Train on prepared latents. On several GPUs: accelerate launch -m syncdpo train …"""
    from syncdpo.training import dump_config, load_config

    settings |= {name: ",".join(settings[name]) for name in REPEATABLE if settings[name]}
    chosen = replace(load_config(config) if config else TrainConfig(), **given(settings))
    if tflops is not None and not estimate:
        raise ValueError("tflops: expected with --estimate, which it gives a time")
    if show_config:
        typer.echo(dump_config(chosen), nl=False)
        return
    if estimate:
        from syncdpo.training.memory import describe_needs

        typer.echo(describe_needs(chosen, tflops=tflops))
        return
    result = _run(chosen)
    typer.echo(
        f"{result['steps']} steps in {result['seconds']:.0f} s, {result['skipped']} skipped; "
        f"weights of step {result['kept_step']} in {chosen.output}"
    )


def _run(config: TrainConfig) -> dict:
    """`syncdpo.train.train`; without memory on the GPU it ends with what would save most."""
    from torch import OutOfMemoryError

    from syncdpo.train import train as run

    try:
        return run(config)
    except OutOfMemoryError as error:
        from syncdpo.training.memory import out_of_memory

        raise ValueError(out_of_memory(config)) from error
