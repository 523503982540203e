"""Media files decoded onto one time axis.

A file's timestamps are the only truth about what belongs together: time begins with the first
picture, and every sample of sound is placed by its own timestamp against that one origin. Encoder
priming, edit lists, reordered pictures, streams that start apart and variable frame rates are
thereby all the same case. Sound from before the first picture is cut, and what the sound does not
cover is silence, as in a player.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from torch import Tensor

# swscale's exact paths: without them the mean colour drifts by 1 to 2 of 255.
EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP

_JITTER = 0.005  # s; containers round timestamps by up to 1 ms, a lost packet is 2.5 ms at least
_TRUNCATED = 0.25  # s missing against what the header says; priming and padding are below 0.1 s
_HOLE = 10.0  # s without a new picture; a broken timestamp rather than a still
_UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED


class ClipError(ValueError):
    """A file that cannot be used as a clip: `path`, and `reason` in one line."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass
class Streams:
    """Both streams on one time axis, in seconds from the first picture.

    fps: average pictures per second. pictures: uint8 [H,W,3] each, on from picture_times[k] to the
    next one's. sound: float32 [C,N]. seconds: when the last picture ends.
    """

    fps: float
    sample_rate: int
    picture_times: list[float] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    sound: Tensor | None = None
    seconds: float = 0.0


def decode(path: Path, seconds: float | None, size: tuple[int, int] | None) -> Streams:
    """All pictures and sound of a file, or enough of them for its first `seconds`.

    size: (height, width) of the pictures, as in `read_clip`. Raises ClipError.
    """
    if not path.is_file():
        raise ClipError(path, "no such file")
    if path.stat().st_size == 0:
        raise ClipError(path, "empty file")
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            return _decode(container, path, seconds, size)
    except av.FFmpegError as error:
        reason = f"damaged, truncated or not a media file ({error.strerror})"
        raise ClipError(path, reason) from error


def _decode(container, path: Path, seconds: float | None, size) -> Streams:
    video, audio = _both(container, path)
    streams = Streams(float(video.average_rate or video.guessed_rate), audio.sample_rate)
    to_rgb, placed = _ToRGB(size, video.sample_aspect_ratio), _Placed(audio.sample_rate)
    ends = {video.index: -math.inf, audio.index: -math.inf}
    complete = False
    for packet in container.demux(video, audio):
        for frame in packet.decode():
            if frame.pts is None:
                raise ClipError(path, "its frames carry no timestamps")
            start = float(frame.pts * frame.time_base)
            if packet.stream is video:
                if frame.is_corrupt:
                    raise ClipError(path, f"damaged picture at {start:.2f} s")
                streams.picture_times.append(start)
                streams.pictures.append(to_rgb(frame))
                length = float(frame.duration * frame.time_base) or 1 / streams.fps
            else:
                if frame.sample_rate != audio.sample_rate:
                    raise ClipError(path, f"its sample rate changes at {start:.2f} s")
                placed.append(start, _samples(frame))
                length = frame.samples / frame.sample_rate
            ends[packet.stream.index] = max(ends[packet.stream.index], start + length)
        if seconds is not None and streams.pictures:
            complete = min(ends.values()) > streams.picture_times[0] + seconds + 1 / streams.fps
            if complete:
                break
    for found, kind in ((streams.pictures, "pictures"), (placed.chunks, "sound")):
        if not found:
            raise ClipError(path, f"no {kind} (the stream is empty)")
    if not complete:
        _check_whole(path, video, ends[video.index], "pictures", 1 / streams.fps)
        _check_whole(path, audio, ends[audio.index], "sound", 1 / streams.fps)
    _set_origin(path, streams, placed, ends[video.index], seconds)
    return streams


def _both(container, path: Path):
    """The first stream of each kind with a decoder; a cover picture is no video."""
    found, has = [], container.streams
    for streams, kind in ((has.video, "pictures"), (has.audio, "sound")):
        usable = [s for s in streams
                  if s.codec_context and not s.disposition & Disposition.attached_pic]  # fmt: skip
        if not usable:
            raise ClipError(path, f"no {kind} (no such stream that can be decoded)")
        found.append(usable[0])
    if not (found[0].average_rate or found[0].guessed_rate):
        raise ClipError(path, "no frame rate")
    return found


