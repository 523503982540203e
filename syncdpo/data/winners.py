"""Faults that make a clip a bad winner: SyncDPO trusts that its picture and sound are in time."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from syncdpo.data.clips import Clip
from syncdpo.metrics import ACCEPTABLE, picture_events, sound_events

VISIBLE = 4.0  # grey levels of 255 by which a thumbnail changes at the very least where it is cut
FURTHEST = 1.0  # s by which sound is looked for before and after the picture
BLUR = 0.04  # s; standard deviation of the events' times
FEWEST = 3  # events that must agree on a lag
DOMINANCE = 1.5  # how much better than in time a lag must fit
FRAME_RATES = (24000 / 1001, 24, 25, 30000 / 1001, 30, 48, 50, 60000 / 1001, 60)


def winner_flags(clip: Clip, path: str | Path, sound: str | Path | None = None) -> list[str]:
    """What speaks against `clip`, read from `path`, as a winner: one phrase each, often none.

    sound: the file that its sound was read from, if that is another one.
    """
    flags = []
    lag = sound_lag(
        picture_events(clip.video, clip.fps), sound_events(clip.audio, clip.sample_rate)
    )
    if lag is not None:
        flags.append(f"its sound {'lags' if lag > 0 else 'leads'} by {abs(lag) * 1000:.0f} ms")
    cuts = find_cuts(clip.video)
    if cuts:
        flags.append("cut at " + ", ".join(f"{frame / clip.fps:.2f} s" for frame in cuts))
    rate = mistaken_rate(*_stream_lengths(path, sound))
    if rate is not None:
        flags.append(f"its pictures and sound differ in length as if made at {rate:.5g} fps")
    return flags


def sound_lag(seen: np.ndarray, heard: np.ndarray) -> float | None:
    """Seconds by which the sound lags (leads, if negative); None where it may well be in time.

    The lag that maximises the events' cross-correlation Σ exp(−½ ((heard − seen − lag) / 40 ms)²),
    where it lies outside what ITU-R BT.1359 calls acceptable, at least three events agree on it,
    and it fits half as well again as any lag inside.
    """
    if min(len(seen), len(heard)) < FEWEST:
        return None
    lags = np.arange(-FURTHEST, FURTHEST + 0.005, 0.01)
    apart = (heard[None, :] - seen[:, None]).ravel()
    fit = np.exp(-0.5 * ((apart[None] - lags[:, None]) / BLUR) ** 2).sum(1)
    lead_limit, lag_limit = ACCEPTABLE
    inside = (lags >= -lead_limit) & (lags <= lag_limit)
    best = int(fit.argmax())
    if inside[best] or fit[best] < max(FEWEST * 0.8, DOMINANCE * fit[inside].max()):
        return None
    return float(lags[best])


def find_cuts(video: Tensor, *, correlation: float = 0.5, jump: float = 4.0) -> list[int]:
    """Frames of `video` [T,H,W,3] uint8 at which another scene begins.

    A cut is a frame whose 16x16 thumbnail, its mean removed, correlates with the one before it by
    less than `correlation` (brightness and contrast cancel, so a flash is none) and differs from it
    by more than `jump` times the clip's median change (so a moving camera is none).
    """
    if len(video) < 3:
        return []
    thumbnails = F.adaptive_avg_pool2d(video.float().mean(-1)[:, None], 16).flatten(1)
    centred = thumbnails - thumbnails.mean(1, keepdim=True)
    change = (centred[1:] - centred[:-1]).abs().mean(1)
    alike = F.cosine_similarity(centred[1:], centred[:-1], dim=1)
    cut = (alike < correlation) & (change > jump * change.median()) & (change > VISIBLE)
    return (torch.nonzero(cut).flatten() + 1).tolist()


def mistaken_rate(fps: float, pictures: float, sound: float) -> float | None:
    """The frame rate that a file's pictures seem made at, where it is not the `fps` it names.

    pictures, sound: the lengths of the file's streams in seconds. Pictures made at 25 fps and
    stored at 24 last 25/24 times as long as their sound: they drift apart by 40 ms every second.
    """
    if not (pictures > 0 and sound > 0) or abs(pictures / sound - 1) < 0.01:
        return None
    tolerance = max(0.002, 0.03 / sound)
    fitting = [rate for rate in FRAME_RATES if abs(rate / fps / (pictures / sound) - 1) < tolerance]
    return min(fitting, key=lambda rate: abs(rate / fps - pictures / sound), default=None)


def _stream_lengths(path: str | Path, sound: str | Path | None) -> tuple[float, float, float]:
    """(frames per second, seconds of pictures, seconds of sound), as the headers say."""
    with av.open(f"file:{path}", metadata_errors="ignore") as container:
        video = container.streams.video[0]
        rate = float(video.average_rate or video.guessed_rate)
        pictures = _seconds(video)
        if sound is None:
            return rate, pictures, _seconds(container.streams.audio[0])
    with av.open(f"file:{sound}", metadata_errors="ignore") as container:
        return rate, pictures, _seconds(container.streams.audio[0])


def _seconds(stream) -> float:
    return float((stream.duration or 0) * stream.time_base)
