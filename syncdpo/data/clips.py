"""Clips, and how they come from and go to media files.

A file's timestamps are the only truth about what belongs together: a clip begins with its first
picture, and every sample of sound is placed by its own timestamp against that one origin. Encoder
priming, edit lists, reordered pictures, streams that start apart and variable frame rates are
thereby all the same case. Sound from before the first picture is cut, and what the sound does not
cover is silence, as in a player.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from torch import Tensor

EXTENSIONS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})
SILENCE = 1e-3  # peak amplitude (-60 dB) below which a clip has no sound worth the name
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)

_JITTER = 0.005  # s; containers round timestamps by up to 1 ms, a lost packet is 2.5 ms at least
_TRUNCATED = 0.25  # s missing against what the header says; priming and padding are below 0.1 s
_HOLE = 10.0  # s without a new picture; a broken timestamp rather than a still
_UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP


class ClipError(ValueError):
    """A file that cannot be used as a clip: `path`, and `reason` in one line."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class ClipFormat:
    """What a model wants of every clip; seconds, Hz and pixels."""

    seconds: float
    fps: float
    height: int
    width: int
    sample_rate: int
    channels: int


@dataclass(frozen=True, eq=False)
class Clip:
    """Pictures and sound of the same stretch of time, both beginning at 0 s.

    video: uint8 [T,H,W,3], RGB, full range; picture k is shown from k/fps to (k+1)/fps.
    audio: float32 [C,N] in [-1, 1]; sample n sounds at n/sample_rate.
    Raises TypeError for another dtype, ValueError for another shape or a rate that is not positive.
    """

    video: Tensor
    fps: float
    audio: Tensor
    sample_rate: int

    def __post_init__(self):
        _check_tensor("video", self.video, torch.uint8, "[T,H,W,3]", self.video.ndim == 4
                      and self.video.shape[-1] == 3 and self.video.numel() > 0)  # fmt: skip
        _check_tensor("audio", self.audio, torch.float32, "[C,N]", self.audio.ndim == 2
                      and self.audio.shape[0] > 0)  # fmt: skip
        for name in ("fps", "sample_rate"):
            _check_positive(name, getattr(self, name))

    @property
    def seconds(self) -> float:
        return len(self.video) / self.fps


