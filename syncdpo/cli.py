"""The command line: `syncdpo --help` lists its commands."""

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
from syncdpo.config import TrainConfig, TrainingDiverged

app = typer.Typer(
    help="Post-train joint video-audio generators to keep time (SyncDPO, arXiv 2605.12179). "
    "Exit codes: 2 for input to be mended, 3 for a training that diverged.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
Frames = Annotated[int | None, typer.Option(help="Pictures per clip; LTX-2: 8k+1.")]
Pixels = Annotated[int | None, typer.Option(help="Pixels; LTX-2: a multiple of 32.")]
Rate = Annotated[float | None, typer.Option(help="Pictures per second.")]
Weight = Annotated[float | None, typer.Option(help="Default: the pipeline's own.", metavar="W")]


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
    steps: Steps = 60,
    samples: Samples = 128,
    seed: Seed = 0,
    offset_spread: OffsetSpread = None,
) -> None:
    """Watch a small generator learn to keep time: minutes on two CPU cores, no downloads."""
    from syncdpo.demo import DemoConfig, format_table, run

    if clips and offset_spread:
        raise ValueError("offset-spread: expected 0 with your own clips, which stay as they are")
    spread = _given({"offset_spread": offset_spread})
    report = run(DemoConfig(output, clips, steps, samples, seed=seed, **spread))
    typer.echo(format_table(report))
    _say(f"\nOpen {output / 'report.html'}")


@app.command()
def tune(
    output: Output = Path("runs/tune"),
    result: Result = Path("benchmarks/results/tune.json"),
    steps: Steps = 60,
    samples: Samples = 64,
    jobs: Jobs = 2,
    offset_spread: OffsetSpread = None,
) -> None:
    """Find each method's weights and learning rate, on noise that the demo never measures on."""
    from syncdpo.demo import DemoConfig
    from syncdpo.trials import tune as find

    config = DemoConfig(
        output,
        steps=steps,
        samples=samples,
        purpose="validation",
        progress=False,
        **_given({"offset_spread": offset_spread}),
    )
    typer.echo(find(config, result, jobs))


@app.command()
def compare_rules(
    output: Output = Path("runs/rules"),
    result: Result = Path("benchmarks/results/rules.json"),
    steps: Steps = 60,
    samples: Samples = 48,
    jobs: Jobs = 2,
) -> None:
    """What each rule teaches: constant and rising difficulty, matched or not, on three seeds."""
    from syncdpo.demo import DemoConfig
    from syncdpo.trials import compare_rules as compare

    config = DemoConfig(output, steps=steps, samples=samples, purpose="validation", progress=False)
    typer.echo(compare(config, result, jobs))


@app.command()
def prepare(
    clips: Annotated[Path, typer.Argument(help="Folder of clips.")],
    output: Output = Path("runs/latents"),
    model: Annotated[str, typer.Option(help="tiny, or an LTX-2 folder or hub id.")] = "tiny",
    captions: Annotated[
        Path | None, typer.Option(help="csv, jsonl or json; default: a .txt beside each clip.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Leave out clips that look out of step.")] = False,
    shard: Annotated[str, typer.Option(help="rank/world: this process's share.")] = "0/1",
    frames: Frames = None,
    height: Pixels = None,
    width: Pixels = None,
    fps: Rate = None,
) -> None:
    """Encode clips to latents once; safe to interrupt, resumed by the same command."""
    from syncdpo.data.captions import read_captions
    from syncdpo.data.latents import prepare as prepare_clips

    rank, _, world = shard.partition("/")
    if not (rank.isdecimal() and world.isdecimal()):
        raise ValueError(f"shard: expected rank/world, as 0/4, got {shard!r}")
    found = read_captions(clips, captions)
    if str(found):
        _say(str(found))  # before hours of encoding
    summary = prepare_clips(
        _load_model(model, frames=frames, height=height, width=width, fps=fps),
        clips,
        output,
        captions=found or None,
        strict=strict,
        shard=(int(rank), int(world)),
    )
    _say(str(summary))


def _load_model(name: str, **wanted):
    """The model, in another clip format than its own where one is asked for."""
    from syncdpo.models import load_model

    return load_model(name, **_given(wanted))


def _say(text: str, *, err: bool = False) -> None:
    """Prints names in whatever encoding the terminal has."""
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    typer.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=err)


