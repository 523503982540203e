"""Measure what docs/rules.md says of the rules: python docs/rules/measure.py CACHE

CACHE holds rendered clips as `syncdpo prepare` makes it for the embedded model. Prints what the
probe hears, for the rules as they are and for their options, and how many pairs of Replace count.
"""

import sys
from pathlib import Path

import torch

from syncdpo.data.latents import LatentDataset
from syncdpo.data.synthetic import Ball, render_audio
from syncdpo.models import load_model
from syncdpo.models.codec import AUDIO_RATE, encode_audio
from syncdpo.negatives import Timeline, make_pairs, parse_rule
from syncdpo.negatives.distortion import RULES
from syncdpo.negatives.probe import probe_all, table

OPTIONS = ["replace(crossfade=0.04)", "replace(crossfade=0.08)", "replace(placement='sound')"]
BOUNDARIES = ["shift(boundary='edge')", "shift(boundary='reflect')", "shift(boundary='wrap')"]
PLACEMENTS = ["replace", "replace(placement='sound')"]
DRAWS = 16
LONG = 5.0  # s
HITS = 128


def one_hit() -> torch.Tensor:
    """Clips of five seconds in which one impact is heard, as latents."""
    times = torch.rand(HITS, generator=torch.Generator().manual_seed(0)) * (LONG - 0.5) + 0.1
    balls = [Ball(torch.tensor([-100.0, t, 100.0]), 32.0, 8.0, i % 8) for i, t in enumerate(times)]
    return torch.stack([encode_audio(render_audio(ball, LONG)) for ball in balls])


def shares_that_count(sound: torch.Tensor, timelines: dict) -> list[str]:
    """Rows of a table: per placement and kind of pair the share that is valid."""
    sound = sound.repeat_interleave(DRAWS, 0)
    picture = timelines["video_timeline"]
    blank = torch.zeros(len(sound), picture.frames * picture.tokens, 1)
    rows = []
    for name in PLACEMENTS:
        for matched in (0.0, 1.0):
            shares = [
                make_pairs(
                    blank, sound, parse_rule(name), difficulty, matched=matched,
                    generator=torch.Generator().manual_seed(0), **timelines,
                ).valid.float().mean().item()
                for difficulty in (0.0, 0.5, 1.0)
            ]  # fmt: skip
            cells = " | ".join(f"{share:.1%}" for share in shares)
            rows.append(f"| {name} | {matched:.0%} | {cells} |")
    return rows


def main(cache: Path) -> None:
    model = load_model("tiny")
    sound = torch.stack([clip["audio"] for clip in LatentDataset(cache, model.identity())])
    timelines = dict(zip(("video_timeline", "audio_timeline"), model.timelines, strict=True))
    print(f"{len(sound)} clips\n")
    print(table(probe_all(sound, rules=[*RULES, *OPTIONS], draws=DRAWS, **timelines)))
    print()
    print(table(probe_all(sound, rules=BOUNDARIES, shares=[0.0], draws=DRAWS, **timelines)))
    print("\nvalid pairs of these clips")
    print("\n".join(shares_that_count(sound, timelines)))
    long = {
        "video_timeline": Timeline(round(LONG * 12), 12.0),
        "audio_timeline": Timeline(round(LONG * AUDIO_RATE), float(AUDIO_RATE)),
    }
    hits = one_hit()
    print("\nvalid pairs of clips with one hit in 5 s")
    print("\n".join(shares_that_count(hits, long)))
    print()
    print(table(probe_all(hits, rules=PLACEMENTS, shares=[1.0], draws=DRAWS * 4, **long)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
