"""Decoded sound on a clock of its own, fitted to the timestamps.

Sound is continuous: samples follow each other at the sample rate, whatever jitter browsers and
networks put into the stamps of their packets. So a stamp is a measurement, not a command: the
chunks follow each other without a seam, a clock fitted to all their stamps says when they sound,
and silence stands only where the stamps leave room for packets that never came.

With stamps tₖ and sₖ samples before chunk k, the level rₖ = tₖ − sₖ/rate is a constant for an exact
file; jitter scatters it, a clock that runs apart tilts it, missing packets raise it for good.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from syncdpo.data.container import Refused

_PLANES = 8  # of sound; PyAV reads beyond the frame for more
_STEP = 0.0022  # s; containers round timestamps by up to 1 ms, a lost packet is 2.5 ms at least
_NOISY_STEP = 0.005  # s; the same where stamps scatter
_NOISY = 0.001  # s; stamps that scatter by more than rounding explains
_RETURNS = 8  # packets after which a stamp that was off is a break and no slip
_KNOT = 10.0  # s between the knots of a clock that drifts
_DRIFT = 0.001  # s over a clip; less is not worth a resampling
_SPEED = 0.01  # a clock out by more is no drift but a wrong sample rate
_MOST_BREAKS = 8  # of the sound, beyond which its stamps mean nothing where they are also more
_BROKEN = 0.2  # than this share of all packets
_BACK = 0.5  # s by which sound may overlap what came before it


@dataclass(frozen=True)
class _Run:
    """Chunks first to last − 1, `lost` [last − first] samples of silence before each; sample j of
    the run, silence included, sounds at j/rate + level(j/rate), linear between knots."""

    first: int
    last: int
    lost: np.ndarray
    knots: np.ndarray
    levels: np.ndarray


class Sound:
    """Chunks of sound in the order decoded, each with its timestamp."""

    def __init__(self, sample_rate: int):
        self.sample_rate = sample_rate
        self.chunks: list[Tensor] = []
        self.stamps: list[float] = []
        self.gaps = 0  # how often packets are missing; known once joined

    def append(self, start: float, samples: Tensor) -> None:
        """samples: [C,N]; with another number of channels than the first chunk's, their mean."""
        if not samples.shape[1]:
            return
        if self.chunks and samples.shape[0] != self.chunks[0].shape[0]:
            samples = samples.mean(0, keepdim=True).expand(self.chunks[0].shape[0], -1)
        self.chunks.append(samples)
        self.stamps.append(start)

    def covered(self, first: float, last: float) -> float:
        """Seconds of sound stamped within [first, last)."""
        return sum(
            chunk.shape[1] / self.sample_rate
            for stamp, chunk in zip(self.stamps, self.chunks, strict=True)
            if first <= stamp < last
        )

    def joined(self, origin: float, seconds: float) -> Tensor:
        """[C,N] from `origin` on for `seconds`; zeros where nothing was placed.

        Raises ValueError, with a reason of one line, where the stamps contradict the samples.
        """
        rate = self.sample_rate
        out = torch.zeros(self.chunks[0].shape[0], round(seconds * rate))
        lengths = np.array([chunk.shape[1] for chunk in self.chunks])
        reached = -np.inf
        for run in _runs(np.array(self.stamps), lengths, rate):
            begin = float(run.levels[0])
            if begin < reached - _BACK:
                raise ValueError(f"the timestamps of its sound jump back at {begin:.2f} s")
            self.gaps += np.count_nonzero(run.lost)
            self.gaps += reached > -np.inf and begin > reached + _STEP
            source = self._source(run)
            _place(out, source, run, rate, origin)
            reached = max(reached, begin + source.shape[1] / rate)
        return out

    def _source(self, run: _Run) -> Tensor:
        parts = []
        for chunk, lost in zip(self.chunks[run.first : run.last], run.lost, strict=True):
            if lost:
                parts.append(chunk.new_zeros(chunk.shape[0], int(lost)))
            parts.append(chunk)
        return torch.cat(parts, 1)


