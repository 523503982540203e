"""Is what is seen also heard, and when? Measured without pretrained weights, on any clip.

Functions of pictures and sound that import nothing else of this package: events are found in each
stream by itself (`onsets`), their times compared (`timing`: onset error, F1, offsets), and AV-Align
is computed as its authors do (`alignment`).
"""

from .alignment import Flow, av_align, flow_align
from .onsets import BLIND, GRID, cell_events, picture_cells, picture_events, sound_events
from .timing import (
    ACCEPTABLE,
    UNDETECTABLE,
    ClipMetrics,
    clip_metrics,
    match_events,
    summarise,
)

__all__ = [
    "ACCEPTABLE",
    "BLIND",
    "GRID",
    "UNDETECTABLE",
    "ClipMetrics",
    "Flow",
    "av_align",
    "cell_events",
    "clip_metrics",
    "flow_align",
    "match_events",
    "picture_cells",
    "picture_events",
    "sound_events",
    "summarise",
]
