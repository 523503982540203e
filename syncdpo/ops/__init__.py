"""The public door to every kernel: tensors first, options keyword-only, checks once."""

from .dpo_loss import DPOStats, Velocity, dpo_loss
from .paired_noise import noise, paired_noise
from .segment_replace import Segments, replace_segments
from .temporal_warp import scale, shift, warp

__all__ = [
    "DPOStats",
    "Segments",
    "Velocity",
    "dpo_loss",
    "noise",
    "paired_noise",
    "replace_segments",
    "scale",
    "shift",
    "warp",
]
