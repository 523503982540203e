"""When something happens in pictures, and when something begins to sound.

Two detectors that know nothing of each other, of rules or of models, and need no pretrained
weights. Times are in seconds from the clip's beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Callable[..., np.ndarray]
Around = Callable[[Reduction, float], np.ndarray]

GAP = 0.08  # s; two events of one stream are at least this far apart
SPAN = 1.0  # s to either side that an event must stand out in

# Pictures
BLIND = 1.5  # pictures at the beginning in which no event can be seen: it has nothing to rise from
GRID = 16  # cells per side; smaller detail is texture and noise
RISE = 0.25  # weight of motion that quickens, against light that changes
PICTURE_FLOOR, PICTURE_RATIO, PICTURE_CONTRAST = 5e-4, 0.33, 2.5
LUMA = (0.299, 0.587, 0.114)

# Sound
WINDOW, HOP, REACH = 0.032, 0.005, 2  # s, s, hops
FRAMES = 1024  # windows whose spectra are held at once; 5 s
BANDS, LOWEST, HIGHEST = 32, 80.0, 8000.0  # mel bands, Hz, Hz
LATENCY = 0.005  # s by which the flux of a decaying sound peaks before its attack; measured
SOUND_FLOOR, SOUND_RATIO, SOUND_CONTRAST = 2e-3, 0.3, 4.0


def picture_events(video: Tensor, fps: float) -> np.ndarray:
    """Times at which something happens in the pictures: float64 [events], ascending, in seconds.

    Strength of the step from picture k − 1 to k, on the luma of 16×16 cells, d its change:

        s[k] = |mean d| + ¼ · max(0, m[k] − max(m[k−1], m[k−2]))
        m[k] = max(mean of d⁺, mean of d⁻)

    Light that comes or goes is in the first term, where what merely moves cancels; motion that
    starts or quickens is in the second. An event is a peak of s that stands out of what is around
    it, refined by a parabola through the changes of its own sign. A step between two pictures is
    timed at their boundary, k/fps (a picture stands for its centre): a sudden event is known to
    within half a picture, and no better.

    video: uint8 [T,H,W,3]. fps: Hz.
    """
    return cell_events(picture_cells(video), np.arange(len(video)) / fps)


def picture_cells(video: Tensor) -> np.ndarray:
    """All that `picture_events` looks at, 16×16 cells of luma in [0, 1]: float64 [T,256].

    Cells as of `torch.nn.functional.adaptive_avg_pool2d`, each from ⌊i·n/16⌋ to ⌈(i+1)·n/16⌉; sums
    of integers, so exact, and without a copy of big pictures as floats. video: uint8 [T,H,W,3].
    """
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"video: expected [T,H,W,3], got {list(video.shape)}")
    means = []
    for top, bottom in _edges(video.shape[1]):
        row = video[:, top:bottom].sum(1, dtype=torch.int32)
        for left, right in _edges(video.shape[2]):
            means.append(
                row[:, left:right].sum(1).double() / (255.0 * (bottom - top) * (right - left))
            )
    cells = torch.stack(means, 1).cpu()
    return (cells @ torch.tensor(LUMA, dtype=torch.float64)).numpy()


def _edges(length: int) -> list[tuple[int, int]]:
    """Where each of `GRID` cells begins and ends."""
    return [(i * length // GRID, -(-(i + 1) * length // GRID)) for i in range(GRID)]


def cell_events(cells: np.ndarray, times: np.ndarray) -> np.ndarray:
    """`picture_events` of pictures that come on at times of their own: float64 [events].

    cells: [T,256] (`picture_cells`). times: [T] in seconds, ascending, from the clip's beginning. A
    step into picture k is timed at times[k], whatever the rate before and after.
    """
    if len(cells) < 3:
        return np.empty(0)
    change = np.diff(cells, axis=0)
    light = change.mean(1)
    motion = np.maximum(np.clip(change, 0, None).mean(1), np.clip(-change, 0, None).mean(1))
    before = np.maximum(_later(motion, 1), _later(motion, 2))
    rise = RISE * np.clip(motion - before, 0, None)
    strength = np.abs(light) + rise
    around = partial(_around, strength, times[1:])
    peaks = _peaks(strength, around, PICTURE_FLOOR, PICTURE_RATIO, PICTURE_CONTRAST)
    refined = [_refined(np.clip(np.copysign(1, light[k]) * light, 0, None) + rise, k)
               for k in peaks]  # fmt: skip
    return np.interp(np.array(refined, dtype=np.float64) + 1, np.arange(len(times)), times)


def sound_events(audio: Tensor, sample_rate: int) -> np.ndarray:
    """Times at which something begins to sound: float64 [events], ascending, in seconds.

        s[t] = Σ_bands max(0, A[t + 10 ms] − A[t − 10 ms])

    A: amplitude in 32 mel bands, Hann windows of 32 ms, a hop of 5 ms. Amplitude, not its
    logarithm: an attack that a codec has smeared then peaks at its middle, and the beginning of the
    smear does not count for more than the rest. Peaks as for pictures, refined by a parabola.

    audio: float [C,N], its channels' mean is heard. sample_rate: Hz.
    """
    if audio.ndim != 2:
        raise ValueError(f"audio: expected [C,N], got {list(audio.shape)}")
    size, hop = round(WINDOW * sample_rate) // 2 * 2, max(1, round(HOP * sample_rate))
    if audio.shape[1] <= size:
        return np.empty(0)
    # Whole windows only: nothing is made up beyond the ends, where it would seem to begin or end.
    frames = audio.float().mean(0).unfold(0, size, hop)
    level = torch.cat([_level(part, sample_rate) for part in frames.split(FRAMES)])
    level = F.pad(level.T[None], (REACH, REACH), mode="replicate")[0]
    flux = (level[:, 2 * REACH :] - level[:, : -2 * REACH]).clamp(min=0).sum(0).double().numpy()
    around = partial(_windows, flux, sample_rate / hop)
    peaks = _peaks(flux, around, SOUND_FLOOR, SOUND_RATIO, SOUND_CONTRAST)
    centres = np.array([_refined(flux, k) * hop + size / 2 for k in peaks]) / sample_rate
    return np.minimum(centres + LATENCY, audio.shape[1] / sample_rate)


# --- onset curves and their peaks -----------------------------------------------------------------


def _level(frames: Tensor, sample_rate: int) -> Tensor:
    """Amplitude in mel bands of windows [n,size]: [n,bands]."""
    size = frames.shape[1]
    spectrum = torch.fft.rfft(frames * torch.hann_window(size)).abs() * (4 / size)
    return (spectrum.square() @ _mel_bands(size, sample_rate)).sqrt()


@lru_cache(maxsize=8)
def _mel_bands(size: int, sample_rate: int) -> Tensor:
    """Triangles evenly spaced in mel: float32 [size/2 + 1, bands]."""
    edges = np.linspace(_mel(LOWEST), _mel(min(HIGHEST, sample_rate / 2)), BANDS + 2)
    place = _mel(np.fft.rfftfreq(size, 1 / sample_rate))[:, None]
    up = (place - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - place) / (edges[2:] - edges[1:-1])
    return torch.from_numpy(np.clip(np.minimum(up, down), 0, None)).float()


def _mel(frequency):
    return 2595 * np.log10(1 + frequency / 700)


def _later(x: np.ndarray, steps: int) -> np.ndarray:
    """x delayed by `steps`, its beginning held."""
    return np.concatenate([np.repeat(x[:1], steps), x])[: len(x)]


def _peaks(strength: np.ndarray, around: Around, floor: float, ratio: float, contrast: float):
    """Indices k where strength[k] is the largest within `GAP`, at least `floor`, at least `ratio`
    of the largest within `SPAN`, and at least `contrast` times the median within half of that.

    around: (reduction, seconds) → that of each value's neighbourhood, as far to either side.
    """
    nearest, largest = around(np.max, GAP), around(np.max, SPAN)
    enough = np.maximum(floor, np.maximum(ratio * largest, contrast * around(np.median, SPAN / 2)))
    peak = (strength == nearest) & (strength >= enough)
    peak[1:] &= strength[1:] != strength[:-1]  # of a plateau only its beginning
    peak[:1] = False  # what it rises from is not known: it may be the end of something earlier
    return np.nonzero(peak)[0]


def _windows(x: np.ndarray, rate: float, reduce: Reduction, seconds: float) -> np.ndarray:
    """Over each value's neighbourhood at one rate, the ends reflected: [len(x)]."""
    reach = max(1, round(seconds * rate))
    padded = np.pad(x, reach, mode="reflect")
    return reduce(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)