def _set_origin(path: Path, streams: Streams, placed: "_Placed", end: float, seconds) -> None:
    """Both streams, counted from the first picture."""
    steps = np.diff([*streams.picture_times, end])
    if steps.min() < 0 or steps.max() > _HOLE:
        raise ClipError(path, "the timestamps of its pictures jump")
    origin = streams.picture_times[0]
    streams.picture_times = [time - origin for time in streams.picture_times]
    streams.seconds = end - origin
    streams.sound = placed.joined(origin, seconds or streams.seconds)


def _check_whole(path: Path, stream, end: float, kind: str, tolerance: float) -> None:
    """A truncated file decodes without complaint; only its header knows what is missing."""
    if stream.duration is None:
        return
    promised = float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    if end < promised - _TRUNCATED - tolerance:
        raise ClipError(path, f"truncated: {kind} end at {end:.2f} s of {promised:.2f} s")


class _ToRGB:
    """Frame → uint8 [H,W,3]: colours by the frame's tags, then upright, scaled and cropped."""

    def __init__(self, size: tuple[int, int] | None, pixel_aspect: Fraction | None):
        self.size = size
        self.pixel_width = float(pixel_aspect or 1)
        self.reformatter = VideoReformatter()

    def __call__(self, frame) -> Tensor:
        turns = round(frame.rotation / 90) % 4  # counter-clockwise quarters
        height, width = frame.height, round(frame.width * self.pixel_width)
        if self.size is not None:
            target = self.size if turns % 2 == 0 else self.size[::-1]
            ratio = max(target[0] / height, target[1] / width)
            height, width = round(height * ratio), round(width * ratio)
        picture = self.reformatter.reformat(
            frame, width=width, height=height, format="rgb24",
            src_colorspace=_matrix(frame), src_color_range=_range(frame),
            dst_color_range=ColorRange.JPEG, interpolation=Interpolation.BICUBIC | EXACT,
        )  # fmt: skip
        picture = torch.from_numpy(np.rot90(picture.to_ndarray(), turns).copy())
        return picture if self.size is None else _centre(picture, self.size)


def _matrix(frame) -> int:
    """Untagged pictures are Rec. 709 from 720 lines on and Rec. 601 below, as players assume."""
    if frame.colorspace != _UNTAGGED:
        return frame.colorspace
    return Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601


def _range(frame) -> int:
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return ColorRange.JPEG if full or frame.format.is_rgb else ColorRange.MPEG


def _centre(picture: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = ((have - want) // 2 for have, want in zip(picture.shape, size, strict=False))
    return picture[top : top + size[0], left : left + size[1]].contiguous()


class _Placed:
    """Chunks of sound on one time axis; each follows the last unless its timestamp disagrees."""

    def __init__(self, sample_rate: int):
        self.sample_rate = sample_rate
        self.chunks: list[tuple[int, Tensor]] = []

    def append(self, start: float, samples: Tensor) -> None:
        place = round(start * self.sample_rate)
        if self.chunks:
            last, chunk = self.chunks[-1]
            expected = last + chunk.shape[1]
            if abs(place - expected) <= _JITTER * self.sample_rate:
                place = expected
        self.chunks.append((place, samples))

    def joined(self, origin: float, seconds: float) -> Tensor:
        """[C,N] from `origin` on for `seconds`; zeros where nothing was placed."""
        first = round(origin * self.sample_rate)
        channels = max(chunk.shape[0] for _, chunk in self.chunks)
        out = torch.zeros(channels, round(seconds * self.sample_rate))
        for place, chunk in self.chunks:
            start, stop = max(place - first, 0), min(place - first + chunk.shape[1], out.shape[1])
            if start < stop:
                out[:, start:stop] = chunk[:, start + first - place : stop + first - place]
        return out


def _samples(frame) -> Tensor:
    """Decoded sound, packed or planar, integer or float, as float32 [C,N]."""
    x = torch.from_numpy(frame.to_ndarray())
    if not frame.format.is_planar:
        x = x.view(-1, frame.layout.nb_channels).T
    if x.is_floating_point():
        return x.float()
    scale = 2.0 ** (8 * x.element_size() - 1)
    return x.float() / scale - (1.0 if x.dtype == torch.uint8 else 0.0)
