"""The commands `prepare` and `probe`: latents made, and listened to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from syncdpo.cli.options import FORMAT, PARTS, ModelName, Output, Seed, load, say, with_options


@with_options(PARTS | FORMAT)
def prepare(
    clips: Annotated[Path, typer.Argument(help="Folder of clips.")],
    output: Output = Path("runs/latents"),
    model: ModelName = "tiny",
    captions: Annotated[
        Path | None, typer.Option(help="csv, jsonl or json; default: a .txt beside each clip.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Leave out clips that look out of step.")] = False,
    shard: Annotated[str, typer.Option(help="rank/world: this process's share.")] = "0/1",
    **options,
) -> None:
    """Encode clips to latents once; safe to interrupt, resumed by the same command."""
    from syncdpo.data.captions import read_captions
    from syncdpo.data.latents import prepare as prepare_clips

    rank, _, world = shard.partition("/")
    if not (rank.isdecimal() and world.isdecimal()):
        raise ValueError(f"shard: expected rank/world, as 0/4, got {shard!r}")
    found = read_captions(clips, captions)
    if str(found):
        say(str(found))  # before hours of encoding
    summary = prepare_clips(
        load(model, **options),
        clips,
        output,
        captions=found or None,
        strict=strict,
        shard=(int(rank), int(world)),
    )
    say(str(summary))


@with_options(PARTS)
def probe(
    data: Annotated[Path, typer.Argument(help="Latent cache made by `syncdpo prepare`.")],
    model: Annotated[str, typer.Option(help="The model that the cache belongs to.")] = "tiny",
    rule: Annotated[
        list[str] | None,
        typer.Option(help="As train's --rules; once for each rule. Default: the four plain ones."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each listener.")] = 200,
    seed: Seed = 0,
    **options,
) -> None:
    """Can losers be told by their sound alone? Near 50 %: the rule teaches time, no artefact."""
    import torch

    from syncdpo.data.latents import LatentDataset
    from syncdpo.negatives.probe import RULES, probe_all, table

    loaded = load(model, **options)
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