def _around(x: np.ndarray, times: np.ndarray, reduce: Reduction, seconds: float) -> np.ndarray:
    """As `_windows`, of values at any times: those not further off than `seconds` and half a usual
    step, one to either side at least."""
    reach = seconds + 0.499 * float(np.median(np.diff(times)))
    length = times[-1] - times[0]
    laps = min(math.ceil(reach / length), 1000) if length > 0 else 1
    edge = laps * (len(x) - 1)
    padded = np.pad(x, edge, mode="reflect")
    when = np.pad(times, edge, mode="reflect", reflect_type="odd")
    middle = np.arange(len(x)) + edge
    first = np.minimum(np.searchsorted(when, times - reach), middle - 1)
    last = np.maximum(np.searchsorted(when, times + reach, side="right"), middle + 2)
    return np.array([reduce(padded[a:b]) for a, b in zip(first, last, strict=True)])


def _refined(x: np.ndarray, k: int) -> float:
    """Where the parabola through x[k−1], x[k], x[k+1] has its top, within half a step of k."""
    if k == 0 or k == len(x) - 1:
        return float(k)
    curvature = x[k - 1] - 2 * x[k] + x[k + 1]
    if curvature >= 0:
        return float(k)
    return k + float(np.clip(0.5 * (x[k - 1] - x[k + 1]) / curvature, -0.5, 0.5))
