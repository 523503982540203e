"""Is what is seen also heard, and when? Measured without pretrained weights, on any clip.

Visible events and audible events are found separately, by detectors that know nothing of each
other, of rules or of models; then their times are compared. Times are in seconds from the clip's
beginning, offsets are heard − seen: positive where the sound is late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from syncdpo.data.clips import Clip

Reduction = Callable[..., np.ndarray]
Around = Callable[[Reduction, float], np.ndarray]

# ITU-R BT.1359-1: seconds by which sound may lead and lag the picture.
UNDETECTABLE = (0.045, 0.125)
ACCEPTABLE = (0.090, 0.185)
OFFSET = (0.250, 0.250)  # pairs that the mean offset is taken over; ours

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


def match_events(
    seen: np.ndarray, heard: np.ndarray, window: float | tuple[float, float] = ACCEPTABLE
) -> list[tuple[int, int]]:
    """One-to-one pairs (index seen, index heard) with −lead ≤ heard − seen ≤ lag, ascending.

    Optimal: as many pairs as there can be, and among those the least sum of |heard − seen|. In
    such a matching no two pairs need cross, so a dynamic programme over both lists finds it.

    seen, heard: ascending times in seconds. window: (lead, lag) in seconds, or one for both.
    """
    lead, lag = (window, window) if isinstance(window, (int, float)) else window
    # best[i][j]: (pairs, −Σ|Δ|) of the first i seen and the first j heard
    best = [[(0, 0.0)] * (len(heard) + 1) for _ in range(len(seen) + 1)]
    for i, s in enumerate(seen):
        for j, h in enumerate(heard):
            best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j])
            if -lead <= h - s <= lag:
                pairs, cost = best[i][j]
                best[i + 1][j + 1] = max(best[i + 1][j + 1], (pairs + 1, cost - abs(h - s)))
    matches = []
    i, j = len(seen), len(heard)
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            matches.append((i, j))
    return matches[::-1]


@dataclass(frozen=True, eq=False)
class ClipMetrics:
    """What was seen and heard in one clip; times in seconds, float64, ascending.

    blind: seconds from the beginning in which nothing could have been seen.
    """

    seen: np.ndarray
    heard: np.ndarray
    seconds: float
    blind: float = 0.0

    @cached_property
    def errors(self) -> np.ndarray:
        """Per visible event, |Δ| to the nearest audible one in seconds, at most half the clip's
        length, which also is what each costs where nothing is heard at all."""
        if not len(self.heard):
            return np.full(len(self.seen), self.seconds / 2)
        distance = np.abs(self.heard[None] - self.seen[:, None]).min(1)
        return np.minimum(distance, self.seconds / 2)

    @cached_property
    def offsets(self) -> np.ndarray:
        """heard − seen of the pairs within `OFFSET`, in seconds."""
        pairs = match_events(self.seen, self.heard, OFFSET)
        return np.array([self.heard[j] - self.seen[i] for i, j in pairs])

    def score(self, window: tuple[float, float]) -> tuple[int, int]:
        """(pairs, events): F1 = 2 · pairs / events.

        A sound within `blind` that has no partner is not counted: what made it may well be there.
        """
        pairs = match_events(self.seen, self.heard, window)
        without = np.delete(self.heard, [j for _, j in pairs])
        unjudged = int((without < self.blind).sum())
        return len(pairs), len(self.seen) + len(self.heard) - unjudged


def clip_metrics(clip: Clip) -> ClipMetrics:
    return ClipMetrics(
        picture_events(clip.video, clip.fps),
        sound_events(clip.audio, clip.sample_rate),
        len(clip.video) / clip.fps,
        BLIND / clip.fps,
    )


def summarise(metrics: Sequence[ClipMetrics]) -> dict[str, float | int | None]:
    """One row of a report; events are pooled over clips, so a clip weighs as much as happens in it.

    f1, f1_undetectable: 2 · pairs / (visible + audible events), paired one-to-one within ITU-R
        BT.1359's acceptable and undetectable windows (see `ClipMetrics.score` for what is counted);
        None where there are no events at all.
    onset_error_ms, onset_error_median_ms: over visible events, |Δ| to the nearest audible one (see
        `ClipMetrics.errors`); None where nothing is seen.
    offset_ms: signed mean over pairs within ±250 ms; positive: sound is late; None without pairs.
    offset_spread_ms: standard deviation over clips of the mean of each clip's own pairs; None where
        fewer than two clips have any.
    events_per_clip, seen_per_clip: audible and visible events per clip. clips: how many.
    """
    if not metrics:
        raise ValueError("metrics: expected those of one clip at least, got none")
    seen, heard = sum(len(m.seen) for m in metrics), sum(len(m.heard) for m in metrics)
    errors = 1e3 * np.concatenate([m.errors for m in metrics])
    offsets = 1e3 * np.concatenate([m.offsets for m in metrics])

    of_clips = [1e3 * m.offsets.mean() for m in metrics if len(m.offsets)]

    def f1(window):
        scores = [m.score(window) for m in metrics]
        pairs, events = sum(p for p, _ in scores), sum(e for _, e in scores)
        return 2 * pairs / events if events else None

    return {
        "f1": f1(ACCEPTABLE),
        "f1_undetectable": f1(UNDETECTABLE),
        "onset_error_ms": float(errors.mean()) if len(errors) else None,
        "onset_error_median_ms": float(np.median(errors)) if len(errors) else None,
        "offset_ms": float(offsets.mean()) if len(offsets) else None,
        "offset_spread_ms": float(np.std(of_clips)) if len(of_clips) > 1 else None,
        "events_per_clip": heard / len(metrics),
        "seen_per_clip": seen / len(metrics),
        "clips": len(metrics),
    }


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


# --- AV-Align -------------------------------------------------------------------------------------


def av_align(clip: Clip) -> float:
    """AV-Align (Yariv et al., "Diverse and Aligned Audio-to-Video Generation via Text-to-Video
    Model Adaptation", arXiv 2309.16429), as JavisBench computes it:

        hits / (A + V − hits), a hit: |Δ| < one frame, each visible peak at most once

    A: librosa's onsets at 22.05 kHz. V: local maxima, of 0.1 px at least, of the mean magnitude of
    Farneback's optical flow. 0 where nothing happens in either. Needs the extra `eval` (librosa,
    OpenCV); ImportError without it.
    """
    flow = Flow()
    means = [flow(picture) for picture in clip.video]
    times = np.arange(len(means)) / clip.fps
    return flow_align(means, times, 1 / clip.fps, clip.audio, clip.sample_rate)


def flow_align(
    flow: Sequence[float], times: np.ndarray, frame: float, audio: Tensor, sample_rate: int
) -> float:
    """`av_align` of pictures that come on at `times`; flow: `Flow` of each. frame: seconds."""
    import librosa

    sound = audio.mean(0).cpu().numpy()
    sound = librosa.resample(sound, orig_sr=sample_rate, target_sr=22_050)
    heard = librosa.onset.onset_detect(y=sound, sr=22_050, units="time")
    flow = np.array([*flow[1:2], *flow[1:]])  # into the first picture, as into the second
    middle = flow[1:-1]
    peak = (middle > flow[:-2]) & (middle > flow[2:]) & (middle >= 0.1)
    seen = times[np.nonzero(peak)[0] + 1]
    hits, free = 0, np.ones(len(seen), dtype=bool)
    for time in heard:
        near = np.nonzero(free & (np.abs(seen - time) < frame))[0]
        if len(near):
            hits += 1
            free[near[0]] = False
    union = len(heard) + len(seen) - hits
    return hits / union if union else 0.0


class Flow:
    """Pictures one after the other → mean magnitude of the flow into each, in pixels; the first's
    is 0. Only the last picture's grey is held.
    """

    def __init__(self):
        self.before: np.ndarray | None = None

    def __call__(self, picture: Tensor) -> float:
        import cv2

        grey = cv2.cvtColor(picture.cpu().numpy(), cv2.COLOR_RGB2GRAY)
        before, self.before = self.before, grey
        if before is None:
            return 0.0
        flow = cv2.calcOpticalFlowFarneback(before, grey, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        return float(np.hypot(flow[..., 0], flow[..., 1]).mean())
