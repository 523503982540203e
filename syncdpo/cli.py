"""The command line: syncdpo demo | prepare | train | sample | evaluate | probe | tune | info."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    sys.exit("The command line needs the training extras: pip install 'syncdpo[train]'")

from syncdpo import __version__

app = typer.Typer(
    help="Post-train joint video-audio generators to keep time (SyncDPO, arXiv 2605.12179).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for everything written.")]
Seed = Annotated[int, typer.Option(help="Everything random follows from it.")]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    output: Output = Path("runs/demo"),
    clips: Annotated[
        Path | None, typer.Option(help="Folder of your own clips, instead of rendered ones.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of SFT and SyncDPO.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Clips generated per method.")] = 128,
    seed: Seed = 0,
) -> None:
    """Watch a small generator learn to keep time: minutes on two CPU cores, no downloads."""
    from syncdpo.demo import DemoConfig, format_table, run

    report = run(DemoConfig(output, clips, steps, samples, seed=seed))
    typer.echo(format_table(report))
    typer.echo(f"\nOpen {output / 'report.html'}")


@app.command()
def tune(
    output: Output = Path("runs/tune"),
    result: Annotated[Path, typer.Option(help="Table of all trials, as JSON.")] = Path(
        "benchmarks/results/learning-rates.json"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of SFT and SyncDPO.")] = 200,
    seed: Seed = 0,
) -> None:
    """Find each method's learning rate for the demo, on noise that the demo never measures on."""
    from syncdpo.demo import DemoConfig, tune_learning_rates

    tune_learning_rates(DemoConfig(output, steps=steps, seed=seed, purpose="validation"), result)


@app.command()
def prepare(
    clips: Annotated[Path, typer.Argument(help="Folder of clips.")],
    output: Output = Path("runs/latents"),
    model: Annotated[str, typer.Option(help="tiny, or an LTX-2 folder or hub id.")] = "tiny",
    captions: Annotated[
        Path | None, typer.Option(help="csv or jsonl of captions; default: sidecar .txt files.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Leave out clips that look out of step.")] = False,
    shard: Annotated[str, typer.Option(help="rank/world: this process's share.")] = "0/1",
) -> None:
    """Encode clips to latents once; safe to interrupt, resumed by the same command."""
    from syncdpo.data.captions import read_captions
    from syncdpo.data.latents import prepare as prepare_clips
    from syncdpo.models import load_model

    rank, _, world = shard.partition("/")
    summary = prepare_clips(
        load_model(model),
        clips,
        output,
        captions=read_captions(captions, clips) if captions else None,
        strict=strict,
        shard=(int(rank), int(world)),
    )
    typer.echo(str(summary))


def _with_settings(command):
    """Give the command an option for every setting; None: as in the file, or the default."""
    from syncdpo.config import TrainConfig

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


@app.command()
@_with_settings
def train(
    config: Annotated[Path | None, typer.Option(help="yaml file of the settings below.")] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print all settings as yaml, train nothing.")
    ] = False,
    **settings,
) -> None:
    """Train on prepared latents. On several GPUs: accelerate launch -m syncdpo.cli train …"""
    from syncdpo.config import TrainConfig, dump_config, load_config

    given = {name: value for name, value in settings.items() if value is not None}
    chosen = replace(load_config(config) if config else TrainConfig(), **given)
    if show_config:
        typer.echo(dump_config(chosen), nl=False)
        return
    from syncdpo.train import train as run

    result = run(chosen)
    typer.echo(
        f"{result['steps']} steps in {result['seconds']:.0f} s, {result['skipped']} skipped; "
        f"weights in {chosen.output}"
    )


@app.command()
def sample(
    output: Output = Path("runs/samples"),
    model: Annotated[str, typer.Option(help="tiny, or an LTX-2 folder or hub id.")] = "tiny",
    weights: Annotated[
        Path | None, typer.Option(help="Trained weights or LoRA; default: the model's own.")
    ] = None,
    caption: Annotated[str, typer.Option(help="What to generate; tiny takes no text.")] = "",
    count: Annotated[int, typer.Option(min=1, help="Clips to generate.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    seed: Seed = 0,
) -> None:
    """Generate clips as mp4."""
    from syncdpo.sampling import sample_clips

    for path in sample_clips(model, output, weights, caption, count, steps, seed):
        typer.echo(str(path))


@app.command()
def evaluate(
    clips: Annotated[Path, typer.Argument(help="Folder of clips with sound.")],
    output: Output = Path("runs/evaluation"),
    av_align: Annotated[bool, typer.Option(help="AV-Align too; needs syncdpo[eval].")] = True,
) -> None:
    """Measure how well clips keep time: onset error, F1, AV-Align; writes csv and html."""
    from syncdpo.evaluation import evaluate_folder

    typer.echo(evaluate_folder(clips, output, with_av_align=av_align))


@app.command()
def info() -> None:
    """What is installed, what was built, and what runs where."""
    from syncdpo.info import describe

    typer.echo(describe())


def main() -> None:
    """Run a command; what the user can mend ends in one sentence and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"syncdpo: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
