"""What several commands share: options, and how they speak."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for everything written.")]
Seed = Annotated[int, typer.Option(help="Everything random follows from it.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps of SFT and SyncDPO.")]
Samples = Annotated[int, typer.Option(min=1, help="Clips measured after each training.")]
Result = Annotated[Path, typer.Option(help="Table of all trials, as JSON.")]
Jobs = Annotated[int, typer.Option(min=1, help="Trials side by side, one thread each.")]
OffsetSpread = Annotated[
    float | None,
    typer.Option(
        min=0, metavar="SECONDS", help="Spread (σ) of the training clips' A/V offset; default 0.06."
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        help="tiny; a diffusers folder or hub id of LTX-2 or Kandinsky 6; LTX-2's .safetensors; "
        "or your own, module:Class."
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="Trained weights or LoRA; default: the model's own.")
]
AllowPartial = Annotated[bool, typer.Option(help="Take what fits of a LoRA, leave the rest.")]
Caption = Annotated[str, typer.Option(help="What to generate; tiny takes no text.")]
SamplingSteps = Annotated[
    int | None, typer.Option(min=1, help="Sampling steps; default: the model's own number.")
]
NegativePrompt = Annotated[
    str | None, typer.Option(help="What to steer away from; tiny has no guidance.")
]
StgBlock = Annotated[
    list[int] | None,
    typer.Option(help="Blocks that STG perturbs, default 28; LTX-2.0: 29. Repeatable."),
]
Weight = Annotated[float | None, typer.Option(help="Default: the pipeline's own.", metavar="W")]
_Part = Annotated[
    Path | None,
    typer.Option(help="File or folder of that part of LTX-2, where the model has none."),
]
_Pixels = Annotated[
    int | None, typer.Option(help="Pixels; LTX-2: a multiple of 32; Kandinsky 6: of 16.")
]
# What `load` takes beside the model's name.
PARTS = dict.fromkeys(("text_encoder", "video_vae", "audio_vae"), _Part)
FORMAT = {
    "frames": Annotated[
        int | None, typer.Option(help="Pictures per clip; LTX-2: 8k+1; Kandinsky 6: 4k+1.")
    ],
    "height": _Pixels,
    "width": _Pixels,
    "fps": Annotated[float | None, typer.Option(help="Pictures per second; Kandinsky 6: 24.")],
}


def with_options(options: dict[str, object]) -> Callable:
    """Name → annotation of options that stand for the command's last argument, its `**options`.

    None where one is not given. Annotations that are still strings are read here: typer takes those
    of a signature made by hand as they are, and would lose the help in them.
    """

    def widened(command: Callable) -> Callable:
        parameters = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for name, kind in options.items()
        ]
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return widened


def load(name: str, **wanted):
    """The model, with other parts or in another clip format than its own where asked for."""
    from syncdpo.models import load_model

    return load_model(name, **given(wanted))


def say(text: str, *, err: bool = False) -> None:
    """Prints names in whatever encoding the terminal has."""
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    typer.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=err)


def given(options: dict) -> dict:
    """Without those that were left to their defaults."""
    return {name: value for name, value in options.items() if value is not None}
