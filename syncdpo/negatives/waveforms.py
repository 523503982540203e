"""Distortions of raw sound: a warp that keeps the pitch, and one source of a mix alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from syncdpo.negatives.distortion import Distortion
from syncdpo.negatives.timeline import Timeline

# Long enough to part the partials of a voice, short enough to hold one attack at a time.
WINDOW_SECONDS = 0.032
# A level below this share of a clip's highest is silence.
QUIET = 1e-4


def warp_keeping_pitch(audio: Tensor, distortion: Distortion, sample_rate: float) -> Tensor:
    """Warp waveforms in time and leave their pitch: a phase vocoder along any map of time.

        |Y[k, t]| = |X[k, τ(t)]|
        arg Y[p, t] = arg Y[p, t-1] + arg X[p, s+1] - arg X[p, s],    s = floor τ(t-1), p a peak
        arg Y[k, t] = arg Y[p, t] + arg X[k, τ(t)] - arg X[p, τ(t)],  p the peak next to k
        arg Y[k, t] = arg X[k, τ(t)]  where sound sets in

    Resampling a waveform, as `Distortion.apply` does, raises the pitch of what plays faster: a
    trace that a listener hears without the picture. The bins around a peak keep the phases that
    they have beside it (Laroche and Dolson, "Improved phase vocoder time-scale modification of
    audio", 1999), and an attack those of the source (Röbel, "A new approach to transient
    processing in the phase vocoder", 2003), so that it stays one. `torchaudio`'s vocoder knows one
    rate for all and does neither: docs/rules.md has the difference in milliseconds.

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
    hop = 2 ** round(math.log2(WINDOW_SECONDS * sample_rate / 4))
    count = audio.shape[1]
    frames = -(-count // hop)
    # Padded so that window k + 1 is centred on frame k of a regular timeline, (k + 1/2) hop.
    padded = F.pad(audio.float(), (hop // 2, frames * hop - count + hop // 2))
    window = torch.hann_window(4 * hop, device=audio.device)
    spectrum = torch.stft(padded, 4 * hop, hop, window=window, return_complex=True)
    timeline = Timeline(frames, sample_rate / hop)
    output = timeline.seconds(torch.arange(frames, device=audio.device, dtype=torch.float32))
    position = timeline.position(distortion.source(output)) + 1
    # The windows centred just outside the clip continue their neighbours.
    position = torch.cat([position[:, :1] - 1, position, position[:, -1:] + 1], dim=1)
    warped = _resynthesised(spectrum, position.clamp(0, frames + 1))
    wave = torch.istft(warped, 4 * hop, hop, window=window, length=padded.shape[1])
    return wave[:, hop // 2 : hop // 2 + count].to(audio.dtype)


def _resynthesised(spectrum: Tensor, position: Tensor) -> Tensor:
    """[B, bins, frames] at source positions [B, T], in frames, with phases that run on."""

    def at(frame: Tensor) -> Tensor:
        return spectrum.gather(2, frame[:, None].expand(-1, spectrum.shape[1], -1))

    below = position.floor().clamp(max=spectrum.shape[2] - 2)
    here, there = at(below.long()), at(below.long() + 1)
    level = here.abs().lerp(there.abs(), (position - below)[:, None])
    advance = (there * here.conj()).angle()
    phase = F.pad(advance.cumsum(2), (1, 0))[..., :-1]
    nearest = position.round().long()
    anchored = _sets_in(spectrum).gather(1, nearest)
    anchored[:, 0] = True
    time = torch.arange(position.shape[1], device=position.device)
    last = torch.where(anchored, time, 0).cummax(1).values
    own = at(nearest)
    phase = phase + (own.angle() - phase).gather(2, last[:, None].expand_as(phase))
    peak = _nearest_peak(level)
    return torch.polar(level, (phase - own.angle()).gather(1, peak) + own.angle())


def _nearest_peak(level: Tensor) -> Tensor:
    """For each bin of [B, bins, T] the nearest one that no bin within two of it outdoes, int64."""
    bins = level.shape[1]
    own = torch.arange(bins, device=level.device)[:, None]
    peaks = level == F.max_pool1d(level.transpose(1, 2), 5, 1, 2).transpose(1, 2)
    below = torch.where(peaks, own, -bins).cummax(1).values
    above = torch.where(peaks, own, 2 * bins).flip(1).cummin(1).values.flip(1)
    return torch.where(own - below <= above - own, below, above)


def _sets_in(spectrum: Tensor) -> Tensor:
    """Frames that add as much to the spectrum as the one before them held, [B, frames] bool."""
    level = spectrum.abs()
    added = level.diff(dim=2).clamp(min=0).sum(1)
    held = level.sum(1)
    quiet = QUIET * held.amax(1, keepdim=True)
    return F.pad(added > held[:, :-1] + quiet, (1, 0))


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