def _given(options: dict) -> dict:
    """Without those that were left to their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _with_settings(command):
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
    from syncdpo.config import dump_config, load_config

    chosen = replace(load_config(config) if config else TrainConfig(), **_given(settings))
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
    captions: Annotated[
        Path | None, typer.Option(help="Text file with a caption on each line, instead.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Clips to generate of each caption.")] = 4,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps; default: the model's own number.")
    ] = None,
    seed: Seed = 0,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to steer away from; guidance is LTX-2's alone.")
    ] = None,
    guidance_scale: Weight = None,
    audio_guidance_scale: Weight = None,
    guidance_rescale: Weight = None,
    audio_guidance_rescale: Weight = None,
    modality_scale: Weight = None,
    audio_modality_scale: Weight = None,
    stg_scale: Weight = None,
    audio_stg_scale: Weight = None,
    stg_block: Annotated[
        list[int] | None,
        typer.Option(help="Blocks that STG perturbs, default 28; LTX-2.0: 29. Repeatable."),
    ] = None,
    frames: Frames = None,
    height: Pixels = None,
    width: Pixels = None,
    fps: Rate = None,
) -> None:
    """Generate clips as mp4; LTX-2 by its pipeline, guided as the pipeline guides by default."""
    from syncdpo.sampling import generate, noise_seeds

    guidance = _given({
        "negative_prompt": negative_prompt,
        "guidance_scale": guidance_scale,
        "audio_guidance_scale": audio_guidance_scale,
        "guidance_rescale": guidance_rescale,
        "audio_guidance_rescale": audio_guidance_rescale,
        "modality_scale": modality_scale,
        "audio_modality_scale": audio_modality_scale,
        "stg_scale": stg_scale,
        "audio_stg_scale": audio_stg_scale,
        "spatio_temporal_guidance_blocks": stg_block or None,
    })  # fmt: skip
    texts = _lines(captions) if captions else [caption]
    if captions and caption:
        raise ValueError("caption: expected none beside --captions")
    loaded = _load_model(model, frames=frames, height=height, width=width, fps=fps)
    if weights:
        loaded.load_weights(weights)
    seeds = noise_seeds(count, seed, "sample")
    for path in generate(loaded, output, seeds, captions=texts, steps=steps, **guidance):
        _say(str(path))


def _lines(captions: Path) -> list[str]:
    """A caption from each line that has one; lines end at line feeds only."""
    from syncdpo.data.captions import NO_TEXT, decode_text

    try:
        text, guess = decode_text(captions.read_bytes())
    except UnicodeError as error:
        raise ValueError(f"captions: {captions} is {NO_TEXT}") from error
    if guess:
        _say(f"captions: {captions}: {guess}", err=True)
    texts = [line.strip() for line in text.split("\n") if line.strip()]
    if not texts:
        raise ValueError(f"captions: expected a caption on each line, got none in {captions}")
    return texts


@app.command()
def evaluate(
    clips: Annotated[Path, typer.Argument(help="Folder of clips with sound.")],
    output: Output = Path("runs/evaluation"),
    av_align: Annotated[bool, typer.Option(help="AV-Align too; needs syncdpo[eval].")] = True,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="module:function, Clip → float: a column of your own. Repeatable."),
    ] = None,
) -> None:
    """Measure how well clips keep time: onset error, F1, AV-Align; writes csv and html."""
    from syncdpo.evaluation import evaluate_folder, load_metric

    extra = dict(map(load_metric, metric or []))
    _say(evaluate_folder(clips, output, with_av_align=av_align, extra=extra))


@app.command()
def probe(
    data: Annotated[Path, typer.Argument(help="Latent cache made by `syncdpo prepare`.")],
    model: Annotated[str, typer.Option(help="The model that the cache belongs to.")] = "tiny",
    rule: Annotated[
        list[str] | None,
        typer.Option(help="As train's --rules; once for each rule. Default: the four plain ones."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each listener.")] = 200,
    seed: Seed = 0,
) -> None:
    """Can losers be told by their sound alone? Near 50 %: the rule teaches time, no artefact."""
    import torch

    from syncdpo.data.latents import LatentDataset
    from syncdpo.models import load_model
    from syncdpo.probe import RULES, probe_all, table

    loaded = load_model(model)
    latents = LatentDataset(data, loaded.identity())
    audio = torch.stack([sample["audio"] for sample in latents])
    video_timeline, audio_timeline = loaded.timelines
    findings = probe_all(
        audio,
        video_timeline=video_timeline,
        audio_timeline=audio_timeline,
        rules=rule or RULES,
        steps=steps,
        seed=seed,
    )
    typer.echo(table(findings))


@app.command()
def info() -> None:
    """What is installed, what was built, and what runs where."""
    from syncdpo.info import describe

    typer.echo(describe())


def main() -> None:
    """Run a command; what the user can mend ends in one sentence.

    Exit codes: 2 for wrong input, 3 for a training that diverged.
    """
    try:
        app()
    except (ValueError, OSError, TrainingDiverged) as error:
        _say(f"syncdpo: {error}", err=True)
        sys.exit(3 if isinstance(error, TrainingDiverged) else 2)


if __name__ == "__main__":
    main()
