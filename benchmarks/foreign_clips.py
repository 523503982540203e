"""Folders of clips that the embedded model has never seen the like of, for `make demo CLIPS=…`.

    python benchmarks/foreign_clips.py drops clips/drops --count 120
    make demo CLIPS=clips/drops

Nothing here is shared with the rendered balls: other pictures (bright ones, too), other sounds,
rates, sizes and rhythms. What happens in a clip is a function of its kind and seed. Sound and
picture are exactly in step, or, with `--offset-spread 0.06`, as recordings are: a clip's sound is
late by so many seconds times N(0, 1), the same for all of it.

squares  a square lights up; a decaying tone under hiss. 25 fps, 44.1 kHz. Irregular.
mouths   a mouth opens with each syllable; voiced and unvoiced sound. 25 fps, 16 kHz. Four a second.
drops    a drop falls into water, a ring spreads; a rising chirp. 30 fps, 44.1 kHz, stereo.
sticks   two sticks strike two drums in turn, in time; a thud and a rattle. 50 fps, 48 kHz.
keys     keys of a keyboard go down, each in its place; short clicks. 24 fps, 22.05 kHz, 160×90.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from syncdpo.data.clips import Clip, write_clip
from syncdpo.data.overlap import overlapped


@dataclass(frozen=True)
class Scene:
    """What a kind draws: event times in seconds, pictures [T,H,W,3] in [0,1], sound [C,N]."""

    times: np.ndarray
    pictures: np.ndarray
    sound: np.ndarray


@dataclass(frozen=True)
class Kind:
    fps: float
    sample_rate: int
    seconds: float
    make: Callable[[np.random.Generator, np.ndarray, np.ndarray], Scene]


def make_clip(kind: str, seed: int, offset_spread: float = 0.0) -> tuple[Clip, np.ndarray]:
    """The clip and the times at which its events are seen, in seconds."""
    of, key = KINDS[kind], [list(KINDS).index(kind), seed]
    chance = np.random.default_rng(key)
    offset = offset_spread * np.random.default_rng([*key, 1]).standard_normal()
    pictures = (np.arange(round(of.seconds * of.fps)) + 0.5) / of.fps  # a frame shows its middle
    sound = np.arange(round(of.seconds * of.sample_rate)) / of.sample_rate - offset
    scene = of.make(chance, pictures, sound)
    video = torch.from_numpy((scene.pictures.clip(0, 1) * 255).round().astype(np.uint8))
    audio = torch.from_numpy(scene.sound.clip(-1, 1).astype(np.float32))
    return Clip(video, of.fps, audio, of.sample_rate), scene.times


def make_folder(
    kind: str, folder: Path, count: int, first: int = 0, offset_spread: float = 0.0
) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def write(seed: int) -> None:
        clip, _ = make_clip(kind, seed, offset_spread)
        write_clip(folder / f"{kind}-{seed:04d}.mp4", clip)

    for _ in overlapped(write, range(first, first + count)):
        pass


# --- kinds ----------------------------------------------------------------------------------------


def squares(chance: np.random.Generator, pictures: np.ndarray, sound: np.ndarray) -> Scene:
    times = _gaps(chance, 2.0, 0.3, 0.9)
    colour, x, y = chance.uniform(0.5, 1, 3), chance.integers(8, 40), chance.integers(8, 28)
    video = np.tile(chance.uniform(0.05, 0.15, (1, 64, 80, 1)), (len(pictures), 1, 1, 3))
    lit = np.exp(-_since(times, pictures) / 0.12)
    video[:, y : y + 24, x : x + 24] += 0.8 * lit[:, None, None, None] * colour
    pitch = chance.uniform(300, 1500)
    since = _since(times, sound)
    tone = 0.5 * np.exp(-since / 0.1) * np.sin(2 * np.pi * pitch * since)
    return Scene(times, video, (tone + 0.01 * chance.standard_normal(len(sound)))[None])


def mouths(chance: np.random.Generator, pictures: np.ndarray, sound: np.ndarray) -> Scene:
    times = _gaps(chance, 2.4, 0.2, 0.38)
    times = times[chance.uniform(size=len(times)) < 0.8]  # pauses between words
    size = chance.uniform(0.6, 1.0, len(times))
    lengths = chance.uniform(0.06, 0.12, len(times))

    def opening(t: np.ndarray) -> np.ndarray:
        rise = (t[:, None] - times) / 0.03
        fall = (times + lengths - t[:, None]) / 0.12
        return (size * np.clip(np.minimum(rise, fall + 1), 0, 1)).max(1, initial=0)

    skin, lips = chance.uniform(0.5, 0.8, 3), np.array([0.55, 0.15, 0.15])
    y, x = np.mgrid[0:96, 0:96] / 96 - 0.5
    gape = opening(pictures)[:, None, None]
    mouth = (x / 0.25) ** 2 + ((y - 0.1) / (0.04 + 0.22 * gape)) ** 2
    inside, rim = (mouth < 0.7)[..., None], (mouth < 1)[..., None]
    video = np.where(inside, 0.03, np.where(rim, lips, skin * np.ones((96, 96, 1))))
    level = opening(sound)
    base = chance.uniform(110, 220)
    glottis = ((sound * base) % 1 - 0.5) * level
    voice = sum(_resonate(glottis, f, 16_000) for f in chance.uniform((350, 1000), (800, 2400)))
    hiss = np.diff(chance.standard_normal(len(sound)), prepend=0)
    starts = np.exp(-_since(times, sound) / 0.02) * (_since(times, sound) < 0.06)
    return Scene(times, video, (0.3 * voice + 0.08 * hiss * starts * level)[None])


def drops(chance: np.random.Generator, pictures: np.ndarray, sound: np.ndarray) -> Scene:
    times = _gaps(chance, 3.0, 0.28, 1.1)
    sky, water = np.array([0.75, 0.85, 0.95]), np.array([0.30, 0.50, 0.62])
    place, speed = chance.uniform(0.3, 0.7), chance.uniform(0.5, 0.8)
    y, x = np.mgrid[0:120, 0:160] / 120.0
    surface, x = 0.62, x - place * 160 / 120
    still = np.where((y < surface)[..., None], sky, water)
    video = np.tile(still, (len(pictures), 1, 1, 1))
    since, until = _since(times, pictures), _until(times, pictures)
    height = (surface - speed * until * (1 + 2 * until))[:, None, None]
    drop = np.exp(-(((x**2 + (y - height) ** 2) / 0.045**2) ** 2)) * (y < surface)
    drop = (drop * np.clip(1.4 - 3 * until, 0, 1)[:, None, None])[..., None]  # out of the mist
    video = video * (1 - drop) + drop * np.array([0.1, 0.2, 0.3])
    far = np.sqrt(x**2 + ((y - surface - 0.12) * 3) ** 2)
    ring = np.exp(-(((far - 0.5 * since[:, None, None]) / 0.09) ** 2))
    ring = ring * np.exp(-since / 0.15)[:, None, None] * (y > surface)
    video = video + 0.6 * ring[..., None]
    after, low = _since(times, sound), chance.uniform(400, 900)
    phase = 2 * np.pi * low * (after + 4 * after**2)
    plip = 0.6 * np.exp(-after / 0.06) * np.clip(after / 0.004, 0, 1) * np.sin(phase)
    murmur = np.convolve(chance.standard_normal(len(sound)), np.ones(40) / 40, "same") * 0.02
    left = chance.uniform(0.4, 1.0)
    return Scene(times, video, np.stack([left * plip + murmur, plip + murmur]))


def sticks(chance: np.random.Generator, pictures: np.ndarray, sound: np.ndarray) -> Scene:
    beat = 60 / chance.uniform(95, 170)
    times = np.arange(chance.uniform(0, beat), 3.0, beat)
    times = times[chance.uniform(size=len(times)) < 0.85]  # rests
    drum = np.arange(len(times)) % 2
    wall, shade = np.array([0.62, 0.52, 0.40]), chance.uniform(0.8, 1.1)
    y, x = np.mgrid[0:96, 0:128] / 96.0
    video = np.tile(wall * shade * np.ones((96, 128, 1)), (len(pictures), 1, 1, 1))
    noise = chance.standard_normal(len(sound))
    pitches = chance.uniform((220, 330), (300, 480))
    audio = np.zeros(len(sound))
    for side, centre in enumerate((0.36, 0.97)):
        own = times[drum == side]
        since, until = _since(own, pictures), _until(own, pictures)
        head = (((x - centre) / 0.24) ** 2 + ((y - 0.78) / 0.10) ** 2 < 1)[..., None]
        skin = 0.55 + 0.4 * np.exp(-since / 0.08)[:, None, None, None]
        video = np.where(head, skin * np.array([1.0, 0.97, 0.9]), video)
        lift = np.minimum(np.clip(since / 0.25, 0, 1), np.clip(until / 0.12, 0, 1))[:, None, None]
        tip_y = 0.76 - 0.45 * lift
        along = (x - centre) * 0.5 * (1 if side else -1)
        stick = (np.abs(y - tip_y + along) < 0.025) & ((x - centre) * (1 if side else -1) > -0.05)
        video = np.where(stick[..., None], np.array([0.25, 0.14, 0.08]), video)
        after = _since(own, sound)
        thud = np.exp(-after / 0.07) * np.sin(2 * np.pi * pitches[side] * after)
        rattle = np.exp(-after / 0.035) * noise
        audio = audio + (0.5 * thud + 0.15 * rattle) * np.clip(after / 0.002, 0, 1)
    return Scene(times, video, audio[None])


def keys(chance: np.random.Generator, pictures: np.ndarray, sound: np.ndarray) -> Scene:
    times = _gaps(chance, 2.5, 0.18, 0.75)
    rows, columns = chance.integers(3, size=len(times)), chance.integers(8, size=len(times))
    y, x = np.mgrid[0:90, 0:160]
    desk = np.array([0.40, 0.33, 0.28]) * chance.uniform(0.8, 1.2)
    board = desk * np.ones((90, 160, 1))
    inside = (
        ((x - 8) % 18 < 15) & (x >= 8) & (x < 152) & ((y - 18) % 20 < 17) & (y >= 18) & (y < 78)
    )
    board = np.where(inside[..., None], chance.uniform(0.7, 0.9), board)
    video = np.tile(board, (len(pictures), 1, 1, 1))
    clicks = np.zeros(len(sound))
    colour = chance.uniform(1500, 4000)
    for time, row, column in zip(times, rows, columns, strict=True):
        top, left = 18 + 20 * row, 8 + 18 * column
        down = np.clip((pictures - time) / 0.02, 0, 1) * np.clip(
            (time + 0.3 - pictures) / 0.2, 0, 1
        )
        video[:, top : top + 17, left : left + 15] -= 0.65 * down[:, None, None, None]
        after = np.clip(sound - time, 0, None)
        ring = np.sin(2 * np.pi * colour * after) + 0.8 * chance.standard_normal(len(sound))
        clicks += (sound >= time) * np.exp(-after / 0.018) * ring
    hum = 0.01 * np.sin(2 * np.pi * 100 * sound)
    return Scene(times, video, (chance.uniform(0.2, 0.45) * clicks + hum)[None])


# --- small parts ----------------------------------------------------------------------------------


def _gaps(chance: np.random.Generator, seconds: float, least: float, most: float) -> np.ndarray:
    """Times from before the beginning to after the end, so many seconds apart."""
    gaps = chance.uniform(least, most, int(seconds / least) + 4)
    times = np.cumsum(gaps) - most
    return times[(times >= 0.02) & (times < seconds)]


def _since(times: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Seconds since the last event; very many before the first."""
    before = np.concatenate([[-1e3], times])
    return t - before[np.searchsorted(times, t, side="right")]


def _until(times: np.ndarray, t: np.ndarray) -> np.ndarray:
    after = np.concatenate([times, [1e3]])
    return after[np.searchsorted(times, t, side="right")] - t


def _resonate(x: np.ndarray, frequency: float, sample_rate: int) -> np.ndarray:
    """x through a damped resonance at that frequency."""
    t = np.arange(int(0.03 * sample_rate)) / sample_rate
    response = np.exp(-t / 0.006) * np.sin(2 * np.pi * frequency * t)
    return np.convolve(x, response)[: len(x)] / 8


KINDS = {
    "squares": Kind(25, 44_100, 2.0, squares),
    "mouths": Kind(25, 16_000, 2.4, mouths),
    "drops": Kind(30, 44_100, 3.0, drops),
    "sticks": Kind(50, 48_000, 3.0, sticks),
    "keys": Kind(24, 22_050, 2.5, keys),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--first", type=int, default=0, help="seed of the first clip")
    parser.add_argument(
        "--offset-spread", type=float, default=0.0, help="spread (σ) of the sound's offset, seconds"
    )
    options = parser.parse_args()
    make_folder(options.kind, options.folder, options.count, options.first, options.offset_spread)


if __name__ == "__main__":
    main()
