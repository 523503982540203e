"""Is what is seen also heard, and when? Events of picture and sound, compared.

Offsets are heard − seen: positive where the sound is late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from torch import Tensor

from syncdpo.metrics.onsets import BLIND, picture_events, sound_events

# ITU-R BT.1359-1: seconds by which sound may lead and lag the picture.
UNDETECTABLE = (0.045, 0.125)
ACCEPTABLE = (0.090, 0.185)
OFFSET = (0.250, 0.250)  # pairs that the mean offset is taken over; ours


class Clip(Protocol):
    """Whatever has pictures, uint8 [T,H,W,3], and sound, float [C,N], and their rates in Hz."""

    video: Tensor
    fps: float
    audio: Tensor
    sample_rate: int


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
    """What is seen and what is heard in one clip, each found without the other."""
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
