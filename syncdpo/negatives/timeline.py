"""Where the latent frames of one stream lie in time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Frames by which two times may be apart that are the same but for float64's rounding.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Timeline:
    """The time axis of one stream: seconds to latent positions and back.

        regular stream:      centre of frame k = (k + 1/2) / rate
        causal video codec:  centre of frame 0 = first / 2 / fps
                             centre of frame k = (first + (k - 1/2) stride) / fps,  k >= 1
                             with fps = rate * stride

    A causal video codec lets latent frame 0 stand for `first` pictures and each later one for
    `stride` (LTX-2: 1 and 8); a regular stream has first = stride. Positions are counted in
    latent frames, a whole number at a centre, and run linearly between centres.

    Args:
        frames: latent frames along `dim`.
        rate: latent frames per second (of a causal codec: pictures per second / stride).
        dim: the tensor's time axis.
        tokens: tokens per latent frame where time is packed, [B, frames * tokens, C].
        first: pictures behind latent frame 0.
        stride: pictures behind each later latent frame.

    Raises:
        ValueError: a count below 1, or a rate that is not finite and positive.
    """

    frames: int
    rate: float
    dim: int = 1
    tokens: int = 1
    first: int = 1
    stride: int = 1

    def __post_init__(self) -> None:
        for name in ("frames", "tokens", "first", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate: expected a finite number above 0, got {self.rate}")

    @property
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last."""
        return (self._lead + self.frames - 1) / self.rate

    @property
    def even_from(self) -> float:
        """Seconds at which the first of the frames begins that are all of one length."""
        return 0.0 if self.first == self.stride else self._lead / self.rate

    def until(self, end: float) -> Timeline:
        """The frames that have ended by then; the first one at least."""
        ended = math.floor(end * self.rate - self._lead + 1 + ROUNDING)
        return replace(self, frames=min(max(ended, 1), self.frames))

    @property
    def even(self) -> float:
        """Seconds of the frames that are all of one length, or of the only one there is."""
        return (self.frames - self.next_border(self.even_from)) / self.rate or self.duration

    def next_border(self, seconds: float) -> int:
        """The first border at that time or after it."""
        if seconds <= 0:
            return 0
        return max(math.ceil(seconds * self.rate - self._lead + 1 - ROUNDING), 1)

    def seconds(self, position: Tensor) -> Tensor:
        """The time at each position; the inverse of `position`."""
        before = self._lead / 2 + position * (self._lead + 1) / 2
        after = position + (self._lead - 0.5)
        return torch.where(position < 1, before, after) / self.rate

    def position(self, seconds: Tensor) -> Tensor:
        """The position at each time; the inverse of `seconds`."""
        ticks = seconds * self.rate
        before = (ticks - self._lead / 2) * 2 / (self._lead + 1)
        after = ticks - (self._lead - 0.5)
        return torch.where(ticks < self._lead + 0.5, before, after)

    def border(self, seconds: Tensor) -> Tensor:
        """The border between frames nearest to each time: k where frame k begins, whole floats.

        On a regular stream floor(seconds * rate + 1/2), as in `replace_segments`.
        """
        ticks = seconds * self.rate
        borders = torch.where(ticks < self._lead, ticks / self._lead, ticks - self._lead + 1)
        return torch.floor(borders + 0.5)

    def begins(self, border: Tensor) -> Tensor:
        """The time at which frame k begins, k whole; the inverse of `border`."""
        return torch.where(border < 1, border * self._lead, border + (self._lead - 1)) / self.rate

    def as_frames(self, x: Tensor) -> Tensor:
        """A stream with the tokens of a frame on an axis of their own, behind that of time."""
        return x if self.tokens == 1 else x.unflatten(self.dim, (self.frames, self.tokens))

    @property
    def _lead(self) -> float:
        """Length of frame 0, in lengths of a later frame."""
        return self.first / self.stride


def longer_frames(*timelines: Timeline) -> Timeline:
    """Of several streams the one with the longest frames; of equals the first."""
    return min(timelines, key=lambda timeline: timeline.rate)
