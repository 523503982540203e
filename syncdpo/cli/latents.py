"""The commands `prepare` and `probe`: latents made, and listened to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from syncdpo.cli.options import (
    FORMAT,
    PARTS,
    ModelName,
    Output,
    Seed,
    given,
    load,
    say,
    with_options,
)

SIZE = ("frames", "height", "width")  # of `FORMAT`, what a bucket holds


@with_options(PARTS | FORMAT)
def prepare(
    clips: Annotated[Path, typer.Argument(help="Folder of clips.")],
    output: Output = Path("runs/latents"),
    model: ModelName = "tiny",
    captions: Annotated[
        Path | None, typer.Option(help="csv, jsonl or json; default: a .txt beside each clip.")
    ] = None,
    trigger: Annotated[
        str | None, typer.Option(metavar="WORD", help="Put before every caption.")
    ] = None,
    bucket: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FxHxW",
            help="Pictures x height x width, once for each clip format; a clip goes into the "
            "longest that it fills, of those of one length into the nearest in shape.",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option(help="Leave out clips that look out of step.")] = False,
    shard: Annotated[str, typer.Option(help="rank/world: this process's share.")] = "0/1",
    text_encoder_precision: Annotated[
        str | None, typer.Option(help="LTX-2: bf16, or fp8, int8 or nf4, on a small GPU.")
    ] = None,
    **options,
) -> None:
    """Encode clips to latents once; safe to interrupt, resumed by the same command."""
    from syncdpo.data.buckets import parse_bucket
    from syncdpo.data.captions import read_captions
    from syncdpo.data.latents import prepare as prepare_clips

    both = [name for name in SIZE if name in given(options)]
    if bucket and both:
        raise ValueError(
            f"bucket: expected in the place of {', '.join(SIZE)}, got {', '.join(both)} too"
        )
    if trigger is not None and not trigger.strip():
        raise ValueError(f"trigger: expected a word, got {trigger!r}")
    rank, _, world = shard.partition("/")
    if not (rank.isdecimal() and world.isdecimal()):
        raise ValueError(f"shard: expected rank/world, as 0/4, got {shard!r}")
    found = read_captions(clips, captions)
    if str(found):
        say(str(found))  # before hours of encoding
    loaded = load(model, **options, text_encoder_precision=text_encoder_precision)
    summary = prepare_clips(
        loaded,
        clips,
        output,
        captions=found or None,
        sounds=found.sounds,
        trigger=trigger and trigger.strip(),
        buckets=[parse_bucket(text, loaded.clip_format.fps) for text in bucket or ()],
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
    from syncdpo.data.buckets import take_format
    from syncdpo.data.precomputed import open_latents
    from syncdpo.negatives.probe import FEWEST, RULES, probe_all, table

    loaded = load(model, **options)
    sounds = sounds_by_bucket(open_latents(data, loaded))
    most = max(map(len, sounds.values()))
    for bucket, audio in sounds.items():
        few = len(audio) < min(FEWEST, most)  # where all are too few, `probe_all` says so
        if bucket is not None:
            why = f" not listened to, too few ({FEWEST} at least)" if few else ""
            typer.echo(f"{len(audio)} clips of {bucket} at {bucket.fps:g} fps:{why}")
        if few:
            continue
        take_format(loaded, bucket)
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


def sounds_by_bucket(latents) -> dict:
    """The sounds of all clips, [N,L,C] for each clip format."""
    import torch

    sounds: dict = {}
    for bucket, sample in zip(latents.buckets, latents, strict=True):
        sounds.setdefault(bucket, []).append(sample["audio"])
    return {bucket: torch.stack(found) for bucket, found in sounds.items()}
