"""What rendered families share: time, chance, colours that have a pitch, sounds, shapes.

Everything is a function of the scene's own time, which reaches `MARGIN` beyond either end of the
clip: so pictures can show it at their instants and samples at theirs, these moved by any offset.
"""

import colorsys
from collections.abc import Callable

import torch
from torch import Tensor

from syncdpo.data import chance
from syncdpo.data.clips import Clip
from syncdpo.data.synthetic import (
    FPS,
    MARGIN,
    SAMPLE_RATE,
    SECONDS,
    SIZE,
    Rendered,
    check_offset,
)

Uniform = Callable[[float, float], float]
BANDS = tuple(200.0 * 30.0 ** (k / 15) for k in range(16))  # Hz; the tiny codec's
HISS_LINES = 48  # sines that a hiss is the sum of: enough to have no pitch


def uniform_of(family: str, seed: int) -> Uniform:
    """Draws between two bounds, a pure function of the family and the seed."""
    source = chance.generator("family", family, seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=source).item()

    return uniform


def choice(uniform: Uniform, count: int) -> int:
    """One of 0 … count − 1."""
    return min(int(uniform(0, count)), count - 1)


def draw_times(
    uniform: Uniform, least: float, most: float, *, taken: Tensor | None = None, apart: float = 0.12
) -> Tensor:
    """Events so many seconds apart, from before the scene's beginning to after its end.

    taken: other sources' events; one that came within `apart` of them waits until it stands free.
    """
    others = [] if taken is None else taken.tolist()
    time = -MARGIN - uniform(0, most)
    times = [time - most]  # so that every instant has an event behind it
    while times[-1] < SECONDS + MARGIN + most:
        while any(abs(time - other) < apart for other in others):
            time += apart / 8
        times.append(time)
        time += uniform(least, most)
    return torch.tensor(times, dtype=torch.float64)


def picture_times() -> Tensor:
    """Instants that pictures show, the centres of their frames: float64 [T]."""
    return (torch.arange(round(SECONDS * FPS), dtype=torch.float64) + 0.5) / FPS


def sound_times(offset: float) -> Tensor:
    """Instants that samples sound, `offset` seconds late: float64 [N].

    Raises ValueError for an offset beyond the rendered margin.
    """
    check_offset(offset)
    return torch.arange(round(SECONDS * SAMPLE_RATE), dtype=torch.float64) / SAMPLE_RATE - offset


def rendered(pictures: Tensor, times: Tensor, stems: list[Tensor], unseen: Tensor | None = None):
    """A `Rendered` of pictures [T,64,64,3] in [0, 1], events of the whole scene, and stems [N]."""
    stems = [stem.float() for stem in stems]
    video = (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
    clip = Clip(video, float(FPS), torch.stack(stems).sum(0)[None], SAMPLE_RATE)
    none = torch.empty(0, dtype=torch.float64)
    return Rendered(clip, within(times), stems, none if unseen is None else within(unseen))


def within(times: Tensor) -> Tensor:
    """Those within the clip, ascending."""
    return times[(times >= 0) & (times < SECONDS)].sort().values


# --- sounds ---------------------------------------------------------------------------------------


def struck(since: Tensor, *, attack: float, decay: float) -> Tensor:
    """Level in [0, 1] that rises within `attack` seconds and dies away with time constant `decay`.

    since: seconds since the event.
    """
    return (since / attack).clamp(max=1) * torch.exp(-since / decay)


def partials(since: Tensor, pitch: float, amplitudes: dict[float, float]) -> Tensor:
    """Sines that begin at the event, amplitudes by multiple of `pitch` in Hz."""
    return sum(
        amplitude * torch.sin(2 * torch.pi * pitch * multiple * since)
        for multiple, amplitude in amplitudes.items()
    )


def hiss(t: Tensor, uniform: Uniform, low: float, high: float) -> Tensor:
    """Noise between two frequencies in Hz, of unit power: sines of any frequency and phase.

    So it is a function of the scene's time, and can be moved by less than a sample.
    """
    sound = torch.zeros_like(t)
    for _ in range(HISS_LINES):
        frequency, phase = uniform(low, high), uniform(0, 2 * torch.pi)
        sound += torch.sin(2 * torch.pi * frequency * t + phase)
    return sound * (2 / HISS_LINES) ** 0.5


# --- pictures -------------------------------------------------------------------------------------


def grid() -> tuple[Tensor, Tensor]:
    """Centres of pixels, down [64,1] and across [1,64]."""
    centres = torch.arange(SIZE, dtype=torch.float64) + 0.5
    return centres[:, None], centres[None, :]


def colour_of(look: int, looks: int, saturation: float = 0.5) -> Tensor:
    """The colour of one of so many looks, full value: [3]."""
    rgb = colorsys.hsv_to_rgb(look / looks, saturation, 1.0)
    return torch.tensor(rgb, dtype=torch.float64)


def frames(*colour: float) -> Tensor:
    """Pictures of one colour: [T,64,64,3]."""
    count = round(SECONDS * FPS)
    return torch.tensor(colour, dtype=torch.float64).expand(count, SIZE, SIZE, 3)


def per_picture(values: Tensor) -> Tensor:
    """[T] → [T,1,1], to stand beside a grid."""
    return values[:, None, None]


def inside(distance: Tensor) -> Tensor:
    """1 within a shape, 0 outside, soft over a pixel. distance: px to its edge, positive inside."""
    return torch.sigmoid(4 * distance)


def ellipse(y: Tensor, x: Tensor, centre: tuple, radii: tuple) -> Tensor:
    """An ellipse's inside; centre and radii are (down, across) in px."""
    radius = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2
    smallest = torch.minimum(torch.as_tensor(radii[0]), torch.as_tensor(radii[1]))
    return inside((1 - radius.sqrt()) * smallest)


def box(y: Tensor, x: Tensor, centre: tuple, halves: tuple) -> Tensor:
    """A rectangle's inside; centre and half sides are (down, across) in px."""
    return inside(halves[0] - (y - centre[0]).abs()) * inside(halves[1] - (x - centre[1]).abs())


def painted(picture: Tensor, shape: Tensor, colour: Tensor) -> Tensor:
    """The picture [T,64,64,3] with a shape [64,64] or [T,64,64] of that colour over it."""
    shape = shape[..., None]
    return picture * (1 - shape) + shape * colour
