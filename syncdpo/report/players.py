"""Clips to play in a page, with what is seen and what is heard in each as marks below it."""

from __future__ import annotations

import html
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image
from torch import Tensor

from syncdpo.data.clips import read_clip
from syncdpo.metrics import ClipMetrics, clip_metrics, match_events
from syncdpo.metrics.onsets import picture_cells
from syncdpo.report.page import embedded

SMALL = 128  # pixels across, up to which a picture is enlarged and its pixels are left sharp
ENLARGED = 3
DARK = 0.25  # mean luma below which a picture is shown brighter than it is
WIDTH = {True: f"{64 * ENLARGED}px", False: "17rem"}  # of a clip that is small or is not
HOW_TO = (
    "A click plays a clip with its sound, another stops it; the button plays a row silently, side "
    "by side. Marks below a clip: above the line what is seen to happen, below it what begins to "
    "sound, green where both are one within ITU-R BT.1359's acceptable window (sound at most 90 ms "
    "early or 185 ms late), red where the sound is alone."
)
LIFTED = " Pictures this dark are shown brighter than they are, by a gamma; the files are not."


@dataclass(frozen=True)
class Shown:
    """A clip's file, and what stands below it."""

    path: Path
    caption: str = ""

    @cached_property
    def clip(self):
        return read_clip(self.path, require_sound=False)

    @cached_property
    def metrics(self) -> ClipMetrics:
        return clip_metrics(self.clip)

    @cached_property
    def luma(self) -> float:
        return float(picture_cells(self.clip.video).mean())


def gallery(rows: Sequence[tuple[str, Sequence[Shown]]]) -> tuple[str, str]:
    """(html, width of a clip) of rows, each (heading, clips); one look for all of them."""
    clips = [shown for _, row in rows for shown in row]
    dark = statistics.median(shown.luma for shown in clips) < DARK
    small = max(shown.clip.video.shape[2] for shown in clips) <= SMALL
    style = " ".join(["small"] * small + ["dark"] * dark)
    lines = [f'<p class="note">{HOW_TO}{LIFTED if dark else ""}</p>']
    for heading, row in rows:
        lines.append(
            f'<h3>{html.escape(heading)}<button class="all">▶ all, silently</button></h3>'
            f'<div class="row">{"".join(player(shown, style) for shown in row)}</div>'
        )
    return "".join(lines), WIDTH[small]


def player(shown: Shown, style: str = "") -> str:
    """One clip: the film, a poster of its first impact, its events, and a line of text."""
    source = embedded("video/mp4", shown.path.read_bytes())
    below = f"<figcaption>{html.escape(shown.caption)}</figcaption>" if shown.caption else ""
    return (
        f'<figure data-seconds="{shown.metrics.seconds:.4f}"><video class="{style}" loop '
        f'playsinline preload="metadata" tabindex="0" poster="{poster(shown)}" src="{source}">'
        f"</video>{events(shown.metrics)}{below}</figure>"
    )


def events(metrics: ClipMetrics) -> str:
    """Marks over the clip's length, seen above heard, and a cursor that the page's script moves."""
    met = {j for _, j in match_events(metrics.seen, metrics.heard)}
    marks = [_mark(time / metrics.seconds, 2, 16, "seen") for time in metrics.seen]
    marks += [
        _mark(time / metrics.seconds, 18, 32, "met" if j in met else "alone")
        for j, time in enumerate(metrics.heard)
    ]
    about = f"{len(metrics.seen)} seen, {len(metrics.heard)} heard, {len(met)} of them one"
    return (
        f'<svg class="events" viewBox="0 0 1000 34" preserveAspectRatio="none" role="img">'
        f'<title>{about}</title><line class="middle" x1="0" x2="1000" y1="17" y2="17"/>'
        f"{''.join(marks)}{_mark(0, 0, 34, 'cursor')}</svg>"
    )


def _mark(place: float, top: int, bottom: int, kind: str) -> str:
    x = f"{1000 * place:.1f}"
    return f'<line class="{kind}" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>'


def poster(shown: Shown) -> str:
    """The picture in which something first happens, or the middle one."""
    video, seen = shown.clip.video, shown.metrics.seen
    number = round(seen[0] * shown.clip.fps) if len(seen) else len(video) // 2
    return _picture(video[min(number, len(video) - 1)])


def _picture(picture: Tensor) -> str:
    image, buffer = Image.fromarray(picture.numpy()), io.BytesIO()
    if image.width > SMALL:
        image.save(buffer, format="JPEG", quality=85)
        return embedded("image/jpeg", buffer.getvalue())
    size = (image.width * ENLARGED, image.height * ENLARGED)
    image.resize(size, Image.Resampling.NEAREST).save(buffer, format="PNG")
    return embedded("image/png", buffer.getvalue())
