"""Distortions of raw sound: a warp that keeps the pitch, and one source of a mix alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from syncdpo.distortion import Distortion
from syncdpo.timeline import Timeline

WINDOW = 1024
HOP = WINDOW // 4


def warp_keeping_pitch(audio: Tensor, distortion: Distortion, sample_rate: float) -> Tensor:
    """Warp waveforms in time and leave their pitch: a phase vocoder along any map of time.

        |Y[k, t]| = |X[k, τ(t)]|,   arg Y[k, t] = arg Z[k, t-1] + arg X[k, s+1] conj X[k, s]
        Z[k, t] = Y[k, t] - Y[k-1, t] - Y[k+1, t],   s = τ(t) - 1

    The bins of one tone are locked to each other (Puckette, "Phase-locked vocoder", 1995).
    Resampling a waveform, as `Distortion.apply` does, raises the pitch of what plays faster: a
    trace that a listener hears without the picture.

    Args:
        audio: [B, N] float waveforms; computed in float32.
        distortion: of shifts, scales or warps, one per waveform.
        sample_rate: Hz.

    Raises:
        ValueError: not two axes, or a distortion that replaces segments, which keeps every pitch.
    """
    if audio.ndim != 2:
        raise ValueError(f"audio: expected shape [B, N], got {list(audio.shape)}")
    if distortion.replaces:
        raise ValueError("distortion: expected shift, scale or warp alone, got one with Replace")
    count = audio.shape[1]
    frames = -(-count // HOP)
    # Padded so that window k + 1 is centred on frame k of a regular timeline, (k + 1/2) HOP.
    padded = F.pad(audio.float(), (HOP // 2, frames * HOP - count + HOP // 2))
    window = torch.hann_window(WINDOW, device=audio.device)
    spectrum = torch.stft(padded, WINDOW, HOP, window=window, return_complex=True)
    timeline = Timeline(frames, sample_rate / HOP, dim=2)
    inner = spectrum[..., 1:-1]
    advance = inner * spectrum[..., :-2].conj()
    parts = torch.stack([inner.abs(), advance.real, advance.imag], dim=1).flatten(1, 2)
    level, real, imaginary = distortion.apply(parts, timeline).unflatten(1, (3, -1)).unbind(1)
    advance = torch.atan2(imaginary, real)
    # The windows centred just outside the clip continue their neighbours.
    level = torch.cat([level[..., :1], level, level[..., -1:]], dim=2)
    advance = torch.cat([advance, advance[..., -1:]], dim=2)
    windows = [torch.polar(level[..., 0], spectrum[..., 0].angle())]
    for t in range(frames + 1):
        phase = _locked(windows[-1]).angle() + advance[..., t]
        windows.append(torch.polar(level[..., t + 1], phase))
    warped = torch.stack(windows, dim=2)
    wave = torch.istft(warped, WINDOW, HOP, window=window, length=padded.shape[1])
    return wave[:, HOP // 2 : HOP // 2 + count].to(audio.dtype)


def _locked(window: Tensor) -> Tensor:
    """Each bin with its neighbours, which a steady tone has in opposite phase: [B, bins].

    Bins that belong to one tone so keep one phase, or they would cancel each other in time.
    """
    neighbours = F.pad(window, (1, 1))
    return window - neighbours[..., 2:] - neighbours[..., :-2]


def distort_source(
    stems: Tensor, source: Tensor, distortion: Distortion, timeline: Timeline
) -> Tensor:
    """A mix in which one source has lost its timing and the others have kept theirs.

        mix[b] = Σ_s stems[b, s], with φ(stems[b, s]) for s = source[b]

    Args:
        stems: [B, S, ...] waveforms that add up to the mix; without the axis S they lie along
            `timeline`, time at its `dim`.
        source: [B] int64.
    """
    clip = torch.arange(stems.shape[0], device=stems.device)
    chosen = stems[clip, source]
    return stems.sum(1) + (distortion.apply(chosen, timeline) - chosen)