def samples_of(frame, rate: int) -> Tensor:
    """Its samples [C,N]; refused where it is of another rate, or of too many channels."""
    if frame.sample_rate != rate:
        raise Refused(f"its sample rate changes from {rate} to {frame.sample_rate} Hz")
    if frame.format.is_planar and frame.layout.nb_channels > _PLANES:
        channels = frame.layout.nb_channels
        raise Refused(f"its sound has {channels} channels, {_PLANES} at most can be read")
    return _as_float(frame)


def _as_float(frame) -> Tensor:
    """Decoded sound, packed or planar, integer or float, as float32 [C,N]."""
    x = torch.from_numpy(frame.to_ndarray())
    if not frame.format.is_planar:
        x = x.view(-1, frame.layout.nb_channels).T
    if x.is_floating_point():
        return x.float()
    scale = 2.0 ** (8 * x.element_size() - 1)
    return x.float() / scale - (1.0 if x.dtype == torch.uint8 else 0.0)


def _place(out: Tensor, source: Tensor, run: _Run, rate: int, origin: float) -> None:
    """Writes a run where its clock says, by whole samples, or resampled where the clock drifts."""
    if len(run.levels) == 1:
        place = round((run.levels[0] - origin) * rate)
        start, stop = max(place, 0), min(place + source.shape[1], out.shape[1])
        if start < stop:
            out[:, start:stop] = source[:, start - place : stop - place]
        return
    sounds = (run.knots + run.levels - origin) * rate  # when the knots sound, in samples of `out`
    start, stop = max(round(sounds[0]), 0), min(round(sounds[-1]), out.shape[1])
    if start < stop:
        wanted = np.interp(np.arange(start, stop), sounds, run.knots * rate)
        out[:, start:stop] = _at(source, wanted)


def _at(source: Tensor, where: np.ndarray) -> Tensor:
    """source [C,N] at fractional samples, by cubic convolution."""
    whole = np.floor(where).astype(np.int64)
    x = torch.from_numpy((where - whole).astype(np.float32))
    a, b, c, d = (source[:, np.clip(whole + k, 0, source.shape[1] - 1)] for k in (-1, 0, 1, 2))
    return b + 0.5 * x * (c - a + x * (2 * a - 5 * b + 4 * c - d + x * (3 * (b - c) + d - a)))


# --- the clock ------------------------------------------------------------------------------------


def _runs(stamps: np.ndarray, lengths: np.ndarray, rate: int) -> Iterator[_Run]:
    """Stretches of continuous sound."""
    before = (np.cumsum(lengths) - lengths) / rate
    levels = _filled(stamps - before)
    noise = _noise(levels)
    lost = np.zeros(len(levels), np.int64)
    if noise > _NOISY:
        levels, cuts = _noisy_breaks(levels, lengths, rate, noise, lost)
    else:
        levels, cuts = _exact_breaks(levels, min(max(_STEP, 6 * noise), _NOISY_STEP))
    if len(cuts) + np.count_nonzero(lost) > max(_MOST_BREAKS, _BROKEN * len(levels)):
        raise ValueError("the timestamps of its sound disagree with its length")
    for first, last in zip([0, *cuts], [*cuts, len(levels)], strict=True):
        inside = lost[first:last].copy()
        inside[0] = 0  # what is missing before a run is between two runs
        length = (lengths[first:last].sum() + inside.sum()) / rate
        offset = np.cumsum(inside) / rate
        starts = before[first:last] - before[first] + offset
        own = levels[first:last] + before[first] - offset
        yield _Run(first, last, inside, *_clock(starts, own, length, noise))


def _filled(levels: np.ndarray) -> np.ndarray:
    """What has no stamp follows what is before it; at the beginning, what is after it."""
    known = np.nonzero(np.isfinite(levels))[0]
    if not len(known):
        raise ValueError("its sound carries no timestamps")
    nearest = np.searchsorted(known, np.arange(len(levels)), side="right") - 1
    return levels[known[np.maximum(nearest, 0)]]


