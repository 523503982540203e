"""Faults that make a clip a bad winner: SyncDPO trusts that its picture and sound are in time."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from syncdpo.data.clips import Clip

VISIBLE = 4.0  # grey levels of 255 by which a thumbnail changes at the very least where it is cut


def winner_flags(clip: Clip, path: str | Path | None = None) -> list[str]:
    """What speaks against `clip` as a winner, one sentence each; empty where nothing does."""
    flags = []
    cuts = find_cuts(clip.video)
    if cuts:
        times = ", ".join(f"{frame / clip.fps:.2f} s" for frame in cuts)
        flags.append(f"cut at {times}")
    return flags


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
