"""The command `rank`: preference pairs by sampling several clips and measuring them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from syncdpo.cli.clips import GUIDANCE, lines
from syncdpo.cli.options import (
    FORMAT,
    PARTS,
    AllowPartial,
    Caption,
    ModelName,
    NegativePrompt,
    Output,
    SamplingSteps,
    Seed,
    StgBlock,
    Weight,
    Weights,
    given,
    load,
    say,
    with_options,
)


@with_options(dict.fromkeys(GUIDANCE, Weight) | PARTS | FORMAT)
def rank(
    output: Output = Path("runs/rank"),
    model: ModelName = "tiny",
    weights: Weights = None,
    allow_partial: AllowPartial = False,
    caption: Caption = "",
    captions: Annotated[
        Path | None,
        typer.Option(help="Text file with a caption on each line, or csv, jsonl or json, instead."),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Cache or folder of clips whose pictures get a sound (tiny), instead."),
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Clips to sample and rank for each pair.")] = 4,
    pairs: Annotated[
        int, typer.Option(min=1, help="Pairs to make of each caption or picture.")
    ] = 1,
    metric: Annotated[
        str,
        typer.Option(
            help="A figure of evaluate (onset_error_ms, onset_error_median_ms, f1, "
            "f1_undetectable), or module:function, Clip → float."
        ),
    ] = "onset_error_ms",
    better: Annotated[
        str | None,
        typer.Option(
            help="Whether a lower or a higher score is better, of a module:function.",
            metavar="lower|higher",
        ),
    ] = None,
    prepare: Annotated[
        Path | None, typer.Option(help="Encode the pairs into this cache of pairs, too.")
    ] = None,
    steps: SamplingSteps = None,
    seed: Seed = 0,
    negative_prompt: NegativePrompt = None,
    stg_block: StgBlock = None,
    **options,
) -> None:
    """Sample several clips of each caption or picture; the best against the worst is a pair.

    Writes PAIRS.csv for prepare-pairs, and what it cost; resumed by the same command.

    syncdpo rank --pictures clips/ --count 8 --prepare pairs

    syncdpo rank --model Lightricks/LTX-2 --captions all.txt --metric mine:desync --better lower
    """
    from syncdpo.ranking import Measure, prepare_ranked
    from syncdpo.ranking import rank as rank_clips

    guidance = {name: options.pop(name) for name in GUIDANCE}
    guidance["negative_prompt"] = negative_prompt
    guidance["spatio_temporal_guidance_blocks"] = stg_block or None
    measure = Measure.of(metric, better)
    named = {"--caption": caption, "--captions": captions, "--pictures": pictures}
    if len(named := [name for name, value in named.items() if value]) > 1:
        raise ValueError(f"captions: expected one source of clips, got {' and '.join(named)}")
    texts = [caption] if not captions else listed(captions)
    loaded = load(model, **options)
    if weights and (note := loaded.load_weights(weights, allow_partial=allow_partial)):
        say(note, err=True)
    sources = sources_of(loaded, texts, pictures, pairs, output)
    summary = rank_clips(
        loaded, sources, output, measure, count=count, seed=seed, steps=steps, **given(guidance)
    )
    say(str(summary))
    say(f"see {output / 'PAIRS.csv'}")
    if prepare:
        say(prepare_ranked(loaded, output, prepare))


def listed(captions: Path) -> list[str]:
    """The different captions of a text file or a table."""
    from syncdpo.data.captions import TABLES, listed_captions

    if captions.suffix.lower() in TABLES:
        texts, guess = listed_captions(captions)
        if guess:
            say(f"captions: {captions}: {guess}", err=True)
    else:
        texts = lines(captions)
    if again := len(texts) - len(set(texts)):
        say(
            f"captions: {again} of {len(texts)} stand there again and are taken once; --pairs "
            "makes several pairs of each",
            err=True,
        )
    return texts


def sources_of(model, texts: list[str], pictures: Path | None, pairs: int, output: Path) -> list:
    """What to sample of: captions, or the pictures of a cache, or of a folder, which gets one."""
    from syncdpo.data.captions import read_captions
    from syncdpo.data.latents import INDEX, prepare
    from syncdpo.data.precomputed import is_precomputed, open_latents
    from syncdpo.ranking import check_pictures, of_captions, of_pictures

    if not pictures:
        return of_captions(texts, pairs)
    check_pictures(model)
    cache = pictures
    if not ((pictures / INDEX).is_file() or is_precomputed(pictures)):
        cache, found = output / "pictures", read_captions(pictures)
        if str(found):
            say(str(found))
        say(str(prepare(model, pictures, cache, captions=found or None)))
    return of_pictures(model, open_latents(cache, model), pairs)