def _noise(levels: np.ndarray) -> float:
    """Standard deviation of a stamp. Only jitter steps back: losses raise the level for good."""
    if len(levels) < 3:
        return 0.0
    return max(float(np.quantile(-np.diff(levels), 0.9)) / 1.85, 0.0)


def _exact_breaks(levels: np.ndarray, step: float) -> tuple[np.ndarray, list[int]]:
    """Breaks are steps between neighbours, but for stamps that slip and come back."""
    levels, cuts = levels.copy(), []
    index = 1
    while index < len(levels):
        if abs(levels[index] - levels[index - 1]) > step:
            after = levels[index + 1 : index + 1 + _RETURNS]
            back = np.nonzero(np.abs(after - levels[index - 1]) <= step)[0]
            if len(back):
                levels[index : index + 1 + back[0]] = levels[index - 1]
            else:
                cuts.append(index)
        index += 1
    return levels, cuts


def _noisy_breaks(levels, lengths, rate: int, noise: float, lost: np.ndarray):
    """Breaks are lasting steps, between means of many stamps. Lost packets are whole ones: where a
    step is so many of them, it goes to `lost` and the clock runs on."""
    packet = np.median(lengths)
    levels = _without_outliers(levels, noise)
    least = max(_NOISY_STEP, 0.6 * packet / rate)
    window = int(np.clip(np.ceil(2 * (5 * noise / least) ** 2), 4, 60))
    cuts = []
    for index, step in sorted(_steps(levels, 0, len(levels), window, least, noise)):
        packets = step * rate / packet
        if round(packets) >= 1 and abs(packets - round(packets)) < 0.35:
            lost[index] = round(packets) * packet
        else:
            cuts.append(index)
    return levels, cuts


def _without_outliers(levels: np.ndarray, noise: float) -> np.ndarray:
    reach = 4
    padded = np.pad(levels, reach, mode="edge")
    middle = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), 1)
    return np.where(np.abs(levels - middle) > max(8 * noise, 0.1), middle, levels)


def _steps(levels, first: int, last: int, window: int, least: float, noise: float):
    """[(index, step)] of the lasting steps in levels[first:last], the clearest first, then on both
    sides of it."""
    index = np.arange(first + 3, last - 2)
    if not len(index):
        return []
    sums = np.concatenate([[0.0], np.cumsum(levels)])
    left, right = np.maximum(index - window, first), np.minimum(index + window, last)
    step = (sums[right] - sums[index]) / (right - index) - (sums[index] - sums[left]) / (
        index - left
    )
    doubt = 5 * noise * np.sqrt(1 / (right - index) + 1 / (index - left))
    clear = np.abs(step) / np.maximum(least, doubt)
    best = int(clear.argmax())
    if clear[best] < 1:
        return []
    at = int(index[best])
    return [
        (at, float(step[best])),
        *_steps(levels, first, at, window, least, noise),
        *_steps(levels, at, last, window, least, noise),
    ]


def _clock(starts: np.ndarray, levels: np.ndarray, length: float, noise: float):
    """(knots, levels): one level, or those of a clock that drifts, at knots from 0 to `length`."""
    constant = np.zeros(1), np.array([levels.mean() if noise else np.median(levels)])
    if len(levels) < 16:
        return constant
    knots = np.linspace(0, length, max(2, round(length / _KNOT) + 1))
    hats = np.stack([np.interp(starts, knots, row) for row in np.eye(len(knots))], 1)
    fitted = np.linalg.lstsq(hats, levels, rcond=None)[0]
    uncertain = 4 * noise * np.sqrt(12 * (len(knots) - 1) / len(levels))
    if np.ptp(fitted) < max(_DRIFT, uncertain):
        return constant
    speed = np.abs(np.diff(fitted) / np.diff(knots)).max()
    if speed > _SPEED:
        raise ValueError(f"its sound is {speed:.0%} slower or faster than its timestamps")
    return knots, fitted