def list_clips(folder: str | Path) -> list[Path]:
    """All media files below a folder, by extension, sorted; hidden files are not clips.

    Raises NotADirectoryError where there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"folder: expected a folder of clips, got {folder}")
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )


def read_clips(
    paths: Iterable[str | Path],
    *,
    progress: Callable[[Iterable[str | Path]], Iterable[str | Path]] = iter,
    require_sound: bool = True,
    **wanted,
) -> tuple[list[Clip], list[tuple[Path, str]]]:
    """Reads what can be read: → (clips, skipped), skipped being (path, reason) of the others.

    progress: wraps the iteration, e.g. `tqdm`. wanted: the options of `read_clip`.
    """
    clips, skipped = [], []
    for path in progress(paths):
        try:
            clips.append(read_clip(path, require_sound=require_sound, **wanted))
        except ClipError as error:
            skipped.append((error.path, error.reason))
    return clips, skipped


def reading_summary(read: int, skipped: list[tuple[Path, str]]) -> str:
    """One sentence: how many clips were read, and which were not, each with its reason."""
    if not skipped:
        return f"Read all {read} clips."
    named = "; ".join(f"{path} ({reason})" for path, reason in skipped)
    return f"Read {read} of {read + len(skipped)} clips, skipped {len(skipped)}: {named}."


# --- reading --------------------------------------------------------------------------------------


def read_clip(
    path: str | Path,
    *,
    seconds: float | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    sample_rate: int | None = None,
    channels: int | None = None,
    require_sound: bool = False,
) -> Clip:
    """The first `seconds` of a file, everything of it by default, in the format asked for.

    fps: picture k is the one that the file shows at the centre of its frame, (k + 0.5)/fps; so any
        rate, a variable one too, becomes constant, and no picture is out by more than half the time
        that the file shows it.
    size: (height, width); scaled with antialiasing until it covers that, then cropped about the
        centre. Rotation tags and non-square pixels are honoured.
    sample_rate: Hz, band-limited resampling without delay. channels: 1 is the mean of all; more are
        copies of that mean where the file has another number.
    require_sound: silence is an error.

    Raises ClipError, with a reason of one line, for whatever keeps the file from being such a clip:
    missing, empty, truncated, damaged, no media at all, without pictures or without sound, silent
    (if asked), shorter than asked.
    """
    for name, value in (("seconds", seconds), ("fps", fps), ("sample_rate", sample_rate),
                        ("channels", channels)):  # fmt: skip
        if value is not None:
            _check_positive(name, value)
    path = Path(path)
    if not path.is_file():
        raise ClipError(path, "no such file")
    if path.stat().st_size == 0:
        raise ClipError(path, "empty file")
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            streams = _decode(container, path, seconds, size)
    except av.FFmpegError as error:
        reason = f"damaged, truncated or not a media file ({error.strerror})"
        raise ClipError(path, reason) from error

    rate = fps or streams.fps
    length = streams.seconds if seconds is None else seconds
    if streams.seconds < length - 0.5 / rate:
        raise ClipError(path, f"{streams.seconds:.2f} s long, shorter than the {length:g} s asked")
    count = max(1, round(length * rate))
    video = torch.stack([streams.pictures[i] for i in _shown(streams.picture_times, count, rate)])
    audio = _mixed(streams.sound, channels)
    audio = _resampled(audio, streams.sample_rate, sample_rate or streams.sample_rate)
    wanted = round(count / rate * (sample_rate or streams.sample_rate))
    audio = F.pad(audio, (0, wanted - audio.shape[1])).clamp(-1, 1)
    if require_sound and is_silent(audio):
        raise ClipError(path, "silent")
    return Clip(video, rate, audio, sample_rate or streams.sample_rate)


def is_silent(audio: Tensor) -> bool:
    """Whether nothing in [C,N] moves by more than `SILENCE` about its mean."""
    return audio.numel() == 0 or bool((audio - audio.mean(1, keepdim=True)).abs().max() < SILENCE)


@dataclass
class _Streams:
    """Both streams as decoded, in seconds from the first picture."""

    fps: float
    sample_rate: int
    picture_times: list[float] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    sound: Tensor | None = None
    seconds: float = 0.0


def _decode(container, path: Path, seconds: float | None, size) -> _Streams:
    video, audio = _first(container.streams.video), _first(container.streams.audio)
    if video is None:
        raise ClipError(path, "no pictures (it has no video stream that can be decoded)")
    if audio is None:
        raise ClipError(path, "no sound (it has no audio stream that can be decoded)")
    rate = video.average_rate or video.guessed_rate
    if not rate:
        raise ClipError(path, "no frame rate")
    streams = _Streams(float(rate), audio.sample_rate)
    to_rgb = _ToRGB(size, video.sample_aspect_ratio)
    placed = _Placed(audio.sample_rate)
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
    if not streams.pictures:
        raise ClipError(path, "no pictures (its video stream is empty)")
    if not placed.chunks:
        raise ClipError(path, "no sound (its audio stream is empty)")
    if not complete:
        for stream, kind in ((video, "pictures"), (audio, "sound")):
            _check_whole(path, stream, ends[stream.index], kind, 1 / streams.fps)

    steps = np.diff([*streams.picture_times, ends[video.index]])
    if steps.min() < 0 or steps.max() > _HOLE:
        raise ClipError(path, "the timestamps of its pictures jump")
    origin = streams.picture_times[0]
    streams.picture_times = [time - origin for time in streams.picture_times]
    streams.seconds = ends[video.index] - origin
    streams.sound = placed.joined(origin, seconds or streams.seconds)
    return streams


def _first(streams):
    """The first stream with a decoder; a cover picture is no video."""
    cover = Disposition.attached_pic
    return next((s for s in streams if s.codec_context and not s.disposition & cover), None)


def _check_whole(path: Path, stream, end: float, kind: str, tolerance: float) -> None:
    """A truncated file decodes without complaint; only its header knows what is missing."""
    if stream.duration is None:
        return
    promised = float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    if end < promised - _TRUNCATED - tolerance:
        raise ClipError(path, f"truncated: {kind} end at {end:.2f} s of {promised:.2f} s")


def _shown(times: list[float], count: int, rate: float) -> Iterator[int]:
    """Which picture is on at the centre of each of `count` frames, given when each comes on."""
    centres = (np.arange(count) + 0.5) / rate
    # Timestamps are rounded to the container's clock: half a millisecond of grace, or a picture
    # that comes on exactly at a centre (12 fps to 24) might be missed by a rounding.
    return np.clip(np.searchsorted(times, centres + 5e-4, side="right") - 1, 0, None).tolist()


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
            dst_color_range=ColorRange.JPEG, interpolation=Interpolation.BICUBIC | _EXACT,
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


def _mixed(audio: Tensor, channels: int | None) -> Tensor:
    if channels is None or channels == audio.shape[0]:
        return audio
    return audio.mean(0, keepdim=True).expand(channels, -1)


def _resampled(audio: Tensor, source: int, target: int) -> Tensor:
    if source == target:
        return audio
    # Here, not above: torchaudio refuses some builds of torch, which can still read other clips.
    from torchaudio.functional import resample

    return resample(audio, source, target)


# --- writing --------------------------------------------------------------------------------------


def write_clip(path: str | Path, clip: Clip) -> None:
    """Writes an mp4 (H.264 near-lossless, AAC 128 kbit/s) that browsers play and `read_clip` reads
    back with sound and picture within 5 ms of each other. The file appears whole or not at all.

    Raises ValueError for what the format cannot hold: odd height or width, more than 2 channels, a
    sample rate that AAC does not know, samples that are not finite.
    """
    path = Path(path)
    _check_writable(clip)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as out:
            video, audio = _add_video(out, clip), _add_audio(out, clip)
            for frame in _pictures(clip):
                out.mux(video.encode(frame))
            for frame in _sounds(clip, audio.codec_context.frame_size or 1024):
                out.mux(audio.encode(frame))
            out.mux(video.encode(None))
            out.mux(audio.encode(None))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_writable(clip: Clip) -> None:
    height, width = clip.video.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"clip.video: expected even height and width, got {height}×{width}")
    if clip.audio.shape[0] > 2:
        raise ValueError(f"clip.audio: expected 1 or 2 channels, got {clip.audio.shape[0]}")
    if clip.sample_rate not in AAC_RATES:
        raise ValueError(f"clip.sample_rate: expected one of {AAC_RATES}, got {clip.sample_rate}")
    if not clip.audio.isfinite().all():
        raise ValueError("clip.audio: expected finite samples, got NaN or infinity")


def _add_video(out, clip: Clip):
    # 1001 holds the broadcast rates (24000/1001) exactly.
    stream = out.add_stream("libx264", rate=Fraction(clip.fps).limit_denominator(1001))
    stream.height, stream.width = clip.video.shape[1:3]
    stream.pix_fmt = "yuv420p"
    # bf=0: no reordered pictures, so readers that ignore edit lists keep time as well.
    # chromaloc=1: swscale centres chroma between pixels; untagged it would be read as left-sited.
    stream.options = {"crf": "15", "bf": "0", "x264-params": "chromaloc=1"}
    context = stream.codec_context
    context.color_range = ColorRange.MPEG
    context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709
    return stream


def _add_audio(out, clip: Clip):
    layout = "mono" if clip.audio.shape[0] == 1 else "stereo"
    return out.add_stream("aac", rate=clip.sample_rate, layout=layout, bit_rate=128_000)


def _pictures(clip: Clip) -> Iterator[av.VideoFrame]:
    reformatter = VideoReformatter()
    for k, picture in enumerate(clip.video):
        frame = av.VideoFrame.from_ndarray(picture.cpu().numpy(), format="rgb24")
        frame = reformatter.reformat(
            frame, format="yuv420p", src_color_range=ColorRange.JPEG,
            dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.BICUBIC | _EXACT,
        )  # fmt: skip
        frame.pts = k
        frame.time_base = 1 / Fraction(clip.fps).limit_denominator(1001)
        yield frame


def _sounds(clip: Clip, frame_size: int) -> Iterator[av.AudioFrame]:
    audio = clip.audio.cpu().clamp(-1, 1).numpy()
    layout = "mono" if audio.shape[0] == 1 else "stereo"
    for start in range(0, audio.shape[1], frame_size):
        chunk = np.ascontiguousarray(audio[:, start : start + frame_size])
        frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout=layout)
        frame.sample_rate = clip.sample_rate
        frame.pts = start
        frame.time_base = Fraction(1, clip.sample_rate)
        yield frame


# --- checks ---------------------------------------------------------------------------------------


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype, shape: str, fits: bool) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
    if not fits:
        raise ValueError(f"{name}: expected {shape}, got {list(value.shape)}")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")
