"""Rendered clips: balls strike a floor, and each impact is heard.

The picture shows a ball on parabolic arcs between impacts; at each impact the floor lights up. The
sound is one decaying tone per impact whose pitch goes with the ball's colour.
What is seen fixes *what* is heard (the pitch) and *when* (the impacts), so a generator can be good
at one and bad at the other, and both can be measured without a pretrained judge.
"""

import colorsys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from syncdpo.data.clips import Clip, write_clip
from syncdpo.data.overlap import overlapped

SECONDS, FPS, SIZE, SAMPLE_RATE = 2.0, 24, 64, 16_000
PITCHES = tuple(200.0 * 30.0 ** (k / 15) for k in range(3, 11))  # Hz; on the tiny codec's bands
FLOOR = 54.0  # px from the top
GRAVITY = 430.0  # px/s²: a gap of 0.8 s rises 34 px
GAP = (0.35, 0.80)  # s between impacts of one ball
OFFSET_SEED = 2**40  # so that a clip's offset shares no draw with its ball
MARGIN = 1.0  # s of scene rendered on either side, so that a shifted window is never empty


@dataclass(frozen=True)
class Ball:
    """One source: impact times in seconds (ascending), place in pixels, index of its pitch."""

    impacts: Tensor
    x: float
    radius: float
    pitch: int

    @property
    def colour(self) -> Tensor:
        return torch.tensor(colorsys.hsv_to_rgb(self.pitch / len(PITCHES), 0.5, 1.0))


@dataclass(frozen=True)
class Rendered:
    """A clip, the `times` of all its impacts in seconds, and a stem [N] per source.

    unseen: times of what is heard and never seen; balls have none.
    """

    clip: Clip
    times: Tensor
    stems: list[Tensor]
    unseen: Tensor = field(default_factory=lambda: torch.empty(0))


class Family(Protocol):
    """A clip as a function of a seed; `offset` seconds delays its sound against its picture."""

    def __call__(self, seed: int, *, offset: float = 0.0) -> Rendered: ...


def draw_balls(seed: int, count: int = 1, seconds: float = SECONDS) -> list[Ball]:
    """Random balls, a pure function of the seed; impacts reach `MARGIN` beyond the clip."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    pitches = torch.randperm(len(PITCHES), generator=generator)[:count].tolist()
    lane = SIZE / count
    balls = []
    for i, pitch in enumerate(pitches):
        time, impacts = -MARGIN - uniform(0, GAP[1]), []
        while time < seconds + MARGIN + GAP[1]:
            impacts.append(time)
            time += uniform(*GAP)
        x = lane * i + uniform(12, lane - 12)
        balls.append(Ball(torch.tensor(impacts), x, uniform(7, 9), pitch))
    return balls


def render_video(balls: list[Ball], seconds: float = SECONDS) -> Tensor:
    """Pictures uint8 [T,64,64,3] at 24 fps; each shows the instant at the centre of its frame."""
    t = (torch.arange(round(seconds * FPS)) + 0.5) / FPS
    grid = torch.arange(SIZE) + 0.5
    y, x = grid[:, None], grid[None, :]
    floor = torch.sigmoid((y - FLOOR) * 4).expand(SIZE, SIZE)[..., None]
    picture = (1 - floor) * torch.tensor([0.06, 0.07, 0.12]) + floor * torch.tensor([0.22] * 3)
    picture = picture.repeat(len(t), 1, 1, 1)
    for ball in balls:
        since, until = around(ball.impacts, t)
        height = 0.5 * GRAVITY * since * until  # the arc that leaves and lands at the floor
        centre_y = FLOOR - ball.radius - height
        distance = ((x - ball.x) ** 2 + (y - centre_y[:, None, None]) ** 2).sqrt()
        disc = torch.sigmoid((ball.radius - distance) * 2)[..., None]
        lit = torch.exp(-since / 0.07)[:, None, None, None] * floor
        picture = picture + 0.7 * lit * (0.5 + 0.5 * ball.colour)
        picture = picture * (1 - disc) + disc * ball.colour
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def render_audio(ball: Ball, seconds: float = SECONDS, offset: float = 0.0) -> Tensor:
    """One stem, float32 [N] at 16 kHz. `offset` seconds delays the sound against the picture."""
    t = torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE - offset
    since, _ = around(ball.impacts, t)
    envelope = torch.exp(-since / 0.09) * (since / 0.002).clamp(max=1)  # 2 ms attack
    phase = 2 * torch.pi * PITCHES[ball.pitch] * since
    return 0.5 * envelope * torch.sin(phase)


def render(seed: int, *, balls: int = 1, seconds: float = SECONDS, offset: float = 0.0) -> Rendered:
    """Render the clip of a seed: 24 fps, 64×64, 16 kHz mono. |offset| ≤ 1 s mistimes the sound.

    Raises:
        ValueError: `balls` outside 1–2, or `offset` beyond the rendered margin.
    """
    if balls not in (1, 2):
        raise ValueError(f"balls: expected 1 or 2, got {balls}")
    check_offset(offset)
    sources = draw_balls(seed, balls, seconds)
    stems = [render_audio(ball, seconds, offset) for ball in sources]
    times = torch.cat([ball.impacts for ball in sources]).sort().values
    clip = Clip(
        render_video(sources, seconds), float(FPS), torch.stack(stems).sum(0)[None], SAMPLE_RATE
    )
    return Rendered(clip, times[(times >= 0) & (times < seconds)], stems)


def check_offset(offset: float) -> None:
    """Raises ValueError for one beyond the rendered margin."""
    if not abs(offset) <= MARGIN:
        raise ValueError(f"offset: expected at most {MARGIN} s either way, got {offset}")


def render_clip(seed: int) -> Clip:
    """The synchronised one-ball clip of a seed."""
    return render(seed).clip


def draw_offset(seed: int, spread: float) -> float:
    """Seconds by which a clip's sound is late: spread · N(0, 1), a function of the seed."""
    generator = torch.Generator().manual_seed(seed + OFFSET_SEED)
    return spread * torch.randn((), generator=generator).item()


def render_folder(
    folder: Path, seeds: Iterable[int], *, offset_spread: float = 0.0, family: Family = render
) -> int:
    """Write one mp4 per seed, named by it; what is already there is kept. → how many were written.

    offset_spread: standard deviation, in seconds, of the sound's offset against the picture, which
    is the same for all of a clip, as it is in recordings. family: what is rendered.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def write(seed: int) -> bool:
        path = folder / f"{seed:06d}.mp4"
        if path.exists():
            return False
        write_clip(path, family(seed, offset=draw_offset(seed, offset_spread)).clip)
        return True

    return sum(overlapped(write, seeds))


def around(times: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Seconds since the last event and until the next one, at each time; `times` reach beyond."""
    following = torch.searchsorted(times, t, right=True)
    return t - times[following - 1], times[following] - t
