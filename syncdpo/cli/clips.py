"""The commands `sample` and `evaluate`: clips made, and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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

# What LTX-2's pipeline calls the weights of its guidance, by kind and stream.
GUIDANCE = (
    "guidance_scale", "audio_guidance_scale", "guidance_rescale", "audio_guidance_rescale",
    "modality_scale", "audio_modality_scale", "stg_scale", "audio_stg_scale",
)  # fmt: skip


@with_options(dict.fromkeys(GUIDANCE, Weight) | PARTS | FORMAT)
def sample(
    output: Output = Path("runs/samples"),
    model: ModelName = "tiny",
    weights: Weights = None,
    allow_partial: AllowPartial = False,
    caption: Caption = "",
    captions: Annotated[
        Path | None, typer.Option(help="Text file with a caption on each line, instead.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Clips to generate of each caption.")] = 4,
    steps: SamplingSteps = None,
    seed: Seed = 0,
    negative_prompt: NegativePrompt = None,
    stg_block: StgBlock = None,
    **options,
) -> None:
    """Generate clips as mp4, guided as the model's own pipeline guides by default.

    Of the weights of guidance Kandinsky 6 has --guidance-scale alone; all are LTX-2's.
    """
    from syncdpo.sampling import generate, noise_seeds

    guidance = {name: options.pop(name) for name in GUIDANCE}
    guidance["negative_prompt"] = negative_prompt
    guidance["spatio_temporal_guidance_blocks"] = stg_block or None
    if captions and caption:
        raise ValueError(f"caption: expected none beside --captions, got {caption!r}")
    texts = lines(captions) if captions else [caption]
    loaded = load(model, **options)
    if weights and (note := loaded.load_weights(weights, allow_partial=allow_partial)):
        say(note, err=True)
    seeds = noise_seeds(count, seed, "sample")
    for path in generate(loaded, output, seeds, captions=texts, steps=steps, **given(guidance)):
        say(str(path))


def lines(captions: Path) -> list[str]:
    """A caption from each line that has one; lines end at line feeds only."""
    from syncdpo.data.captions import caption_lines

    texts, guess = caption_lines(captions)
    if guess:
        say(f"captions: {captions}: {guess}", err=True)
    return texts


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
    say(evaluate_folder(clips, output, with_av_align=av_align, extra=extra))
