"""A clip whose picture and sound show one moment, for the tests of clips and their files."""

import torch

from syncdpo.data.clips import Clip

RATE = 16_000


def click_and_flash(when: float, *, seconds=2.0, fps=24.0, rate=RATE, size=(64, 64), channels=1):
    """One white picture and one click of 2 ms, both at `when` (a frame's beginning)."""
    video = torch.full((round(seconds * fps), *size, 3), 40, dtype=torch.uint8)
    video[round(when * fps)] = 220
    audio = torch.zeros(channels, round(seconds * rate))
    start = round(when * rate)
    length = round(0.002 * rate)
    audio[:, start : start + length] = 0.8 * torch.hann_window(length)
    return Clip(video, fps, audio, rate)
