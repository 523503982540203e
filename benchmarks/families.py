"""What the detectors find in real clips of each rendered family: the most that a model can reach.

    python benchmarks/families.py

Clips are written as mp4 and read back (raw), and go through the tiny model's codec (codec). The
detectors know nothing of families. `perfect` is what they would give if they found all that happens
and nothing else; it is below 1 where something is heard and never seen. `another's sound` is what
is left when each clip has the sound of the next one: so much comes from chance. Prints tables in
Markdown, as docs/families.md has them.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from syncdpo.data.clips import Clip, read_clip
from syncdpo.data.families import FAMILIES, OUT_OF_DISTRIBUTION
from syncdpo.data.synthetic import Rendered, render_folder
from syncdpo.evidence.tables import table
from syncdpo.metrics import ClipMetrics, clip_metrics, summarise
from syncdpo.models import codec, load_model

FIRST_SEED = 5_000_000  # shapes and sounds were tuned on others


@dataclass(frozen=True)
class Measured:
    """A family's clips: what happens in them, latents, and metrics by the way that they went."""

    happened: list[Rendered]
    latents: list[dict[str, torch.Tensor]]
    metrics: dict[str, list[ClipMetrics]]


def measure(name: str, count: int) -> Measured:
    family = (FAMILIES | OUT_OF_DISTRIBUTION)[name]
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    with tempfile.TemporaryDirectory() as folder:
        render_folder(Path(folder), seeds, family=family)
        raw = [read_clip(Path(folder) / f"{seed:06d}.mp4") for seed in seeds]
    model = load_model("tiny", weights=None)
    latents = [model.encode(clip, "") for clip in raw]
    decoded = [model.decode(of["video"][None], of["audio"][None])[0] for of in latents]
    happened = [family(seed) for seed in seeds]
    ways = {"raw": raw, "codec": decoded, "another's sound": with_the_next_ones_sound(decoded)}
    metrics = {way: [clip_metrics(clip) for clip in clips] for way, clips in ways.items()}
    return Measured(happened, latents, metrics | {"perfect": list(map(perfect, happened))})


def with_the_next_ones_sound(clips: list[Clip]) -> list[Clip]:
    return [
        replace(clip, audio=other.audio)
        for clip, other in zip(clips, clips[1:] + clips[:1], strict=True)
    ]


def perfect(happened: Rendered) -> ClipMetrics:
    """What detectors that miss nothing would say of a clip."""
    heard = torch.cat([happened.times, happened.unseen.to(happened.times)]).sort().values
    return ClipMetrics(happened.times.numpy(), heard.numpy(), happened.clip.seconds)


def row(name: str, measured: Measured) -> list[str]:
    """Of the first table: what happens, what is found, F1 and mean onset error."""
    happened, of = measured.happened, {k: summarise(v) for k, v in measured.metrics.items()}
    events = sum(len(one.times) for one in happened) / len(happened)
    unseen = sum(len(one.unseen) for one in happened) / len(happened)
    return [
        name,
        f"{events:.2f}" + (f" + {unseen:.2f}" if unseen else ""),
        f"{of['codec']['seen_per_clip']:.2f}",
        f"{of['codec']['events_per_clip']:.2f}",
        f"{of['perfect']['f1']:.2f}",
        *(
            f"{of[way]['f1']:.2f} · {of[way]['onset_error_ms']:.0f} ms"
            for way in ("raw", "codec", "another's sound")
        ),
    ]


def latents_row(name: str, measured: Measured) -> list[str]:
    """Of the second table: mean ± spread of each kind of channel."""
    video = torch.stack([of["video"] for of in measured.latents])
    audio = torch.stack([of["audio"] for of in measured.latents])
    luma = codec.PICTURES * codec.CELLS**2 // codec.VIDEO_TOKENS
    kinds = (video[..., :luma], video[..., luma:], audio)
    return [name, *(f"{kind.mean():.2f} ± {kind.std():.2f}" for kind in kinds)]


def report(names: list[str], count: int) -> str:
    measured = {name: measure(name, count) for name in names}
    found = table(
        ["family", "events per clip", "seen", "heard", "perfect F1", "raw", "codec",
         "another's sound"],
        [row(name, of) for name, of in measured.items()],
    )  # fmt: skip
    ranges = table(
        ["family", "luma", "chroma", "sound's level"],
        [latents_row(name, of) for name, of in measured.items()],
    )
    return f"{found}\n\n{ranges}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=32, help="clips of each family")
    options = parser.parse_args()
    print(report([*FAMILIES, *OUT_OF_DISTRIBUTION], options.count))


if __name__ == "__main__":
    main()
