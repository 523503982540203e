"""Clips, from media files to the latents that a training reads.

`clips` gives pictures and sound on one time axis, whatever a file does to them, and writes them;
`decoding` reads one, with what it asks of a file in `container`, `tracks`, `edits`, `stamps`,
`colours`, `sound`, `tally` and `wholeness`; `sound_file` reads sound alone. `captions` reads what
is said of clips; `latents` encodes them once, in one format or in several `buckets`, and
`precomputed` reads what the LTX-2 trainer encoded, each clip by `trainer_clip` out of
`foreign_tensors`. `pairs` encodes pairs of clips, one preferred over the other. `winners` tells
which clips are out of step, and `synthetic` renders some that are not, `families` other kinds of
them, from the parts in `scenes`. `chance` is where anything random that must be the same again
comes from.
"""

from .clips import Clip, ClipError, ClipFormat, find_clips, read_clip, write_clip
from .latents import LatentDataset, prepare
from .precomputed import open_latents

__all__ = [
    "Clip",
    "ClipError",
    "ClipFormat",
    "LatentDataset",
    "find_clips",
    "open_latents",
    "prepare",
    "read_clip",
    "write_clip",
]
