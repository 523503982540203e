"""The commands `prepare`, `prepare-pairs` and `probe`: latents made, and listened to."""

from __future__ import annotations

from collections.abc import Callable
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
Trigger = Annotated[str | None, typer.Option(metavar="WORD", help="Put before every caption.")]
Shard = Annotated[str, typer.Option(help="rank/world: this process's share.")]
TextPrecision = Annotated[
    str | None, typer.Option(help="Not of tiny: bf16, or fp8, int8 or nf4, on a small GPU.")
]


@with_options(PARTS | FORMAT)
def prepare(
    clips: Annotated[Path, typer.Argument(help="Folder of clips.")],
    output: Output = Path("runs/latents"),
    model: ModelName = "tiny",
    captions: Annotated[
        Path | None, typer.Option(help="csv, jsonl or json; default: a .txt beside each clip.")
    ] = None,
    trigger: Trigger = None,
    bucket: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FxHxW",
            help="Pictures x height x width, once for each clip format; a clip goes into the "
            "longest that it fills, of those of one length into the nearest in shape.",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option(help="Leave out clips that look out of step.")] = False,
    shard: Shard = "0/1",
    text_encoder_precision: TextPrecision = None,
    **options,
) -> None:
    """Encode clips to latents once; safe to interrupt, resumed by the same command."""
    from syncdpo.data.captions import read_captions
    from syncdpo.data.latents import prepare as prepare_clips

    wanted = checked(bucket, trigger, shard, options)
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
        strict=strict,
        **wanted(loaded),
    )
    say(str(summary))


def checked(bucket: list[str] | None, trigger: str | None, shard: str, options: dict) -> Callable:
    """What both kinds of `prepare` take from these options, once the model is there.

    Raises ValueError, before it is loaded, for options that are none or contradict each other.
    """
    from syncdpo.data.buckets import parse_bucket

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
    return lambda model: {
        "trigger": trigger and trigger.strip(),
        "buckets": [parse_bucket(text, model.clip_format.fps) for text in bucket or ()],
        "shard": (int(rank), int(world)),
    }


@with_options(PARTS | FORMAT)
def prepare_pairs(
    pairs: Annotated[
        Path | None,
        typer.Argument(
            help="csv with the columns win, lose and, if there are any, caption; paths are "
            "relative to it. jsonl and json hold the same.",
            show_default=False,
        ),
    ] = None,
    win: Annotated[
        Path | None, typer.Option(help="Instead: folder of the better clips, and …")
    ] = None,
    lose: Annotated[
        Path | None, typer.Option(help="… folder of the worse ones, under the same names.")
    ] = None,
    output: Output = Path("runs/pairs"),
    model: ModelName = "tiny",
    captions: Annotated[
        Path | None,
        typer.Option(
            help="With --win: csv, jsonl or json; default: a .txt beside each of its clips."
        ),
    ] = None,
    trigger: Trigger = None,
    bucket: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FxHxW",
            help="As of prepare: both clips of a pair go into the one that fits the winner, of "
            "those that both fill.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Leave out pairs whose winner looks out of step.")
    ] = False,
    shard: Shard = "0/1",
    text_encoder_precision: TextPrecision = None,
    **options,
) -> None:
    """Encode pairs of a better and a worse clip for `train --method dpo`; resumed as prepare is.

    syncdpo prepare-pairs PAIRS.csv -o pairs

    syncdpo prepare-pairs --win good/ --lose bad/ -o pairs
    """
    from syncdpo.data.captions import read_captions
    from syncdpo.data.pairs import match_folders, read_pairs
    from syncdpo.data.pairs import prepare_pairs as prepare

    wanted = checked(bucket, trigger, shard, options)
    if (pairs is None) == (win is None or lose is None) or (pairs and (win or lose)):
        raise ValueError("pairs: expected a table, or both --win and --lose in its place")
    if pairs and captions:
        raise ValueError(f"captions: expected as a column of {pairs}, got {captions}")
    if pairs:
        listed = read_pairs(pairs)
    else:
        found = read_captions(win, captions)
        if found.sounds:
            raise ValueError(
                f"captions: expected no column audio for pairs, whose clips have their own sound, "
                f"got one in {captions}"
            )
        listed = match_folders(win, lose, found or None)
        listed.notes += found.notes
    if str(listed):
        say(str(listed))  # before hours of encoding
    loaded = load(model, **options, text_encoder_precision=text_encoder_precision)
    say(str(prepare(loaded, listed, output, strict=strict, **wanted(loaded))))


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
