"""Buckets: the several clip formats that one cache may hold, and which of them a clip goes into.

A bucket is a number of pictures, a height, a width and a frame rate. A clip is never stretched in
time: it goes into the longest bucket that it fills, of those of one length into the one of the
nearest shape, and what it has beyond that is cut off.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Subset

from syncdpo.data.clips import Clip, ClipFormat, TooShort
from syncdpo.data.decoding import ClipError, shown_size

ALIKE = 1e-6  # by which the logarithms of two aspect ratios may differ that are one


class Bucket(NamedTuple):
    """What `set_format` of a model with several clip formats takes."""

    frames: int
    height: int
    width: int
    fps: float

    @property
    def seconds(self) -> float:
        return self.frames / self.fps

    def __str__(self) -> str:
        """As the command line takes it; the rate is one of its own there."""
        return f"{self.frames}x{self.height}x{self.width}"


def parse_bucket(text: str, fps: float) -> Bucket:
    """ "121x512x768": pictures, height, width. Raises ValueError where it is none."""
    numbers = text.lower().replace("×", "x").split("x")
    if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
        raise ValueError(
            f"bucket: expected pictures x height x width, as 121x512x768, got {text!r}"
        )
    return Bucket(*map(int, numbers), fps)


def choose(buckets: Sequence[Bucket], seconds: float, size: tuple[int, int]) -> Bucket | None:
    """The bucket for a clip of that length and (height, width); None where all are too long.

    The longest that it fills, as `read_clip` understands that; then the nearest aspect ratio, by
    its logarithm, so that twice as wide is as far off as twice as high; then the most pixels.
    """
    filled = [bucket for bucket in buckets if seconds >= bucket.seconds - 0.5 / bucket.fps]
    if not filled:
        return None
    longest = max(bucket.seconds for bucket in filled)
    aspect = math.log(size[1] / size[0])

    def distance(bucket: Bucket) -> tuple[int, int]:
        off = abs(math.log(bucket.width / bucket.height) - aspect)
        return round(off / ALIKE), -bucket.height * bucket.width

    return min((b for b in sorted(filled) if b.seconds == longest), key=distance)


def read_into(
    path: Path, formats: dict[Bucket, ClipFormat], read: Callable[[Path, ClipFormat], Clip]
) -> tuple[Bucket, Clip]:
    """The clip, read by `read` in the format of the bucket that fits it.

    A file's length is known for certain only when it has been decoded. So the longest buckets are
    tried first, and the length that the file then turns out to have names the bucket. Raises
    ClipError where the clip cannot be read or every bucket is longer than it.
    """
    size, buckets = shown_size(path), list(formats)
    bucket = choose(buckets, math.inf, size)
    try:
        return bucket, read(path, formats[bucket])
    except TooShort as short:
        bucket = choose(buckets, short.seconds, size)
        if bucket is None:
            shortest = min(bucket.seconds for bucket in buckets)
            reason = f"{short.seconds:.2f} s long, shorter than every bucket ({shortest:g} s)"
            raise ClipError(path, reason) from short
        return bucket, read(path, formats[bucket])


# --- models and data of several formats -----------------------------------------------------------


def take_format(model, bucket: Bucket | None) -> None:
    """Puts `model` into the bucket's clip format; None: it has one only, and is in it."""
    if bucket is not None:
        model.set_format(*bucket)


def check_buckets(model, buckets: Sequence[Bucket]) -> None:
    """Raises ValueError where a bucket is no clip format of the model, or is named twice."""
    if not hasattr(model, "set_format"):
        raise ValueError(
            f"bucket: expected a model of several clip formats, got {type(model).__name__}, "
            "which has one"
        )
    for bucket in buckets:
        if list(buckets).count(bucket) > 1:
            raise ValueError(f"bucket: expected different ones, got {bucket} twice")
        try:
            model.set_format(*bucket)
        except ValueError as error:
            raise ValueError(f"bucket {bucket} (pictures x height x width): {error}") from error
        if model.timelines[0].frames < 2:
            raise ValueError(f"bucket {bucket}: expected more than one latent frame, a still has "
                             "no time to be in step")  # fmt: skip


def formats_of(model, buckets: Sequence[Bucket]) -> dict[Bucket, ClipFormat]:
    """What the model wants of a clip of each bucket; leaves it in the last one's format."""
    formats = {}
    for bucket in buckets:
        model.set_format(*bucket)
        formats[bucket] = model.clip_format
    return formats


def mixed_identity(model, buckets: Sequence[Bucket]) -> dict:
    """`model.identity()`, with all buckets, in whatever order, in the place of one clip format."""
    formats = [vars(clip_format) for clip_format in formats_of(model, buckets).values()]
    first = formats[0]
    various = {name for name in first if any(other[name] != first[name] for other in formats)}
    various |= {"seconds", "height", "width"}
    shared = {name: value for name, value in model.identity().items() if name not in various}
    return shared | {"buckets": [list(bucket) for bucket in sorted(buckets)]}


def recorded_buckets(identity: dict) -> list[Bucket]:
    """The buckets of a cache with that identity; none where it holds one clip format."""
    return [Bucket(*numbers) for numbers in identity.get("buckets", ())]


def present_format(model) -> Bucket | None:
    """The clip format that a model is in; None for one that has no other."""
    if not hasattr(model, "set_format"):
        return None
    clip = model.clip_format
    return Bucket(round(clip.seconds * clip.fps), clip.height, clip.width, clip.fps)


def commonest(buckets: Sequence[Bucket | None]) -> Bucket | None:
    """The one of most clips; the first of equals."""
    return Counter(buckets).most_common(1)[0][0]


def buckets_of(data) -> list[Bucket | None]:
    """The bucket of every clip of a dataset; None each where all are of the model's one format."""
    if isinstance(data, Subset):
        whole = buckets_of(data.dataset)
        return [whole[index] for index in data.indices]
    return list(getattr(data, "buckets", None) or [None] * len(data))
